"""Guidance against closed forms: classes that are Gaussians, with their exact denoisers and classifier, in float64."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closed_form import FAMILIES, close, f64, name
from PIL import Image
from tiny import compose, train
from torch import Tensor, nn

from diffusion_cli import checkpoint, config
from diffusion_cli.commands.sample import with_scale
from diffusion_cli.denoiser import Condition, Denoiser
from diffusion_cli.errors import ConfigError, UserError
from diffusion_cli.guidance import APG, CFG, Auto, ByClassifier, CFGZero, Guidance, Unguided
from diffusion_cli.guidance.apg import dot
from diffusion_cli.predictions import X0
from diffusion_cli.sampling import sample
from diffusion_cli.schedules import EDM, VP, Flow, Schedule, over_pictures

CLASSES, SHAPE = 3, (1, 2, 2)
MEANS = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # of the classes
SPREAD, SHARES = 0.5, f64(0.2, 0.3, 0.5)
TIMES = [0.1, 0.5, 0.9]
LABELS = torch.tensor([0, 1, 2, 1, 0])
TOLD = Condition(LABELS, torch.full_like(LABELS, CLASSES))
families = pytest.mark.parametrize("schedule", FAMILIES, ids=name)


def each_class(coefficient: Tensor, x: Tensor) -> Tensor:
    """[] or [B] -> a shape that multiplies [B, classes, C, H, W]."""
    return over_pictures(coefficient, x[:, None])


def log_joint(schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    """log p(x_t, y) [B, classes], up to a constant."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    away = x[:, None] - each_class(alpha, x) * MEANS  # [B, classes, C, H, W]
    variance = ((alpha * SPREAD) ** 2 + sigma**2)[..., None]
    return torch.log(SHARES) - away.flatten(2).square().sum(2) / (2 * variance)


class Exact(Denoiser):
    """E[x0 | x_t, label], over all classes for the null label; counts the pictures of each call."""

    def __init__(self, schedule: Schedule, classes: int = CLASSES):
        nn.Module.__init__(self)
        self.schedule = schedule
        self.network = SimpleNamespace(num_classes=classes, text_width=0, told=classes > 0)  # type: ignore[assignment]
        self.rows: list[int] = []
        self.hints: list[Tensor | None] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, hint: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        self.hints.append(hint)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        gain = each_class(alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + sigma**2), x)
        each = MEANS + gain * (x[:, None] - each_class(alpha, x) * MEANS)  # [B, classes, C, H, W]
        share = torch.softmax(log_joint(self.schedule, x, t), 1)  # [B, classes]
        if cond is not None:
            one = torch.eye(CLASSES + 1, dtype=x.dtype)[cond][:, :CLASSES]
            share = torch.where((cond == CLASSES)[:, None], share, one)
        return (share[:, :, None, None, None] * each).sum(1)


