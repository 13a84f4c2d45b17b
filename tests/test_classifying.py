"""The noise-aware classifier: what it is told, what it learns, what it reports, and what it cannot be trained on."""

from pathlib import Path

import pytest
import torch
from closed_form import FAMILIES, close, f64, name
from PIL import Image
from tiny import compose, figures, hashes, stopped, train
from torch import Tensor, nn

from diffusion_cli import config, signatures
from diffusion_cli.assembly import Facts, objective_of, rehearse
from diffusion_cli.data import Batch, Pictures
from diffusion_cli.errors import ConfigError
from diffusion_cli.evaluation.denoising import LEVELS
from diffusion_cli.models import Classifier, Encoder
from diffusion_cli.noisy_classifier import NoisyClassifier
from diffusion_cli.objectives import Classifying
from diffusion_cli.randomness import Source
from diffusion_cli.schedules import Flow, Schedule

TINY = ("objective=classifying", "model=classifier", "model.width=8", "model.groups=4", "model.multipliers=[1]",
        "model.attention_levels=[]", "model.head_width=8", "dataset.labels=true")  # fmt: skip


class Ear(Classifier):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(1, 2, 3)
        self.heard: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.heard.append((x, time))
        return torch.zeros(len(x), 3)


@pytest.mark.parametrize("schedule", FAMILIES, ids=name)
def test_it_is_told_the_same_of_the_same_noise_on_every_schedule(schedule: Schedule) -> None:
    """alpha / sigma alone: so a classifier of one schedule guides a denoiser of another."""
    x0, noise = torch.randn(2, 4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heard = []
    for one in (schedule, Flow()):
        t = one.t_of_log_snr(f64(3.0, 0.7, -0.4, -3.0))
        network = Ear()
        NoisyClassifier(network)(one.mix(x0, noise, t), t, one)
        heard.append(network.heard[0])
    close(heard[0][0], heard[1][0], 1e-9)
    ratio = torch.exp(f64(3.0, 0.7, -0.4, -3.0) / 2)[:, None, None, None]  # alpha / sigma
    close(heard[0][0], (ratio * x0 + noise) / torch.sqrt(ratio**2 + 1), 1e-9)
    close(heard[0][1], heard[1][1], 1e-6)
    network = Ear()
    NoisyClassifier(network)(x0, torch.zeros((), dtype=torch.float64), schedule)
    assert torch.equal(network.heard[0][0], x0) and not network.heard[0][1].any(), "clean pictures, as they are, at time 0"


def encoder(size: int = 8) -> Encoder:
    torch.manual_seed(0)
    return Encoder(1, size, 10, width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,), head_width=8, groups=4)


def test_the_encoder_reads_everything_and_each_picture_alone() -> None:
    network = encoder().train()
    x, time = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 300.0, 900.0])
    logits = network(x, time)
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    network.eval()
    with torch.no_grad():
        alone = torch.cat([network(x[i : i + 1], time[i : i + 1]) for i in range(3)])
        assert (network(x, time) - alone).abs().max() < 1e-5
        assert (network(x, time + 50) - network(x, time)).abs().max() > 1e-5, "the time is told"
        moved = network.pool(torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)).flip(3))
        still = network.pool(torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1)))
    assert (moved - still).abs().max() > 1e-5, "the pooling knows places"


