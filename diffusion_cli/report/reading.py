"""What lies in a run's folder, read without torch. A damaged file is one line in `problems` and never an error.

status.json  config.yaml  metrics.jsonl  samples/KIND_STEP.png  growth.gif  evaluated/*.json  generated/*/grid.png
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from diffusion_cli.errors import ConfigError
from diffusion_cli.options import named
from diffusion_cli.report.thinning import thinned
from diffusion_cli.settings import flat

_PREVIEW = re.compile(r"(\w+?)_(\d{4,})\.png")
_DEPTH = 4  # folders below the one that was named: outputs/<sweep>/<job>, and a level more on either side
_NUMBERS = {int, float}
_DEEPEST = 50  # levels of a config
_LARGEST = 5_000_000  # bytes of a config or a JSON file: more is not ours
_JSON = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 17 else float(digits))  # 10^400 is infinite
Curve = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Still:
    """One picture of a run. step: None where it is not known; frame: its place in an animation."""

    path: Path
    step: int | None = None
    frame: int = 0


@dataclass(frozen=True)
class Made:
    """A folder of diffusion-sample: its grid and how it was made."""

    name: str
    grid: Still | None
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """A file of diffusion-evaluate: {name: {"value", "error", "of"}} and how they were made."""

    name: str
    figures: Mapping[str, Mapping[str, Any]]
    made_by: Mapping[str, Any]


@dataclass(frozen=True)
class Read:
    """A run as it was found. config: flat, {"optimizer.lr": 0.001}; previews: {"samples": [...]} in the order of steps."""

    folder: Path
    name: str
    status: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    previews: Mapping[str, Sequence[Still]] = field(default_factory=dict)
    evaluated: Sequence[Evaluated] = ()
    generated: Sequence[Made] = ()
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Sweep:
    """What sweep.json says of the runs below it, where there is one. metric: a figure; direction: minimize or maximize."""

    swept: tuple[str, ...] = ()
    metric: str | None = None
    direction: str | None = None


def find(words: Sequence[str]) -> list[Path]:
    """The folders of all runs at or below these, each once, in the order of names. Raises ConfigError."""
    found: dict[Path, Path] = {}
    for word in words:
        folder = Path(word).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"{word}: there is no such folder; name a run or a folder of runs, as outputs/<name>")
        below = list(_runs(folder, _DEPTH))
        if not below:
            raise ConfigError(f"{word}: no run in it or below it (a run has a status.json)")
        found |= {path.resolve(): path for path in below if path.resolve() not in found}
    return list(found.values())


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "status.json").is_file() or (folder / "metrics.jsonl").is_file():
        yield folder
    elif depth:
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:
            return
        for path in inside:
            yield from _runs(path, depth - 1)


def sweep(folder: Path) -> Sweep:
    """The sweep of this folder; an empty one where nothing or nothing readable says."""
    problems: list[str] = []
    said = _json(folder / "sweep.json", problems) if (folder / "sweep.json").is_file() else {}
    swept = said.get("swept")
    metric, direction = said.get("metric"), said.get("direction")
    return Sweep(
        tuple(map(str, swept)) if isinstance(swept, list) else (),
        metric if isinstance(metric, str) else None,
        direction if direction in ("minimize", "maximize") else None,
    )


def read(folder: Path, name: str, points: int) -> Read:
    """The run of this folder. points: of all its curves together, about: they are thinned at once, a run may have millions."""
    if (link := _leads_out(folder)) is not None:
        return Read(
            folder, name, problems=[f"{link.relative_to(folder)}: a link that leads out of the run, so nothing is read"]
        )
    problems: list[str] = []
    status = _json(folder / "status.json", problems)
    config, text = _config(folder / "config.yaml", problems)
    return Read(
        folder,
        name,
        status,
        config,
        text,
        _thinned(_metrics(folder / "metrics.jsonl", problems), points),
        _previews(folder),
        _evaluated(folder, problems),
        _generated(folder, problems),
        problems,
    )


def _leads_out(folder: Path) -> Path | None:
    """A link among what is read that would bring something else of this machine into a page that is passed on."""
    read = ("*", "samples/*.png", "evaluated/*.json", "generated/*", "generated/*/*.json", "generated/*/grid.png")
    links = (path for pattern in read for path in folder.glob(pattern) if path.is_symlink())
    return next((path for path in links if not path.resolve().is_relative_to(folder.resolve())), None)


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"larger than {_LARGEST // 10**6} MB")
    return path.read_text(encoding="utf-8")


def _parsed(text: str) -> Any:
    return _JSON.decode(text)


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = _parsed(_text(path))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(_damaged(path, error))
        return {}
    return found


def _config(path: Path, problems: list[str]) -> tuple[dict[str, Any], str]:
    """Flat, and as it is written. Aliases are refused: a few of them can stand for more than any memory holds."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times faster
    try:
        text = _text(path)
        _check_plain(text, loader)
        node = yaml.load(text, Loader=loader)
        if not isinstance(node, dict):
            raise ValueError("not a node of settings")
        return flat(named(node)), text
    except FileNotFoundError:
        return {}, ""  # a job that failed before it began has none
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(_damaged(path, error))
        return {}, ""


