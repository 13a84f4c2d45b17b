"""Runs of a second: a network of ten thousand weights on forty digits, composed by Hydra as the command composes it."""

import contextlib
import copy
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from diffusion_cli import config

SMALL_NETWORK = ("model.width=8", "model.groups=4", "model.multipliers=[1]")
SMALL = (
    "dataset.limit=40", "dataset.labels=false", "seed=0", "trainer.batch=8", "trainer.steps=4", "trainer.preview=4",
    "trainer.report_every=1",
    "trainer.preview_every=0", "trainer.evaluate_every=0", "trainer.save_every=2", "sampler.steps=2", "device=cpu",
)  # fmt: skip


def compose(*words: str, primary: str = "train") -> dict[str, Any]:
    """The plain config of a command line, references resolved."""
    return copy.deepcopy(_composed(primary, words))


@functools.cache
def _composed(primary: str, words: tuple[str, ...]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        return config.plain(hydra.compose(primary, list(words)))


def changed(node: dict[str, Any], *words: str) -> dict[str, Any]:
    """The same config with other values: for many configs that differ little, without composing each."""
    node = copy.deepcopy(node)
    for word in words:
        path, _, value = word.partition("=")
        *folders, key = path.split(".")
        place = node
        for folder in folders:
            place = place[folder]
        assert key in place, word
        place[key] = yaml.safe_load(value)
    return node


def words(outputs: Path, *more: str, name: str = "run") -> list[str]:
    """A command line of a tiny run in that folder; later words win."""
    merged: dict[str, str] = {}
    for word in (*SMALL, *SMALL_NETWORK, f"outputs={outputs}", f"name={name}", *more):
        merged[word.partition("=")[0]] = word
    return [word for word in merged.values() if not word.endswith("=DEFAULT")]


def train(outputs: Path, *more: str, name: str = "run") -> Path:
    """Trains a tiny run here and now, and returns its folder."""
    from diffusion_cli.training import train

    line = words(outputs, *more, name=name)
    train(config.planned(compose(*line), line))
    return outputs / name


def figures(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl, line by line, without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in rows]


def hashes(run: Path, step: int | None = None) -> dict[str, str]:
    """The SHA-256 of every file of tensors of a checkpoint, the newest if no step is given."""
    folders = sorted((run / "checkpoints").glob("step_*"))
    folder = folders[-1] if step is None else run / "checkpoints" / f"step_{step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    found = {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}
    return found | {"step": folder.name}


@contextlib.contextmanager
def after_step(stop: int, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` once, right after that step of training."""
    from diffusion_cli.trainer import Trainer

    original = Trainer.step

    def step(self: Trainer, batch: object) -> None:
        original(self, batch)
        if self.progress.step == stop:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        yield


def stopped(outputs: Path, step: int, *more: str, number: int = signal.SIGTERM, name: str = "run") -> None:
    """Trains until a real signal arrives at that step."""
    from diffusion_cli.errors import Stopped

    with after_step(step, lambda: signal.raise_signal(number)), pytest.raises(Stopped) as caught:
        train(outputs, *more, name=name)
    assert caught.value.code == 128 + number


def in_child(work: Callable[[], object]) -> int:
    """Runs in a forked process, which ends without cleaning up; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            signal.alarm(0)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
