"""The power-function average is the integral that it is named for, and any other length comes of snapshots of two."""

import math
from pathlib import Path

import pytest
import torch
from tiny import compose, stopped, train
from torch import nn

from diffusion_cli import averages, checkpoint, config
from diffusion_cli.averages import combination
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.ema import Power, exponent, update
from diffusion_cli.errors import ConfigError, StorageError
from diffusion_cli.finding import find, load_denoiser, plain_weights
from diffusion_cli.pace import Pace

BASE = ("ema=power", "ema.every=4", "trainer.steps=40", "trainer.save_every=20", "optimizer.lr=0.01")


@pytest.mark.parametrize("length", [0.03, 0.05, 0.1, 0.2, 0.28])
def test_length_is_the_standard_deviation_of_the_weights(length: float) -> None:
    """Of tau^gamma on (0, 1), by numbers; 0.05 is gamma 16.97 and 0.1 is 6.94 in the paper's section 3.1."""
    gamma = exponent(length)
    tau = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    p = (gamma + 1) * tau**gamma / 10**6
    mean = (p * tau).sum()
    assert float((p * (tau - mean) ** 2).sum().sqrt()) == pytest.approx(length, rel=1e-6)


def test_exponents_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005) and exponent(0.1) == pytest.approx(6.94, abs=0.005)


def trail(steps: int) -> torch.Tensor:
    """[steps, 8] float64: weights that wander: a drift that slows down, and a walk."""
    torch.manual_seed(0)
    tau = torch.arange(1, steps + 1, dtype=torch.float64)[:, None] / steps
    walk = torch.randn(steps, 8, dtype=torch.float64).cumsum(0) / steps**0.5
    return 3 * tau.sqrt() * torch.randn(8, dtype=torch.float64) + walk


def tracked(path: torch.Tensor, rule: Power, batch: int = 8) -> torch.Tensor:
    """[steps, 8]: the average after each step, by the trainer's own update."""
    shadow, module = nn.Linear(8, 1, bias=False).double(), nn.Linear(8, 1, bias=False).double()
    found = []
    for n, weights in enumerate(path, 1):
        module.weight.data.copy_(weights)
        update(shadow, module, rule.beta(n - 1, Pace(batch)))
        found.append(shadow.weight.detach()[0].clone())
    return torch.stack(found)


def test_tracked_average_is_the_integral() -> None:
    """Weights constant within a step: step tau of n weighs (tau^(gamma + 1) - (tau - 1)^(gamma + 1)) / n^(gamma + 1)."""
    path = trail(60)
    g = exponent(0.1) + 1
    edges = torch.arange(61, dtype=torch.float64) ** g / 60**g
    assert float((tracked(path, Power())[-1] - tracked(path, Power(0.05, 0.1))[-1]).abs().max()) == 0
    assert float((tracked(path, Power(0.1, 0.05))[-1] - edges.diff() @ path).abs().max()) < 1e-12


@pytest.mark.parametrize("length", [0.03, 0.07, 0.08, 0.15, 0.2])
def test_reconstructed_is_the_one_that_was_tracked(length: float) -> None:
    """From snapshots of 0.05 and 0.10 at every 1/32 of 2048 steps. What is missed is at most what the profile misses, against
    the spread of the averages themselves: they differ by more than 20 times as much from each other."""
    path = trail(2048)
    kept = {known: tracked(path, Power(known, 0.3 * known)) for known in (0.05, 0.1)}
    known = [(step, one) for step in range(64, 2049, 64) for one in kept]
    x, far = combination(known, 2048, length)
    made = sum(share * kept[one][step - 1] for (step, one), share in zip(known, x, strict=True))
    right = tracked(path, Power(length, 0.3 * length))[-1]
    error = float((made - right).norm())
    assert far < 0.013 and error < 0.05 * float((right - kept[0.05 if length > 0.05 else 0.1][-1]).norm())
    assert error < 0.003 * float(right.norm())
    assert float(x.sum()) == pytest.approx(1, abs=1e-9)


