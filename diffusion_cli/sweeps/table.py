"""What became of a sweep, for people and programs: sweep.json, and a table, best first, printed and as sweep.csv.

{"runs": [folder names], "swept": [keys], "metric": name, "direction": "minimize", "values": {folder name: {key: value}}}
"""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from diffusion_cli import storage
from diffusion_cli.status import status_of
from diffusion_cli.sweeps.jobs import cell, common, figure

_ORDER = {"finished": 0, "pruned": 2}  # those without the figure come after those with it; then what was cut short


@dataclass(frozen=True)
class Record:
    """sweep.json. values: of each run, what it was given of the swept keys, as the command line writes it."""

    runs: tuple[str, ...] = ()
    swept: tuple[str, ...] = ()
    metric: str | None = None
    direction: str = "minimize"
    values: Mapping[str, Mapping[str, str]] | None = None


def record(folder: Path) -> Record:
    """What sweep.json says; an empty one where there is none."""
    try:
        found = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        return Record(tuple(found["runs"]), tuple(found["swept"]), found["metric"], found["direction"], found["values"])
    except (OSError, ValueError, KeyError, TypeError):
        return Record()


def enter(folder: Path, values: Mapping[str, Mapping[str, str]], metric: str | None, direction: str) -> None:
    """Adds runs to sweep.json; those of earlier launches stay."""
    before = record(folder)
    whole = {**(before.values or {}), **{run: dict(given) for run, given in values.items()}}
    _write(folder, Record(tuple(whole), tuple(common(whole.values())), metric, direction, whole))


def write_table(folder: Path) -> str:
    """Reads the sweep's runs, writes sweep.csv, and returns the table as text; "" where no run has begun."""
    said = record(folder)
    given = said.values or {}
    states = {run: status for run in said.runs if (status := status_of(folder / run))}
    if not states:
        return ""
    metric = next(
        (found[0] for status in states.values() if (found := figure(status.get("figures", {}), said.metric))), said.metric
    )
    if metric != said.metric:
        _write(folder, replace(said, metric=metric))  # now it has a name
    ranked = sorted(states, key=lambda run: rank(states[run], metric, said.direction))
    rows = [_row(folder / run, states[run], given.get(run, {}), said.swept) for run in ranked]
    keys = sorted(
        common(rows), key=lambda key: 2 if key == "reason" else key.startswith("figures.") and key != f"figures.{metric}"
    )
    titles = [key.partition(".")[2] if key.startswith(("swept.", "figures.")) else key for key in keys]
    cells = [titles, *([row.get(key, "") for key in keys] for row in rows)]
    file = io.StringIO()
    csv.writer(file).writerows(cells)
    storage.write(folder / "sweep.csv", file.getvalue().encode())
    shown = [[_short(text) for text in row] for row in cells]
    widths = [max(len(row[i]) for row in shown) for i in range(len(keys))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in shown)


def rank(status: Mapping[str, Any], metric: str | None, direction: str) -> tuple[int, float]:
    """Sorts by it: finished runs by the figure, the best first, those without it, pruned ones, and what failed or waits."""
    value = status.get("figures", {}).get(metric, math.nan)
    state = _ORDER.get(status.get("state", ""), 3)
    if not math.isfinite(value):
        return (1 if state == 0 else state), 0.0
    return state, -value if direction == "maximize" else value


def _row(run: Path, status: Mapping[str, Any], given: Mapping[str, str], swept: Sequence[str]) -> dict[str, str]:
    row = {"run": run.name, "state": status["state"], "step": str(status["step"])}
    missing = [key for key in swept if key not in given]  # a run of an earlier launch that swept other keys
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if missing else {}
    except (OSError, RecursionError, yaml.YAMLError):
        config = {}
    row |= {f"swept.{key}": given[key] if key in given else cell(config, key) for key in swept}
    row |= {f"figures.{key}": f"{value:.5g}" for key, value in status.get("figures", {}).items()}
    if status["state"] != "finished" and status.get("reason"):
        row["reason"] = str(status["reason"]).splitlines()[0]
    return row


def _short(text: str) -> str:
    """Of a number as many digits as tell; of a reason its beginning: the file has the rest."""
    if re.fullmatch(r"-?\d*\.\d{6,}(e-?\d+)?", text):
        return f"{float(text):.5g}"
    return text if len(text) <= 80 else text[:77] + "..."


def _write(folder: Path, said: Record) -> None:
    storage.make_folder(folder)
    storage.write(folder / "sweep.json", (json.dumps(asdict(said), indent=1) + "\n").encode())
