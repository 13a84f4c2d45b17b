"""A report from its checked settings: find the runs, read them, write the page."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from diffusion_cli import storage
from diffusion_cli.report import reading
from diffusion_cli.report.page import html
from diffusion_cli.settings import Report


def make(settings: Report) -> Path:
    """Writes the page, says where it is and returns its path. Raises UserError."""
    began = time.perf_counter()
    folders = reading.find(settings.runs)
    top = _top(settings.runs)
    runs = [reading.read(folder, name) for folder, name in zip(folders, _names(folders, top))]
    title = runs[0].name if len(runs) == 1 else top.resolve().name
    page = html(runs, title, reading.sweep(top)).encode("utf-8", "replace")
    path = Path(settings.out).expanduser() if settings.out else top / "report.html"
    storage.make_folder(path.parent)
    storage.write(path, page)
    seconds = time.perf_counter() - began
    print(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {len(page) / 1e6:.1f} MB in {seconds:.1f} s: {path}", flush=True)
    for run in runs:
        for problem in run.problems:
            print(f"  {run.name}: {problem}", flush=True)
    return path


def _top(words: Sequence[str]) -> Path:
    """The folder that was named; of several the one that holds them all."""
    named = [Path(word).expanduser() for word in words]
    return named[0] if len(named) == 1 else Path(os.path.commonpath([path.resolve() for path in named]))


def _names(folders: Sequence[Path], top: Path) -> list[str]:
    """Each run's path below the folder of all, which for one run is its own name."""
    above = top.resolve()
    return [str(folder.relative_to(above)) if folder != above else folder.name for folder in folders]