class ExactClassifier(nn.Module):
    def forward(self, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        return log_joint(schedule, x, t)


class Timed(ExactClassifier):
    """Another one, whose gradient needs t itself."""

    def forward(self, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        return t * super().forward(x, t, schedule)


def noised(schedule: Schedule, t: Tensor, seed: int = 0) -> Tensor:
    """[5, C, H, W] float64 of about the right scale."""
    x = torch.randn(len(LABELS), *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return over_pictures(torch.sqrt(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2), x) * x


def velocity(schedule: Schedule, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    d_alpha, d_sigma = schedule.velocity(t)
    return d_alpha * x0 + d_sigma * (x - schedule.alpha(t) * x0) / schedule.sigma(t)


def ask(guidance: Guidance, schedule: Schedule, helper: nn.Module | None = None) -> tuple[Callable[..., Tensor], Exact]:
    denoiser = Exact(schedule)
    return guidance.guide(denoiser, TOLD, helper), denoiser


# -- the formulas ------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("t", f64(*TIMES), ids=TIMES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_cfg_is_the_formula(scale: float, t: Tensor, schedule: Schedule) -> None:
    question, denoiser = ask(CFG(scale), schedule)
    x = noised(schedule, t)
    told, untold = Exact(schedule)(x, t, LABELS), Exact(schedule)(x, t)
    close(question(x, t), untold + scale * (told - untold), 1e-12)
    assert denoiser.rows == [2 * len(x)], "one call, twice the pictures"


@families
@pytest.mark.parametrize("t", f64(*TIMES), ids=TIMES)
def test_an_exact_classifier_makes_the_denoiser_of_the_class(t: Tensor, schedule: Schedule) -> None:
    """Bayes' rule: at scale 1 the denoiser that is told nothing becomes that of the class."""
    denoiser = Exact(schedule, classes=0)
    x = noised(schedule, t)
    question = ByClassifier(1.0, ckpt="any").guide(denoiser, TOLD, ExactClassifier())
    close(question(x, t, None), Exact(schedule)(x, t, LABELS), 1e-8)
    close(ByClassifier(0.0, ckpt="any").guide(denoiser, TOLD, ExactClassifier())(x, t, None), denoiser(x, t), 0)
    twice = ByClassifier(2.0, ckpt="any").guide(denoiser, TOLD, ExactClassifier())(x, t, None)
    close(twice - denoiser(x, t), 2 * (question(x, t, None) - denoiser(x, t)), 1e-8)


def test_a_classifier_guides_where_gradients_are_off_and_not_where_nothing_can_be_seen() -> None:
    question, _ = ask(ByClassifier(1.0, ckpt="any"), Flow(), Timed())
    wanted = question(noised(Flow(), f64(0.5)[0]), f64(0.5)[0])
    with torch.inference_mode():
        t = f64(0.5)[0]  # tensors of inference mode, as while sampling
        question, _ = ask(ByClassifier(1.0, ckpt="any"), Flow(), Timed())
        close(question(noised(Flow(), t), t), wanted, 0)
        assert not question(noised(Flow(), t), t).requires_grad
        end = torch.ones((), dtype=torch.float64)  # alpha = 0
        close(question(noised(Flow(), end), end), Exact(Flow())(noised(Flow(), end), end, LABELS), 0)


@families
@pytest.mark.parametrize("t", f64(*TIMES), ids=TIMES)
def test_apg_without_its_three_changes_is_cfg(t: Tensor, schedule: Schedule) -> None:
    x = noised(schedule, t)
    close(ask(APG(4.0, parallel=1.0), schedule)[0](x, t), ask(CFG(4.0), schedule)[0](x, t), 1e-12)


@families
def test_apg_step_by_step(schedule: Schedule) -> None:
    """Two questions of one walk: momentum, then the length, then what is across."""
    t, s = f64(0.8, 0.6)
    x, y = noised(schedule, t), noised(schedule, s, seed=1)
    exact = Exact(schedule)
    d1 = exact(x, t, LABELS) - exact(x, t)
    d2 = exact(y, s, LABELS) - exact(y, s) - 0.5 * d1
    length = float(d2.flatten(1).norm(dim=1).median())  # some are longer, some shorter
    question, _ = ask(APG(3.0, parallel=0.25, threshold=length, momentum=-0.5), schedule)
    question(x, t)
    got, told = question(y, s), exact(y, s, LABELS)
    for i in range(len(y)):
        d, unit = d2[i] * min(1, length / float(d2[i].norm())), told[i] / told[i].norm()
        along = (d * unit).sum() * unit
        close(got[i], told[i] + 2 * (d - along + 0.25 * along), 1e-12)
    assert (got - told).flatten(1).norm(dim=1).max() <= 2 * length + 1e-12
    fresh, _ = ask(APG(3.0, parallel=0.25, threshold=length, momentum=-0.5), schedule)
    assert (fresh(y, s) - got).abs().max() > 1e-4, "another walk remembers nothing"
    across = ask(APG(3.0), schedule)[0](y, s) - told
    close(dot(across, told), torch.zeros(()), 1e-10)


@families
@pytest.mark.parametrize("t", f64(*TIMES), ids=TIMES)
def test_rescale(t: Tensor, schedule: Schedule) -> None:
    x = noised(schedule, t)
    guided, told = ask(CFG(5.0), schedule)[0](x, t), Exact(schedule)(x, t, LABELS)
    whole = ask(CFG(5.0, rescale=1.0), schedule)[0](x, t)
    close(whole.flatten(1).std(1), told.flatten(1).std(1), 1e-10)
    close(ask(CFG(5.0, rescale=0.7), schedule)[0](x, t), 0.7 * whole + 0.3 * guided, 1e-12)
    close(ask(CFG(5.0, rescale=0.0), schedule)[0](x, t), guided, 0)


@families
@pytest.mark.parametrize("t", f64(*TIMES), ids=TIMES)
def test_autoguidance_is_the_formula(t: Tensor, schedule: Schedule) -> None:
    """A worse model that is told nothing: then it is classifier-free guidance."""
    question, denoiser = ask(Auto(2.5, ckpt="any"), schedule, Exact(schedule, classes=0))
    x = noised(schedule, t)
    close(question(x, t), ask(CFG(2.5), schedule)[0](x, t), 1e-12)
    assert denoiser.rows == [len(x)]


@families
@pytest.mark.parametrize("other", FAMILIES, ids=name)
def test_a_helper_of_another_schedule_is_asked_at_the_same_noise(other: Schedule, schedule: Schedule) -> None:
    """An exact denoiser answers the same on every schedule, so guiding against it changes nothing, whatever the scale."""
    t = schedule.t_of_log_snr(f64(0.7)[0])  # within all of them
    question, _ = ask(Auto(50.0, ckpt="any"), schedule, Exact(other))
    x = noised(schedule, t)
    close(question(x, t), Exact(schedule)(x, t, LABELS), 1e-7)


@pytest.mark.parametrize("t", f64(*TIMES), ids=TIMES)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_cfg_zero_star_on_the_straight_line(scale: float, t: Tensor) -> None:
    """As the paper writes it, on velocities noise - x0."""
    x = noised(Flow(), t)
    as_velocity = lambda x0: (x - x0) / t  # noise - x0 where x = (1 - t) x0 + t noise  # noqa: E731
    told, untold = as_velocity(Exact(Flow())(x, t, LABELS)), as_velocity(Exact(Flow())(x, t))
    got = as_velocity(ask(CFGZero(scale, zero_init=0), Flow())[0](x, t))
    for i in range(len(x)):
        s = (told[i] * untold[i]).sum() / untold[i].square().sum()
        close(got[i], (1 - scale) * s * untold[i] + scale * told[i], 1e-10)


@families
def test_cfg_zero_star_does_not_depend_on_how_fast_time_runs(schedule: Schedule) -> None:
    """The scaled velocity lies along the told one's projection on every schedule: what is left is across the untold one."""
    t = f64(0.5)[0]
    x = noised(schedule, t)
    question, _ = ask(CFGZero(2.0, zero_init=0), schedule)
    told, untold = (velocity(schedule, x, x0, t) for x0 in (Exact(schedule)(x, t, LABELS), Exact(schedule)(x, t)))
    got = velocity(schedule, x, question(x, t), t)
    scale = float(told.abs().max()) ** 2
    close(dot(got - told, untold) / scale, torch.zeros(()), 1e-9)


@families
def test_cfg_zero_star_rests_at_the_start(schedule: Schedule) -> None:
    question, denoiser = ask(CFGZero(2.0, zero_init=0.04), schedule)
    for t in f64(1.0, 0.961):
        x = noised(schedule, t)
        size = velocity(schedule, x, torch.zeros_like(x), t).abs().max()
        close(velocity(schedule, x, question(x, t), t) / size, torch.zeros(()), 1e-9)
    assert denoiser.rows == [], "it asks nothing there"
    question(noised(schedule, f64(0.96)[0]), f64(0.96)[0])
    assert denoiser.rows == [2 * len(LABELS)]
    if isinstance(schedule, Flow | EDM):  # where a move is Euler's in the very curve
        x = noised(schedule, f64(1.0)[0])
        close(schedule.transfer(x, question(x, f64(1.0)[0]), *f64(1.0, 0.9)), x, 1e-10)


# -- where it does nothing, it costs nothing ---------------------------------------------------------------------------

LABEL_FREE = [CFG(1.0), CFG(1.0, rescale=0.7), APG(1.0, momentum=0.5), CFGZero(1.0)]
OTHERS = [CFG(3.0), CFG(3.0, rescale=0.7), APG(3.0, threshold=0.5, momentum=-0.5), CFGZero(3.0)]
every = pytest.mark.parametrize("guidance", OTHERS, ids=["cfg", "rescaled", "apg", "cfg_zero"])


@pytest.mark.parametrize("guidance", LABEL_FREE, ids=["cfg", "rescaled", "apg", "cfg_zero"])
@pytest.mark.parametrize("t", f64(0.3, 1.0), ids=["0.3", "1"])
def test_scale_1_is_the_told_network_bit_for_bit(t: Tensor, guidance: Guidance) -> None:
    question, denoiser = ask(guidance, Flow())
    x = noised(Flow(), t)
    assert torch.equal(question(x, t), Unguided().guide(Exact(Flow()), TOLD)(x, t, None))
    assert denoiser.rows == [len(x)]


@every
def test_interval_edges(guidance: CFG) -> None:
    """(low, high] of sigma / alpha, which is t / (1 - t) here: 1 at 0.5 and 3 at 0.75."""
    bound = replace(guidance, interval=(1.0, 3.0), **({"zero_init": 0.0} if isinstance(guidance, CFGZero) else {}))
    for t, pictures in ((0.25, 5), (0.5, 5), (0.5000001, 10), (0.75, 10), (0.7500001, 5), (1.0, 5)):
        question, denoiser = ask(bound, Flow())
        got = question(noised(Flow(), f64(t)[0]), f64(t)[0])
        assert denoiser.rows == [pictures], t
        if pictures == 5:
            assert torch.equal(got, Exact(Flow())(noised(Flow(), f64(t)[0]), f64(t)[0], LABELS))
    endless, denoiser = ask(replace(bound, interval=(1.0, None)), Flow())
    endless(noised(Flow(), f64(1.0)[0]), f64(1.0)[0])
    assert denoiser.rows == [10]
    with pytest.raises(ValueError, match="must be below the second"):
        replace(guidance, interval=(3.0, 1.0))


def test_helpers_have_intervals_too() -> None:
    t = f64(0.9)[0]
    x, worse = noised(Flow(), t), Exact(Flow(), classes=0)
    question, _ = ask(Auto(2.0, (0.1, 3.0), ckpt="any"), Flow(), worse)
    assert torch.equal(question(x, t), Exact(Flow())(x, t, LABELS)) and worse.rows == [], "the worse one is not asked"
    question, _ = ask(ByClassifier(2.0, (0.1, 3.0), ckpt="any"), Flow(), ExactClassifier())
    assert torch.equal(question(x, t), Exact(Flow())(x, t, LABELS))


@pytest.mark.parametrize(("guidance", "helper"), [*((g, None) for g in OTHERS), (Auto(3.0, ckpt="any"), Exact(VP())),
                         (ByClassifier(2.0, ckpt="any"), ExactClassifier())], ids=str)  # fmt: skip
def test_no_picture_depends_on_the_others(guidance: Guidance, helper: nn.Module | None) -> None:
    times = f64(0.8, 0.6)
    x = [noised(Flow(), t, seed) for seed, t in enumerate(times)]
    whole, _ = ask(guidance, Flow(), helper)
    together = [whole(z, t) for z, t in zip(x, times, strict=True)]
    for i in range(len(LABELS)):
        alone = guidance.guide(Exact(Flow()), Condition(*(c[i : i + 1] for c in TOLD)), helper)
        for z, t, wanted in zip(x, times, together, strict=True):
            close(alone(z[i : i + 1], t, None), wanted[i : i + 1], 1e-12)


@pytest.mark.parametrize(("guidance", "helper"), [*((g, None) for g in OTHERS), (Auto(3.0, ckpt="any"), Exact(VP())),
                         (ByClassifier(2.0, ckpt="any"), ExactClassifier())], ids=str)  # fmt: skip
@pytest.mark.parametrize("interval", [None, (0.2, 3.0)], ids=["everywhere", "interval"])
def test_each_picture_may_have_a_time_of_its_own(
    interval: tuple[float, float] | None, guidance: CFG, helper: nn.Module | None
) -> None:
    """t [B], as samplers ask whose steps differ from picture to picture: inside the interval, outside, at the end."""
    bound, t = replace(guidance, interval=interval), f64(1.0, 0.97, 0.6, 0.4, 0.1)
    x = torch.cat([noised(Flow(), one, seed)[:1] for seed, one in enumerate(t)])
    together = bound.guide(Exact(Flow()), TOLD, helper)(x, t, None)
    for i in range(len(t)):
        alone = bound.guide(Exact(Flow()), Condition(*(c[i : i + 1] for c in TOLD)), helper)(x[i : i + 1], t[i], None)
        close(together[i : i + 1], alone, 1e-12)


@every
def test_both_halves_have_the_same_hint(guidance: Guidance) -> None:
    question, denoiser = ask(guidance, Flow())
    t = f64(0.5)[0]
    x = noised(Flow(), t)
    question(x, t, 2 * x)
    assert denoiser.hints[0] is not None and torch.equal(denoiser.hints[0], torch.cat([2 * x, 2 * x]))


# -- what cannot be ----------------------------------------------------------------------------------------------------


@every
def test_a_network_without_labels_or_without_a_null_label_is_refused(guidance: Guidance) -> None:
    with pytest.raises(ValueError, match="is told no labels"):
        guidance.check(Exact(Flow(), classes=0), null_taught=True)
    with pytest.raises(ValueError, match="label_dropout=0 "):
        guidance.check(Exact(Flow()), null_taught=False)
    guidance.check(Exact(Flow()), null_taught=True)


def test_a_second_model_is_named() -> None:
    for make in (Auto, ByClassifier):
        with pytest.raises(ValueError, match=r"guidance\.ckpt="):
            make()
    assert Auto(step=300).helper().step == 300 and Auto(weights="raw").helper().ckpt is None
    with pytest.raises(ValueError, match="momentum is 1:"):
        APG(momentum=1.0)


def test_a_real_denoiser_is_asked_with_its_own_null_label() -> None:
    """The stub above follows the contract: one small network, told and untold by hand."""
    from diffusion_cli.models import UNet

    torch.manual_seed(0)
    network = UNet(1, 8, 3, width=8, multipliers=(1,), blocks=1, attention_levels=(), groups=4).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        denoiser, x, t = Denoiser(network, X0(Flow())), torch.randn(2, 1, 8, 8), torch.tensor(0.5)
        told, untold = denoiser(x, t, torch.tensor([0, 2])), denoiser(x, t)
        got = CFG(3.0).guide(denoiser, denoiser.condition(torch.tensor([0, 2])))(x, t, None)
    assert (told - untold).abs().max() > 1e-3
    close(got, untold + 3 * (told - untold), 1e-5)


# -- through the commands ----------------------------------------------------------------------------------------------

LEARN = ("trainer.steps=20", "trainer.save_every=10", "trainer.report_every=20", "optimizer.lr=3e-3")
TINY_CLASSIFIER = ("objective=classifying", "model=classifier", "model.width=8", "model.groups=4", "model.multipliers=[1]",
                   "model.attention_levels=[]", "model.head_width=8")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """labelled, plain (told nothing), never (its labels were never hidden), wide (other pictures), and two classifiers."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, *LEARN, "dataset.labels=true", name="labelled")
    train(folder, *LEARN, name="plain")
    train(folder, "dataset.labels=true", "objective.label_dropout=0", name="never")
    train(folder, "dataset.size=16", name="wide")
    train(folder, *LEARN, "dataset.labels=true", *TINY_CLASSIFIER, name="classifier")
    train(folder, "dataset.labels=true", "dataset.size=16", *TINY_CLASSIFIER, name="wide_classifier")
    return folder


def sampled(run: Path, out: Path, *words: str) -> Path:
    given = [f"ckpt={run}", "n=4", "batch=4", "device=cpu", "sampler.steps=4", f"out={out}", *words]
    merged = {word.partition("=")[0]: word for word in with_scale(given)}
    return sample(config.check_sample(compose(*merged.values(), primary="sample")))


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)


WAYS = {
    "2": ("guidance=2",),
    "cfg": ("guidance=cfg", "guidance.scale=4", "guidance.rescale=0.7", "guidance.interval=[0.2,null]"),
    "apg": ("guidance=apg", "guidance.momentum=-0.5", "guidance.threshold=2"),
    "cfg_zero": ("guidance=cfg_zero",),
    "auto, another run": ("guidance=auto", "guidance.ckpt={runs}/plain"),
    "auto, earlier": ("guidance=auto", "guidance.step=10"),
    "auto, raw": ("guidance=auto", "guidance.weights=raw", "guidance.scale=5"),
    "classifier": ("guidance=classifier", "guidance.ckpt={runs}/classifier", "guidance.scale=3"),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_guidance_changes_the_pictures_and_is_recorded(way: str, runs: Path, tmp_path: Path) -> None:
    words = [word.replace("{runs}", str(runs)) for word in WAYS[way]]
    folder = sampled(runs / "labelled", tmp_path / "guided", *words)
    plain = sampled(runs / "labelled", tmp_path / "plain")
    assert np.abs(pixels(folder) - pixels(plain)).max() > 0
    facts = json.loads((folder / "metadata.json").read_text())
    assert facts["guidance"]["_target_"].startswith("diffusion_cli.guidance.")
    assert (facts["guidance_checkpoint"] is not None) == ("auto" in way or way == "classifier")
    ones = sampled(runs / "labelled", tmp_path / "ones", *words, "batch=1")
    assert np.abs(pixels(ones) - pixels(folder)).max() <= 1, "picture i is the same at any batch"


def test_a_number_is_short_for_cfg(runs: Path, tmp_path: Path) -> None:
    short = sampled(runs / "labelled", tmp_path / "short", "guidance=2.5", "label=3")
    long = sampled(runs / "labelled", tmp_path / "long", "guidance=cfg", "guidance.scale=2.5", "label=3")
    assert np.array_equal(pixels(short), pixels(long))
    assert with_scale(["guidance=2", "n=4"]) == ["guidance=cfg", "guidance.scale=2", "n=4"]
    assert with_scale(["-m", "guidance=1,2.5"]) == ["-m", "guidance=cfg", "guidance.scale=1,2.5"]
    for word in ("guidance=cfg", "guidance=cfg,auto", "guidance.scale=2", "guidance=-2"):
        assert with_scale([word]) == [word]


def test_a_network_that_is_told_nothing_is_guided_by_a_classifier(runs: Path, tmp_path: Path) -> None:
    words = ("guidance=classifier", f"guidance.ckpt={runs}/classifier", "guidance.scale=5")
    three, four = (sampled(runs / "plain", tmp_path / k, *words, f"label={k}") for k in "34")
    assert np.abs(pixels(three) - pixels(four)).max() > 0
    labels = [json.loads(Image.open(path).text["diffusion"])["label"] for path in sorted(three.glob("0*.png"))]
    assert labels == [3] * 4


@pytest.mark.parametrize(("run", "words", "said"), [
    ("plain", "guidance=2", "guidance: this network is told no labels"),
    ("never", "guidance=2", "objective.label_dropout=0 and never learned"),
    ("labelled", "guidance=auto", "guidance: a worse model is needed"),
    ("labelled", "guidance=auto guidance.step=11", "has no such checkpoint; there is 10, 20"),
    ("labelled", "guidance=auto guidance.step=20", "would ask the very model that it guides"),
    ("labelled", "guidance=auto guidance.ckpt={runs}/labelled", "would ask the very model that it guides"),
    ("labelled", "guidance=auto guidance.ckpt={runs}/wide", "image_size is 16 there and 8 in this run"),
    ("labelled", "guidance=auto guidance.ckpt={runs}/labeled", r"guidance\.ckpt=.* does not exist: did you mean"),
    ("labelled", "guidance=auto guidance.ckpt={runs}/classifier", "is no denoiser but a classifier"),
    ("plain", "guidance=auto guidance.ckpt={runs}/labelled", "is told labels, and this run is not"),
    ("labelled", "guidance=classifier", "a classifier run is needed"),
    ("labelled", "guidance=classifier guidance.ckpt={runs}/labelled", "is no classifier but a denoiser: train"),
    ("labelled", "guidance=classifier guidance.ckpt={runs}/wide_classifier", "image_size is 16 there and 8 in this run"),
    ("classifier", "", "is no denoiser but a classifier: it makes no pictures"),
    ("labelled", "guidance=cfg guidance.interval=[3,1]", "must be below the second"),
    ("labelled", "guidance=cfg guidance.scale=-1", "guidance.scale is -1"),
])  # fmt: skip
def test_what_cannot_be_guided_is_said_in_one_line(run: str, words: str, said: str, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        sampled(runs / run, tmp_path / "out", *words.replace("{runs}", str(runs)).split())
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_helper_of_other_classes_is_refused(runs: Path, tmp_path: Path) -> None:
    run = train(tmp_path, "dataset.labels=true", *TINY_CLASSIFIER, name="other")
    found = checkpoint.load(run / "checkpoints" / "step_00000004")
    renamed = {**found.config, "facts": {**found.config["facts"], "classes": list("abcdefghij")}}
    tensors = {name: found.tensors(name) for name in ("weights", "average")}
    checkpoint.save(tmp_path / "renamed" / "checkpoints", 1, tensors, renamed, found.state)
    with pytest.raises(ConfigError, match=r"knows the classes a, b, c ... \(10\), and this run 0, 1, 2"):
        sampled(runs / "labelled", tmp_path / "out", "guidance=classifier", f"guidance.ckpt={tmp_path}/renamed")


@pytest.mark.parametrize(
    ("word", "labels"), [("all", list(range(10)) + [0, 1]), ("[3,5]", [3, 5] * 6), ("null", [*range(10), 0, 1])]
)
def test_labels_in_turn_and_rows_of_the_grid(word: str, labels: list[int], runs: Path, tmp_path: Path) -> None:
    """Picture i has label i of the list around and around, so that more pictures change none; the grid has a row of each."""
    folder = sampled(runs / "labelled", tmp_path / "12", f"label={word}", "n=12")
    found = [json.loads(Image.open(path).text["diffusion"])["label"] for path in sorted(folder.glob("0*.png"))]
    assert found == labels
    few = sampled(runs / "labelled", tmp_path / "4", f"label={word}", "n=4")
    assert np.abs(pixels(few) - pixels(folder)[:4]).max() <= 1
    assert json.loads((folder / "metadata.json").read_text())["label"] == {"all": "all", "[3,5]": [3, 5], "null": None}[word]
    tall = Image.open(folder / "grid.png")
    assert (tall.height > 2 * tall.width) == (word == "all"), "ten rows of one or two"
    if word == "[3,5]":
        assert tall.width > 2 * tall.height
    with pytest.raises(ConfigError, match=r"label=11: "):
        sampled(runs / "labelled", tmp_path / "no", "label=[3,11]")


def test_previews_are_guided(tmp_path: Path) -> None:
    shown = {}
    for word in ("none", "cfg"):
        run = train(tmp_path, "dataset.labels=true", "trainer.steps=10", f"guidance={word}", name=word)
        shown[word] = np.asarray(Image.open(run / "samples" / "samples_00000010.png")).astype(int)
    assert np.abs(shown["cfg"] - shown["none"]).max() > 0
    for words, said in (
        (("guidance=cfg",), "is told no labels"),
        (("guidance=auto", "guidance.step=1"), "cannot ask a second"),
    ):
        with pytest.raises(ConfigError, match=f"objective: .*{said}"):
            train(tmp_path, *words, name="refused")
