"""What runs have in common and where they differ: the columns of their table, and which way a figure is better."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_cli.report.reading import Read, Sweep

_SILENT = {"name", "outputs", "device", "resume", "preview", "trust", "dataset.path"}  # they change no run
_MOST = 12  # columns of settings: a table with more says less; the comparison of two runs has all
_LOW = re.compile(r"loss|mse|mae|error|fid|fd_|kid|mmd|bits|nll|cross_entropy|perplexity|copies")
_HIGH = re.compile(r"accuracy|precision|recall|density|coverage|per_second|inception|score|psnr|ssim|codebook")
TITLES = {
    "train/loss": "training loss",
    "speed/images_per_second": "images/s",
    "evaluate/x0_mse": "held-out error",
    "evaluate_on_train/x0_mse": "error on training pictures",
    "evaluate/cross_entropy": "held-out cross-entropy",
}


@dataclass(frozen=True)
class Column:
    """One of the table. kind: config or figure; better: -1 where less is, 1 where more is, 0 where neither."""

    key: str
    title: str
    kind: str
    better: int = 0


def figures_of(run: Read) -> dict[str, float]:
    """The last figures of training and of every evaluation, by name; of two evaluations of one name the last file's."""
    said = run.status.get("figures")
    last = said if isinstance(said, Mapping) else {tag: points[-1][1] for tag, points in run.curves.items() if _is_main(tag)}
    evaluated = {name: figure["value"] for file in run.evaluated for name, figure in file.figures.items() if "/" not in name}
    return {tag: value for tag, value in {**last, **evaluated}.items() if _is_number(value)}


def _is_main(tag: str) -> bool:
    return tag in ("train/loss", "speed/images_per_second") or (tag.startswith("evaluate") and tag.count("/") == 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def better(name: str, sweep: Sweep) -> int:
    """-1 where less of this figure is better, 1 where more is, 0 where it cannot be told."""
    if name == sweep.metric and sweep.direction:
        return -1 if sweep.direction == "minimize" else 1
    return 1 if _HIGH.search(name) else -1 if _LOW.search(name) else 0


def columns(runs: Sequence[Read], sweep: Sweep) -> list[Column]:
    """Settings in which the runs differ, those that were swept first, then their figures, that of the sweep first."""
    keys = [key for key in _varied(runs) if not _follows(key, runs)]
    keys.sort(key=lambda key: _bare(key) not in {_bare(word) for word in sweep.swept})
    settings = [Column(key, short(key), "config") for key in keys[:_MOST]]
    names = dict.fromkeys(name for run in runs for name in figures_of(run))
    ordered = sorted(names, key=lambda name: (name != sweep.metric, name.startswith("speed/")))
    return [*settings, *(Column(name, TITLES.get(name, _plain(name)), "figure", better(name, sweep)) for name in ordered)]


def _varied(runs: Sequence[Read]) -> list[str]:
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if key not in _SILENT and len({repr(config.get(key)) for config in configs}) > 1]


def _follows(key: str, runs: Sequence[Read]) -> bool:
    """Whether only some runs have this setting, all with one value: the object that has it says enough."""
    values = [repr(run.config[key]) for run in runs if key in run.config]
    return len(set(values)) == 1 and not key.endswith("_target_")


def _bare(key: str) -> str:
    return key.replace("/", ".").removesuffix("._target_")


def short(key: str) -> str:
    """optimizer.lr -> lr; schedule._target_ -> schedule."""
    return _bare(key).rpartition(".")[2]


def _plain(name: str) -> str:
    return name.removeprefix("evaluate/").replace("/", " ").replace("_", " ")


def shown(key: str, value: Any) -> str:
    """A setting as a person reads it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
