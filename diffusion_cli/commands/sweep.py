"""The table of a sweep: each run's choices that differ and its last figures, as CSV and printed."""

import csv
import io
import json
from pathlib import Path

from diffusion_cli import storage
from diffusion_cli.settings import flat


def write_table(folder: Path) -> str:
    """Reads the runs right below the folder, writes sweep.csv, and returns the table as text."""
    rows = [row for run in sorted(folder.iterdir()) if (row := _row(run))] if folder.is_dir() else []
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    constant = {key for key in keys if key.startswith("config.") and len({row.get(key) for row in rows}) == 1}
    keys = [key for key in keys if key not in constant]
    titles = [key.removeprefix("config.").removeprefix("figures.") for key in keys]
    cells = [titles, *([_cell(row.get(key)) for key in keys] for row in rows)]
    file = io.StringIO()
    csv.writer(file).writerows(cells)
    storage.write(folder / "sweep.csv", file.getvalue().encode())
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def _row(run: Path) -> dict[str, str] | None:
    try:
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    row = {"run": run.name, "state": status["state"], "step": str(status["step"])}
    try:
        import yaml

        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        config = {}
    row |= {f"config.{key}": _cell(value) for key, value in flat(config).items() if key != "name"}
    row |= {f"figures.{key}": f"{value:.5g}" for key, value in status.get("figures", {}).items()}
    if status["state"] == "failed":
        row["reason"] = str(status.get("reason", "")).splitlines()[0][:100]
    return row


def _cell(value: object) -> str:
    return "" if value is None else str(value)