def test_the_lengths_that_are_there_are_found_as_they_are() -> None:
    known = [(step, one) for step in (50, 75, 100) for one in (0.05, 0.1)]
    x, far = combination(known, 100, 0.1)
    assert far < 1e-6 and float((x - torch.tensor([0.0, 0, 0, 0, 0, 1])).abs().max()) < 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("power"), *BASE)


def test_a_run_answers_with_any_length(run: Path) -> None:
    """Near the average of that length that another run with the same seed tracks, and nearer than those that were tracked."""
    found = find(run)
    own = load_denoiser(found, 0.08).state_dict()
    other = train(run.parent, *BASE, "ema.length=0.08", name="tracked")
    right = load_denoiser(find(other), "ema").state_dict()
    off = lambda tensors: math.sqrt(sum(float((tensors[k] - right[k]).square().sum()) for k in right))  # noqa: E731
    near = off(own)
    assert near < 0.1 * min(off(load_denoiser(found, w).state_dict()) for w in ("ema", 0.1))
    assert near > 0


def test_the_tracked_lengths_are_those_of_the_checkpoint(run: Path) -> None:
    found = find(run)
    assert isinstance(found, Checkpoint)
    for weights, group in ((0.05, "average"), (0.1, "second"), ("ema", "average")):
        tensors, kept = plain_weights(found, weights), found.tensors(group)
        assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_a_snapshot_is_a_checkpoint_of_both_in_half_precision(run: Path) -> None:
    steps = [path.name for path in checkpoint.folders(run / "averages")]
    assert steps == [f"step_{step:08d}" for step in range(40, 0, -4)]
    one = checkpoint.load(run / "averages" / "step_00000040")
    assert one.run == run and sorted(one.groups()) == ["average", "second"]
    last = checkpoint.load(run / "checkpoints" / "step_00000040")
    for group in one.groups():
        for name, value in last.tensors(group).items():
            assert torch.equal(one.tensors(group)[name], value.half() if value.is_floating_point() else value)


def test_snapshots_of_a_resumed_run_are_the_same(run: Path, tmp_path: Path) -> None:
    for stop in (3, 13, 32):
        stopped(tmp_path, stop, *BASE)
    again = train(tmp_path, *BASE)
    for path in (run / "averages").iterdir():
        files = [(folder / path.name / "average.safetensors").read_bytes() for folder in (run / "averages", again / "averages")]
        assert files[0] == files[1]


def test_an_earlier_checkpoint_uses_what_was_before_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = averages.combination
    monkeypatch.setattr(averages, "combination", lambda known, *more: seen.append(known) or original(known, *more))
    plain_weights(find(run / "checkpoints" / "step_00000020"), 0.08)
    assert {images for images, _ in seen[0]} == {8 * step for step in (4, 8, 12, 16, 20)}


@pytest.mark.parametrize("weights", [1e-9, 0.29, 5.0])
def test_what_is_no_length_is_refused(weights: float, run: Path) -> None:
    with pytest.raises(ConfigError, match=r"from 0\.001 to below 0\.2887"):
        plain_weights(find(run), weights)


@pytest.mark.parametrize(("weights", "said"), [(0.01, "out of reach of 10 snapshots of 0.05 and 0.1: lengths from 0.03"),
                                               (0.285, "more snapshots")])  # fmt: skip
def test_a_length_out_of_reach_is_refused(weights: float, said: str, run: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        plain_weights(find(run), weights)


def test_what_has_no_second_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained with ema=power"):
        plain_weights(find(train(tmp_path)), 0.08)


def test_a_damaged_snapshot_is_named(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "averages" / "step_00000024" / "second.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match="step_00000024"):
        plain_weights(find(copy), 0.08)


def test_impossible_lengths_are_refused_before_anything_runs() -> None:
    for words in (("weights=0",), ("weights=-1",), ("weights=best",)):
        with pytest.raises(ConfigError, match="weights is"):
            config.check_export(compose("ckpt=x", *words, primary="export"))
    assert config.check_export(compose("ckpt=x", "weights=0.08", primary="export")).weights == 0.08
    for lengths in ((0.29, 0.1), (0.05, 0.05)):
        with pytest.raises(ValueError, match=r"two different ones below 0\.2887"):
            Power(*lengths)
