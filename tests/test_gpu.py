"""What only a GPU can show; `pytest -m gpu` on a machine with one."""

import math
from pathlib import Path

import pytest
import torch
from tiny import figures, hashes, train

from diffusion_cli.randomness import Source

pytestmark = pytest.mark.gpu
GPU = ("device=cuda", "compile=false", "trainer.report_every=5")


def test_draws_are_those_of_the_cpu() -> None:
    here, there = Source(3, torch.arange(16)), Source(3, torch.arange(16, device="cuda"))
    assert torch.equal(here.uniform("x", (3, 8, 8)), there.uniform("x", (3, 8, 8)).cpu())
    assert (here.normal("x", (3, 8, 8)) - there.normal("x", (3, 8, 8)).cpu()).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss_falls(precision: str, tmp_path: Path) -> None:
    run = train(tmp_path, *GPU, f"precision={precision}", "trainer.steps=60", "trainer.batch=32", "dataset.limit=400",
                "optimizer.lr=3e-3", "model.width=16", "model.groups=8")  # fmt: skip
    losses = [row["train/loss"] for row in figures(run) if "train/loss" in row]
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.7 * losses[0], losses


def test_first_step_is_that_of_the_cpu(tmp_path: Path) -> None:
    there = train(tmp_path, *GPU, "precision=fp32", "trainer.steps=1", "trainer.report_every=1", name="gpu")
    here = train(tmp_path, "device=cpu", "trainer.steps=1", name="cpu")
    losses = [figures(run)[0]["train/loss"] for run in (here, there)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # tf32 in the products


def test_a_compiled_network_trains(tmp_path: Path) -> None:
    run = train(tmp_path, "device=cuda", "compile=true", "precision=bf16", "trainer.steps=10", "trainer.report_every=5")
    assert math.isfinite(figures(run)[-1]["evaluate/x0_mse"])


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_repeated_step_is_the_step(compiled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures, noise, dropout and rate of each step are its own (tests/test_capture.py has the same on a CPU, to the bit)."""
    words = ("device=cuda", "precision=fp32", f"compile={compiled}", "trainer.steps=8", "trainer.report_every=1",
             "model.dropout=0.3", "trainer.accumulate=2", "dataset.labels=true")  # fmt: skip
    plain, run = (train(tmp_path, *words, f"cuda_graph={word}", name=f"graph_{word}") for word in ("false", "true"))
    assert "no CUDA graph" not in capsys.readouterr().out
    losses = [[row["train/loss"] for row in figures(one) if "train/loss" in row] for one in (plain, run)]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    train(tmp_path, *GPU, "precision=fp32", "trainer.steps=4", name="parts")
    parts = train(tmp_path, *GPU, "precision=fp32", "trainer.steps=8", name="parts")
    whole = train(tmp_path, *GPU, "precision=fp32", "trainer.steps=8", name="whole")
    losses = [figures(run)[-2]["train/loss"] for run in (parts, whole)]
    assert hashes(parts).keys() == hashes(whole).keys()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # a GPU's sums are not ordered, so not to the bit
