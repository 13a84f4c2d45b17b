"""The jobs of a sweep: each an ordinary run in a folder named after what sets it apart, outputs/<sweep>/<its values>."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from diffusion_cli.cli import folder_name
from diffusion_cli.errors import ConfigError
from diffusion_cli.settings import flat, frozen_changes
from diffusion_cli.status import status_of

# the figure that a sweep seeks when told none: held-out pictures if there are; the error of the foreseen picture at fixed noise
# levels, or the cross-entropy of a classifier
USUAL = tuple(f"{where}/{name}" for where in ("evaluate", "evaluate_on_train") for name in ("x0_mse", "cross_entropy"))

Standing = Literal["missing", "interrupted", "finished"]


@dataclass(frozen=True)
class Job:
    """number: from 0; values: what is swept, key -> text; words: the whole command line; node: its checked config."""

    number: int
    values: Mapping[str, str]
    words: tuple[str, ...]
    node: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.node["outputs"]) / self.node["name"]

    @property
    def command(self) -> str:
        """What would run this job alone."""
        alone = ["hydra.mode=RUN"] * any(word.startswith("sweep=") for word in self.words)
        return shlex.join(["diffusion-train", *alone, *self.words])


def label(values: Mapping[str, str], length: int = 100) -> str:
    """A folder's name from values; where it would be too long, its end is a hash of them all."""
    words = [f"{key}={value}" for key, value in values.items()]
    name = folder_name(words)
    if len(name) <= length:
        return name or "job"
    return f"{name[: length - 9]}-{hashlib.sha256(' '.join(words).encode()).hexdigest()[:8]}"


def labels(lists: Sequence[Mapping[str, str]]) -> list[str]:
    """One for each, all different: values that look alike in a folder's name (a/b and a-b) are told apart by a hash."""
    names = [label(values) for values in lists]
    return [
        name if names.count(name) == 1 else f"{name}-{hashlib.sha256(json.dumps(dict(values)).encode()).hexdigest()[:8]}"
        for name, values in zip(names, lists, strict=True)
    ]


def standing(job: Job) -> Standing:
    """How far the job is, by what lies in its folder. Raises ConfigError where that is a run with other settings."""
    try:
        before = yaml.safe_load((job.folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, RecursionError, yaml.YAMLError):
        return "missing"
    if not isinstance(before, dict):
        return "missing"
    now = json.loads(json.dumps(job.node))
    changes = frozen_changes(before, now) if (job.folder / "checkpoints").is_dir() else []
    if changes:
        raise ConfigError(
            f"{job.folder} is a run with other settings ({'; '.join(changes[:2])}): choose another name=, or go back to them"
        )
    finished = status_of(job.folder).get("state") == "finished" and ends(before) == ends(now)
    return "finished" if finished else "interrupted"


def ends(node: Mapping[str, Any]) -> list[object]:
    """What says how long a run is: the one part of it that may change and leaves a finished run unfinished."""
    return [node["trainer"].get(key) for key in ("steps", "images", "minutes")]


def figure(figures: Mapping[str, float], metric: str | None) -> tuple[str, float] | None:
    """(name, value) of the figure that is sought, if it is there."""
    return next(((name, figures[name]) for name in ((metric,) if metric else USUAL) if name in figures), None)


def common(lists: Iterable[Mapping[str, str]]) -> list[str]:
    """The keys that any of them has, in the order in which they come up."""
    return list(dict.fromkeys(key for values in lists for key in values))


def cell(node: Mapping[str, Any], key: str) -> str:
    """What a config says of a key, or of a group: the name of its class."""
    found = flat(node)
    value = found.get(key, found.get(f"{key.replace('/', '.')}._target_", ""))
    return "" if value is None else str(value).rpartition(".")[2] if key not in found else str(value)
