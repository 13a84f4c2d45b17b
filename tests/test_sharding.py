"""distributed=fsdp: two processes hold a half each, and train, save and judge what one process does."""

import contextlib
import copy
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from test_distributed_training import QUICK, at_step, equal, said, together, watched_step
from test_models import OPTIONS, READERS, make
from torch.distributed.device_mesh import init_device_mesh

from diffusion_cli import config
from diffusion_cli.collectives import local
from diffusion_cli.errors import ConfigError
from diffusion_cli.sharding import shard
from diffusion_cli.trainer import Trainer

FSDP = "distributed=fsdp"
WORDS = (*QUICK, "trainer.accumulate=2", "objective.self_conditioning=0.5", "optimizer.clip=0.5", "trainer.best=evaluate/x0_mse",
         "trainer.evaluate_every=2", "trainer.preview_every=4")  # fmt: skip


def held(trainer: Trainer) -> int:
    """Bytes of weights, gradients, the optimizer's state and the average on this process."""
    gradients = [weight.grad for weight in trainer.parameters if weight.grad is not None]
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    there = local([*trainer.parameters, *gradients, *states, *trainer.shadow.parameters()])
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in there}
    return sum(storages.values())  # each once: the gradients of a block share one


def weighed() -> Any:
    """Prints what is held in the midst of the last step."""

    def act(trainer: Trainer, batch: Any) -> None:
        norm = trainer.guard.norm

        def told(weights: list[torch.Tensor]) -> torch.Tensor:
            print(f"HELD {held(trainer)}", flush=True)
            return norm(weights)

        if trainer.progress.step == 3:
            trainer.guard.norm = told

    return watched_step(act)


def taken_back(run: Path, to: Path, step: int = 2) -> None:
    """A copy of the run as it was at that step."""
    shutil.copytree(run, to)
    for folder in sorted((to / "checkpoints").glob("step_*"))[step:]:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of two processes, with what they said."""
    folder = tmp_path_factory.mktemp("sharded")
    assert together(folder, *WORDS, FSDP, at=lambda rank: weighed()) == [0, 0], said(folder)
    return folder


def test_two_halves_are_one(sharded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Weights, averages and optimizer within rounding, figures and pictures too; each holds half of it all, step by step."""
    with weighed():
        one = tiny.train(tmp_path, *WORDS)
    equal(one, sharded / "run")
    assert tiny.figures(one)[-1].keys() == tiny.figures(sharded / "run")[-1].keys()
    for mine, theirs in zip(tiny.figures(one), tiny.figures(sharded / "run"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4)
    drawn = lambda run: sorted(path.name for path in (run / "samples").iterdir())  # noqa: E731
    assert drawn(one) == drawn(sharded / "run") != []
    (whole,) = (int(held) for held in re.findall(r"HELD (\d+)", capfd.readouterr().out))
    halves = [int(held) for held in re.findall(r"HELD (\d+)", said(sharded))]
    assert len(halves) == 2 and max(halves) < 0.55 * whole, (halves, whole)
