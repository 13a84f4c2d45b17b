"""Seeing what an autoencoder gets wrong by a classifier's eyes: the distance, whom it moves, and that its run is pinned."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_autoencoding import KL, NOT_OF_THE_UNET, normal, objective, pictures
from test_autoencoding import run as trained
from tiny import compose, figures, hashes, stopped, train
from torch import Tensor, nn

from diffusion_cli import config
from diffusion_cli.assembly import Facts, Stages, objective_of
from diffusion_cli.data import Batch
from diffusion_cli.data.pixels import to_float
from diffusion_cli.errors import ConfigError, UserError
from diffusion_cli.finding import find, load_codec
from diffusion_cli.losses import PatchCritic, Perceptual
from diffusion_cli.losses.critic import duel
from diffusion_cli.losses.perceptual import apart
from diffusion_cli.models import Classifier
from diffusion_cli.models.classifier import Encoder
from diffusion_cli.objectives import Autoencoding
from diffusion_cli.randomness import Source

SMALL = ("objective=classifying", "model=classifier", "model.width=8", "model.groups=4", "model.multipliers=[1,2]",
         "model.head_width=8", "model.attention_levels=[1]", "dataset.labels=true")  # fmt: skip


class Made(Classifier):
    """Two layers that are easily seen through: the picture's two channels, and their sum and difference."""

    def __init__(self) -> None:
        super().__init__(2, 2, 1)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x.mean((2, 3))

    def maps(self, x: Tensor, time: Tensor) -> list[Tensor]:
        assert time.shape == (len(x),) and not time.any()
        return [self.scale * x, torch.cat([x.sum(1, keepdim=True), x[:, :1] - x[:, 1:]], dim=1)[:, :, :1]]


