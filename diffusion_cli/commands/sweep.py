"""The table of a sweep: each run's choices that differ and its last figures, as CSV and printed."""

import csv
import io
import json
from pathlib import Path

import yaml

from diffusion_cli import storage
from diffusion_cli.settings import flat


def write_table(folder: Path) -> str:
    """Reads the runs right below the folder, writes sweep.csv, and returns the table as text."""
    rows = [row for run in sorted(folder.iterdir()) if (row := _row(run))] if folder.is_dir() else []
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    constant = {key for key in keys if key.startswith("config.") and len({row[key] for row in rows if key in row}) == 1}
    keys = sorted((key for key in keys if key not in constant), key=lambda key: key == "reason")
    titles = [key.removeprefix("config.").removeprefix("figures.").removesuffix("._target_") for key in keys]
    cells = [titles, *([row.get(key, "") for key in keys] for row in rows)]
    file = io.StringIO()
    csv.writer(file).writerows(cells)
    storage.write(folder / "sweep.csv", file.getvalue().encode())
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def print_table(folder: str | None) -> None:
    """At the end of a sweep; nothing where there was none."""
    table = write_table(Path(folder)) if folder else ""
    if table:
        print(f"\n{table}\n\n{folder}/sweep.csv", flush=True)


def note_failure(run: Path, reason: str) -> None:
    """A job that failed before it had a run has a row in the table too."""
    if not (run / "status.json").exists():
        storage.make_folder(run)
        storage.write(run / "status.json", json.dumps({"state": "failed", "step": 0, "reason": reason}).encode())


def _row(run: Path) -> dict[str, str] | None:
    try:
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    row = {"run": run.name, "state": status["state"], "step": str(status["step"])}
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        config = {}
    for key, value in flat(config).items():
        if key not in ("name", "outputs"):
            row[f"config.{key}"] = str(value).rpartition(".")[2] if key.endswith("_target_") else _cell(value)
    row |= {f"figures.{key}": f"{value:.5g}" for key, value in status.get("figures", {}).items()}
    if status["state"] == "failed":
        row["reason"] = str(status.get("reason", "")).splitlines()[0][:100]
    return row


def _cell(value: object) -> str:
    return "" if value is None else str(value)