def _check_plain(text: str, loader: Any) -> None:
    """Raises ValueError for aliases, and for depths at which the loader's own stack ends, and the process with it."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            raise ValueError("it has aliases" if depth <= _DEEPEST else f"deeper than {_DEEPEST} levels")


def _metrics(path: Path, problems: list[str]) -> dict[str, Curve]:
    """Every figure over the steps. A last line that was cut short is a run that still writes."""
    if not path.is_file():
        return {}
    curves: defaultdict[str, Curve] = defaultdict(list)
    damaged, last = 0, ""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                last = line
                row = _row(line)
                if row is None:
                    damaged += 1
                    continue
                step = row.pop("step")
                for tag, value in row.items():
                    if type(value) in _NUMBERS:  # and no bool; this line runs some million times
                        curves[tag].append((step, value))
    except OSError as error:
        problems.append(_damaged(path, error))
    if damaged and _row(last) is None and not last.endswith("\n"):
        damaged -= 1
    if damaged:
        problems.append(f"{path.name}: {damaged} {'line' if damaged == 1 else 'lines'} cannot be read")
    return {tag: sorted(points, key=itemgetter(0)) for tag, points in curves.items()}


def _thinned(curves: Mapping[str, Curve], points: int) -> dict[str, Curve]:
    most = max(24, min(1000, points // max(1, len(curves))))
    return {tag: thinned(curve, most) for tag, curve in curves.items()}


def _row(line: str) -> dict[str, Any] | None:
    try:
        found = _parsed(line)
    except (ValueError, RecursionError):
        return None
    right = isinstance(found, dict) and isinstance(found.get("step"), int) and found["step"] >= 0
    return found if right else None


def _previews(folder: Path) -> dict[str, list[Still]]:
    """samples_*.png and its like by kind; the frames of growth.gif where a run kept no samples."""
    found: dict[str, list[Still]] = {}
    for path in sorted((folder / "samples").glob("*.png")):
        match = _PREVIEW.fullmatch(path.name)
        if match:
            found.setdefault(match[1], []).append(Still(path, int(match[2])))
    if "samples" not in found and (folder / "growth.gif").is_file():
        found["samples"] = [Still(folder / "growth.gif", frame=frame) for frame in range(_frames(folder / "growth.gif"))]
    return {kind: sorted(stills, key=lambda still: still.step or 0) for kind, stills in found.items()}


def _frames(path: Path) -> int:
    from PIL import Image

    try:
        with Image.open(path, formats=("GIF",)) as image:
            return min(getattr(image, "n_frames", 1), 1000)
    except (OSError, ValueError, Image.DecompressionBombError):
        return 1  # whoever opens the one frame says what is wrong


def _evaluated(folder: Path, problems: list[str]) -> list[Evaluated]:
    found = []
    for path in sorted((folder / "evaluated").glob("*.json")):
        said = _json(path, problems)
        figures, made_by = said.get("figures"), said.get("made_by")
        if not said:
            continue
        if not isinstance(figures, dict) or not all(_is_figure(figure) for figure in figures.values()):
            problems.append(f"evaluated/{path.name}: not figures with a value each (an older version's: evaluate again)")
            continue
        found.append(Evaluated(path.stem, figures, made_by if isinstance(made_by, dict) else {}))
    return found


def _is_figure(figure: object) -> bool:
    return isinstance(figure, dict) and isinstance(figure.get("value"), int | float | None) and "value" in figure


def _generated(folder: Path, problems: list[str]) -> list[Made]:
    found = []
    for path in sorted((folder / "generated").glob("*/")):
        facts: dict[str, Any] = {}
        for file in sorted(path.glob("*.json")):
            facts |= _json(file, problems)
        grid = path / "grid.png"
        if facts or grid.is_file():
            found.append(Made(path.name, Still(grid) if grid.is_file() else None, facts))
    return found


def _damaged(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{path.name}: cannot be read ({' '.join(str(reason).split())[:120]})"
