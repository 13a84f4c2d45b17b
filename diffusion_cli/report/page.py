"""Runs as one HTML file that asks nothing of any network: template, style, scripts, ECharts, figures and pictures in one.

Every word of a run is a stranger's. In the markup it is escaped by the template, the data are JSON in an element that no
browser runs, and the scripts set text, never markup. The page's own policy allows the scripts and the style whose SHA-256 it
names and pictures inside the file, and nothing else.
"""

import base64
import hashlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_cli import __version__
from diffusion_cli.report.facts import Column, columns, figures_of, shown
from diffusion_cli.report.pictures import Picture, Unreadable, drawn
from diffusion_cli.report.reading import Curve, Read, Still, Sweep
from diffusion_cli.report.thinning import evenly

_HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "table.js", "overview.js", "run.js", "compare.js", "main.js")
_STILLS = 600  # previews of all runs
_GENERATED = "generated/"  # no kind of preview has this name
_SHORT_FLOAT = re.compile(r"[-+]?\d+e[-+]?\d+")  # 1e-4, which YAML 1.1 takes for a word
_DEEPEST = 12  # levels of JSON
Drawn = Mapping[Still, Picture | Unreadable]


def html(data: Mapping[str, Any]) -> str:
    """The page of these data."""
    import jinja2

    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    library = (_HERE / "echarts.min.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_sum(library)} {_sum(script)}; style-src {_sum(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    loader = jinja2.FileSystemLoader(_HERE)
    surroundings = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader, trim_blocks=True)
    surroundings.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return surroundings.get_template("page.html").render(
        data=data, policy=policy, style=style, script=script, library=library, version=__version__
    )


def _sum(text: str) -> str:
    """The source of a policy that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def data_of(runs: Sequence[Read], title: str, sweep: Sweep) -> dict[str, Any]:
    """Everything that the page shows, as JSON: numbers finite or null, words as they were found. runs: at least one."""
    table = columns(runs, sweep)
    frames = max(3, min(32, _STILLS // len(runs)))
    wanted = [_wanted(run, frames, len(runs)) for run in runs]
    pictures = drawn([still for chosen in wanted for stills in chosen.values() for still in stills])
    return _sound({
        "title": title,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "columns": [vars(column) for column in table],
        "metric": _metric(table, sweep),
        "runs": [_run(run, table, chosen, pictures) for run, chosen in zip(runs, wanted)],
    })  # fmt: skip


def _metric(table: Sequence[Column], sweep: Sweep) -> str | None:
    """The figure by which runs are coloured and ordered at first: the sweep's, else the held-out error, else the loss."""
    names = [column.key for column in table if column.kind == "figure"]
    wanted = (sweep.metric, "evaluate/x0_mse", "evaluate/cross_entropy", "evaluate_on_train/x0_mse", "train/loss")
    return next((name for name in wanted if name in names), names[0] if names else None)


def _wanted(run: Read, frames: int, count: int) -> dict[str, list[Still]]:
    """The previews and grids that have a place on the page, by kind; with many runs the samples alone."""
    kinds = {kind: stills for kind, stills in run.previews.items() if kind == "samples" or count <= 24}
    chosen = {kind: [stills[i] for i in evenly(len(stills), frames)] for kind, stills in kinds.items()}
    made = [made.grid for made in run.generated if made.grid is not None]
    return {**chosen, _GENERATED: made[: 32 if count <= 24 else 2]}


def _run(run: Read, table: Sequence[Column], wanted: Mapping[str, list[Still]], pictures: Drawn) -> dict[str, Any]:
    shown_of = {
        kind: {still: vars(p) for still in stills if isinstance(p := pictures[still], Picture)}
        for kind, stills in wanted.items()
    }
    previews = {kind: [{"step": still.step, **picture} for still, picture in found.items()] for kind, found in shown_of.items()}
    made = shown_of[_GENERATED]
    problems = list(run.problems)
    for still in (still for stills in wanted.values() for still in stills):
        if isinstance(reason := pictures[still], Unreadable):
            problems.append(f"{still.path.parent.name}/{still.path.name}: cannot be read ({reason})")
    figures = figures_of(run)
    curves = {tag: _curve(curve) for tag, curve in run.curves.items() if tag != "train/images"}
    problems += [f"{tag}: not finite at step {lost}" for tag, lost in _losses(run.curves)]
    return {
        "name": run.name,
        "state": str(run.status.get("state", "unknown")),
        "reason": str(run.status.get("reason", "")) if run.status.get("state") in ("failed", "preempted") else "",
        "step": _whole(run.status.get("step")),
        "total": _whole(run.status.get("total")),
        "time": str(run.status.get("time", "")),
        "cells": [_cell(run, column, figures) for column in table],
        "curves": curves,
        "previews": {kind: stills for kind, stills in previews.items() if stills and kind != _GENERATED},
        "evaluated": [
            {"name": file.name, "figures": dict(file.figures), "made": dict(file.made_by)} for file in run.evaluated
        ],
        "generated": [
            {"name": each.name, "facts": dict(each.facts), "picture": made.get(each.grid) if each.grid else None}
            for each in run.generated
        ],
        "config": {key: shown(key, value) for key, value in run.config.items()},
        "yaml": run.config_text,
        "problems": problems,
    }  # fmt: skip


def _curve(curve: Curve) -> dict[str, list[float | None]]:
    return {"steps": [step for step, _ in curve], "values": [_rounded(value) for _, value in curve]}


def _losses(curves: Mapping[str, Curve]) -> Iterator[tuple[str, int]]:
    """The curves that went astray, and where first."""
    for tag, curve in curves.items():
        lost = next((step for step, value in curve if not math.isfinite(value)), None)
        if lost is not None and not tag.startswith("loss_by_noise/"):  # a level that no picture of a batch had
            yield tag, int(lost)


def _cell(run: Read, column: Column, figures: dict[str, float]) -> str | float | None:
    """Numbers as numbers, so that they sort; None where the run has no such thing."""
    if column.kind == "figure":
        return _rounded(figures[column.key]) if column.key in figures else None
    value = run.config.get(column.key)
    if isinstance(value, str) and _SHORT_FLOAT.fullmatch(value):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _rounded(value)
    return shown(column.key, value) if column.key in run.config else None


def _rounded(value: float) -> float | None:
    """Five digits are more than a chart or a table shows. None where the value is not finite, or has no place in a float."""
    return float(f"{value:.5g}") if abs(value) < 1e300 else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _sound(value: Any, depth: int = 0) -> Any:
    """The same without what JSON has no word for, and without depths that no page shows."""
    if isinstance(value, dict):
        return {str(key): _sound(inner, depth + 1) for key, inner in value.items()} if depth < _DEEPEST else "..."
    if isinstance(value, list):
        return [_sound(inner, depth + 1) for inner in value] if depth < _DEEPEST else "..."
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