@pytest.mark.parametrize(("words", "said"), [
    ({"multipliers": ()}, "multipliers is empty"), ({"multipliers": (1, 2, 2, 2, 2)}, "must be a multiple of 16"),
    ({"width": 12, "groups": 8}, "multiple of groups"), ({"attention_levels": (3,)}, "counted from 0"),
    ({"head_width": 24}, "choose a divisor"),
])  # fmt: skip
def test_an_encoder_that_cannot_be(words: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Encoder(1, 8, 10, **words)  # type: ignore[arg-type]


def test_the_yaml_is_its_signature() -> None:
    node = compose("objective=classifying", "model=classifier")
    facts = {"channels", "image_size", "num_classes"}
    assert set(node["model"]) - {"_target_"} == set(signatures.signature(node["model"]["_target_"]).parameters) - facts
    for size in (8, 16, 28, 32):
        rehearse(config.check_train(compose("objective=classifying", "model=classifier", f"dataset.size={size}")).node)


def objective(*more: str) -> Classifying:
    node = config.check_train(compose(*TINY, *more)).node
    facts = Facts(channels=1, image_size=8, classes=list("0123456789"), taught=list(range(10)), fingerprint="")
    made = objective_of(node, facts)
    assert isinstance(made, Classifying)
    return made


def data(count: int) -> tuple[Pictures, Batch, Source]:
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 10
    batch = Batch(images / 127.5 - 1, labels, torch.arange(count))
    return Pictures(images, labels, tuple("0123456789")), batch, Source(0, torch.arange(count))


def test_the_loss_is_cross_entropy_on_noised_pictures() -> None:
    made, (_, batch, source) = objective("loss=simple").eval(), data(32)
    loss, tallies = made.loss(batch, source)
    t = source.uniform("time")
    x = (1 - t)[:, None, None, None] * batch.x + t[:, None, None, None] * source.normal("noise", (1, 8, 8))
    logits = made.classifier(x, t, Flow())
    wanted = -torch.log_softmax(logits, 1)[torch.arange(32), batch.label]
    assert (loss - wanted).abs().max() < 1e-5
    right = (logits.argmax(1) == batch.label).float()
    assert float(tallies["accuracy"].sums) == float(right.sum()) and float(tallies["accuracy"].counts) == 32
    for tenth in range(10):
        within = ((t * 10).long() == tenth).float()
        assert float(tallies["accuracy_by_noise"].sums[tenth]) == float((right * within).sum())
        assert abs(float(tallies["loss_by_noise"].sums[tenth]) - float((wanted * within).detach().sum())) < 1e-4
    assert len(made.figure_names("loss_by_noise")) == 10


def test_times_of_the_loss_are_used_and_told() -> None:
    """Importance sampling sees the errors and corrects for what it prefers, as for a denoiser."""
    made, (_, batch, source) = objective("loss=importance", "loss.times.buckets=2", "loss.times.memory=1"), data(32)
    made.loss(batch, source)
    assert int(made.times.seen.sum()) == 32


class Knows(nn.Module):
    """Tells the label, which is written into the first pixel, as long as the noise level allows it."""

    def forward(self, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        told = ((x[:, 0, 0, 0] + 1) * 127.5).round().long().clamp(0, 9)
        return torch.where((t < 0.4)[:, None], 20.0 * nn.functional.one_hot(told, 10), 0.0)


def test_evaluation_counts_right_answers_at_each_level() -> None:
    made, (pictures, _, source) = objective(), data(25)
    pictures.images[:, 0, 0, 0] = pictures.labels.to(torch.uint8)
    pictures.images[5:10, 0, 0, 0] = 9  # five are mislabelled, but for the one that is a 9
    made.classifier = Knows()  # type: ignore[assignment]
    found = made.evaluate(pictures, source, batch=10)
    assert found["accuracy_clean"] == pytest.approx(21 / 25)
    levels = {key: value for key, value in found.items() if key.startswith("accuracy_by_log_snr/")}
    assert len(levels) == len(LEVELS)
    blind = [level for level in LEVELS if float(Flow().t_of_log_snr(torch.tensor(level))) >= 0.4]
    share = sum(int(label) == 0 for label in pictures.labels) / 25  # of equal logits, the first is taken
    assert all(levels[f"accuracy_by_log_snr/{level:+.0f}"] == pytest.approx(share) for level in blind) and len(blind) == 5
    assert found["accuracy"] == pytest.approx(sum(levels.values()) / len(LEVELS))


def test_it_trains_resumes_to_the_bit_and_shows_what_it_sees(tmp_path: Path) -> None:
    base = ("dataset.limit=0", "trainer.steps=100", "trainer.batch=64", "ema=none", "model.width=16",
            "trainer.report_every=20", "trainer.evaluate_every=20",
            "trainer.save_every=0", "trainer.evaluate=100", "optimizer.lr=5e-3", "trainer.preview=6")  # fmt: skip
    whole = train(tmp_path / "whole", *TINY, *base)
    rows = figures(whole)
    assert rows[-1]["evaluate/accuracy_clean"] > 0.2 > rows[-1]["evaluate/accuracy_by_log_snr/-8"]
    assert any("train/accuracy" in row and "accuracy_by_noise/t_0.0_to_0.1" in row for row in rows)
    assert Image.open(whole / "samples" / "recognised_00000100.png").width > 200
    stopped(tmp_path / "parts", 33, *TINY, *base)
    parts = train(tmp_path / "parts", *TINY, *base)
    assert hashes(parts) == hashes(whole) and figures(parts) == rows


def test_what_to_do_next_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, *TINY)
    assert f"guidance=classifier guidance.ckpt={run}" in capsys.readouterr().out
    train(tmp_path, *TINY)
    assert f"guidance=classifier guidance.ckpt={run}" in capsys.readouterr().out, "also of a run that is finished"
    train(tmp_path, name="denoiser")
    assert f"diffusion-sample ckpt={tmp_path / 'denoiser'} n=64" in capsys.readouterr().out


def test_it_needs_classes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective: a classifier needs classes: .*dataset\.labels=true"):
        train(tmp_path, *TINY, "dataset.labels=false")