def eyes() -> Perceptual:
    torch.manual_seed(3)
    return Perceptual(
        Encoder(1, 8, 10, width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,), head_width=8, groups=4), 0.7
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of two checkpoints and an autoencoder that was trained by its eyes."""
    folder = tmp_path_factory.mktemp("seen")
    train(folder, *NOT_OF_THE_UNET, *SMALL, "optimizer.lr=1e-2", name="classifier")
    trained(folder, *KL, *by(folder), "trainer.evaluate_every=2")
    return folder


def by(outputs: Path) -> tuple[str, ...]:
    return ("perceptual=classifier", f"perceptual.ckpt={outputs / 'classifier'}")


# -- the distance ------------------------------------------------------------------------------------------------------


def test_the_distance_of_a_made_up_network_is_the_formula() -> None:
    x, y = normal(3, 2, 2, 2), normal(3, 2, 2, 2, seed=1)
    wanted = np.zeros(3)
    for k in range(3):
        for rows in (2, 1):  # the first layer has both rows of places, the second one
            for i in range(rows):
                for j in range(2):
                    vectors = []
                    for a, b in ((float(p[k, 0, i, j]), float(p[k, 1, i, j])) for p in (x, y)):
                        v = np.array([a, b] if rows == 2 else [a + b, a - b])
                        vectors.append(v / np.sqrt(v @ v))
                    wanted[k] += ((vectors[0] - vectors[1]) ** 2).sum() / (rows * 2)
    found = Perceptual(Made())(y, x)
    assert found.shape == (3,) and np.abs(found.detach().numpy() - wanted).max() < 1e-6 and wanted.min() > 0.1


def test_alike_is_at_no_distance_and_loudness_says_nothing() -> None:
    x, see = normal(4, 1, 8, 8), eyes()
    assert not see(x, x).any()
    assert see(x + 0.1 * normal(4, 1, 8, 8, seed=1), x).min() > 1e-4
    maps = [normal(2, 3, 4, 4), normal(2, 5, 2, 2)]
    assert apart(maps, [7 * f for f in maps]).abs().max() < 1e-12
    dark = [torch.zeros(2, 3, 4, 4, requires_grad=True)]
    apart(dark, [normal(2, 3, 4, 4)]).sum().backward()
    assert dark[0].grad is not None and dark[0].grad.isfinite().all(), "where nothing is seen there is a gradient yet"


def test_maps_are_those_that_the_logits_come_of() -> None:
    network, x, time = eyes().network, normal(2, 1, 8, 8), torch.tensor([0.0, 500.0])
    maps = network.maps(x, time)
    assert [tuple(f.shape) for f in maps] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    assert isinstance(network, Encoder)
    logits = network.logits(network.pool(torch.nn.functional.silu(network.norm_out(maps[-1]))))
    assert torch.equal(network(x, time), logits)
    assert network.maps(normal(2, 1, 12, 12), time)[1].shape == (2, 16, 6, 6), "pictures of other sizes are seen too"


# -- in the loss -------------------------------------------------------------------------------------------------------


def made(*more: str, perceptual: Perceptual | None) -> Autoencoding:
    facts = Facts(channels=1, image_size=8, classes=[], taught=[], fingerprint="")
    found = objective_of(config.check_train(compose(*KL, *more)).node, facts, stages=Stages(perceptual=perceptual))
    assert isinstance(found, Autoencoding)
    return found


def test_it_is_added_to_the_norm_and_moves_the_autoencoder_alone() -> None:
    see, source = eyes(), Source(0, torch.arange(6))
    ours, plain = made(perceptual=see).eval(), objective(*KL).eval()
    assert ours.state_dict().keys() == plain.state_dict().keys(), "nothing of it is in the state"
    x = to_float(pictures(6).images)
    loss, tallies = ours.loss(Batch(x, None, torch.arange(6)), source)
    without, _ = plain.loss(Batch(x, None, torch.arange(6)), source)
    y = ours.network(x, source.normal("latents", (3, 4, 4))).y
    assert (loss - without - 0.7 * see(y, x)).abs().max() < 1e-6
    assert float(tallies["perceptual"].sums) == pytest.approx(float(see(y, x).detach().mean()), rel=1e-5)
    (loss - without.detach()).mean().backward()
    seen = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    assert all(p.grad is None and not p.requires_grad for p in see.parameters())
    without.mean().backward()
    differ = [name for name, p in plain.named_parameters() if p.grad is not None and not torch.allclose(p.grad, seen[name])]
    assert any("decoder" in name for name in differ) and any("encoder" in name for name in differ)
    figures = ours.evaluate(pictures(6), source, 4)
    assert figures["perceptual"] > 0 and "perceptual" not in plain.evaluate(pictures(6), source, 4)


def test_a_critic_is_weighed_against_both() -> None:
    """lambda of Esser et al. 2021, equation 7, is of the norm and the distance together."""
    words = ("objective/critic=patch", "objective.critic.width=8", "objective.critic.start=0")
    ours, see, x, source = (
        made(*words, perceptual=eyes()).eval(),
        eyes(),
        to_float(pictures(6).images),
        Source(0, torch.arange(6)),
    )
    _, tallies = ours.loss(Batch(x, None, torch.arange(6)), source)
    y = ours.network(x, source.normal("latents", (3, 4, 4))).y
    error = (y - x).abs().flatten(1).mean(1)
    wanted = duel(ours.critic, x, y, error + 0.7 * see(y, x), ours.network.last).balance
    assert isinstance(ours.rules, PatchCritic) and float(tallies["balance"].sums) == pytest.approx(float(wanted), rel=1e-4)
    assert abs(float(duel(ours.critic, x, y, error, ours.network.last).balance / wanted) - 1) > 1e-3


# -- of a run ----------------------------------------------------------------------------------------------------------


def test_the_run_goes_on_to_the_bit_without_the_classifiers_own(outputs: Path, tmp_path: Path) -> None:
    whole = outputs / "run"
    rows = figures(whole)
    assert all("train/perceptual" in row for row in rows if "train/loss" in row)
    assert "evaluate/perceptual" in set().union(*rows)
    assert find(whole).config["facts"]["perceptual"] == find(outputs / "classifier").digest
    stopped(tmp_path, 3, *NOT_OF_THE_UNET, *KL, *by(outputs), "trainer.evaluate_every=2")
    (outputs / "classifier").rename(outputs / "gone")
    try:
        parts = trained(tmp_path, *KL, *by(outputs), "trainer.evaluate_every=2")
    finally:
        (outputs / "gone").rename(outputs / "classifier")
    assert hashes(parts) == hashes(whole) and figures(parts) == rows


def test_a_batch_in_parts_and_a_plain_run(outputs: Path, tmp_path: Path) -> None:
    parts = trained(tmp_path / "parts", *KL, *by(outputs), "trainer.accumulate=2")
    plain = trained(tmp_path / "plain", *KL)
    losses = [[row["train/loss"] for row in figures(run) if "train/loss" in row] for run in (outputs / "run", parts, plain)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert all(a > b + 1e-3 for a, b in zip(losses[0], losses[2], strict=True))
    assert "perceptual" not in find(plain).config["facts"] and not (plain / "parts").exists()


def test_nobody_needs_it_who_asks(outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the codec of a denoiser, which is trained where there is no classifier; a run that begins from it has it on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    moved = shutil.copytree(outputs / "run", tmp_path / "run")
    shutil.rmtree(moved / "parts")
    assert load_codec(find(moved), "ema").shape(1, 8) == (3, 4, 4)
    run = train(tmp_path, "codec=latents", f"codec.ckpt={moved}", "trainer.steps=2", name="denoiser")
    assert [path.name for path in (run / "parts").iterdir()] == ["codec"]
    line = (*NOT_OF_THE_UNET, "dataset.labels=false", "model.groups=DEFAULT", f"init={outputs / 'run'}", "trainer.steps=2")
    begun = train(tmp_path, *line, name="begun")
    assert find(begun).config["facts"]["perceptual"] == find(outputs / "run").config["facts"]["perceptual"]


def test_another_classifier_is_refused(outputs: Path, tmp_path: Path) -> None:
    stopped(tmp_path, 3, *NOT_OF_THE_UNET, *KL, *by(outputs))
    shutil.rmtree(tmp_path / "run" / "parts" / "perceptual")
    shutil.copytree(outputs / "classifier" / "checkpoints" / "step_00000002", tmp_path / "run" / "parts" / "perceptual")
    with pytest.raises(
        ConfigError, match=r"^perceptual is not what the run began with: put back what lay at .*parts/perceptual"
    ):
        trained(tmp_path, *KL, *by(outputs))
    with pytest.raises(ConfigError, match=r"perceptual\.weight: 1\.0 in the run, 2\.0 now"):
        trained(tmp_path, *KL, *by(outputs), "perceptual.weight=2.0")


def test_what_cannot_be_is_one_line(outputs: Path, tmp_path: Path) -> None:
    for words, said in (
        (
            (*KL, "perceptual=classifier", f"perceptual.ckpt={outputs / 'run'}"),
            "is no classifier but an autoencoder: train one",
        ),
        ((*KL, "perceptual=classifier", "perceptual.ckpt=/nowhere"), "perceptual.ckpt=/nowhere does not exist"),
        (by(outputs), "perceptual=classifier: it judges what an autoencoder gives back; choose objective=autoencoding"),
        ((*KL, *by(outputs), "perceptual.weight=-1"), "perceptual.weight is -1"),
        ((*KL, "codec=latents", f"codec.ckpt={outputs / 'run'}"), "codec=latents: this objective works with pictures"),
    ):
        with pytest.raises(UserError) as caught:
            (trained if words[0] == KL[0] else train)(tmp_path, *words)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    facts = Facts(channels=3, image_size=8, classes=[], taught=[], fingerprint="")
    with pytest.raises(ConfigError, match="knows pictures of 1 channels, and these have 3; choose another"):
        Stages(perceptual=eyes()).facts(facts)
