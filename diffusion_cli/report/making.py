"""A report from its checked settings: find the runs, read them, write the page."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from diffusion_cli import storage
from diffusion_cli.report import page, reading
from diffusion_cli.settings import Report

POINTS = 300_000  # of all curves of a page: 4 MB
MANY = 32  # runs, which are worth processes of their own


def make(settings: Report) -> Path:
    """Writes the page, says where it is and returns its path. Raises UserError."""
    began = time.perf_counter()
    folders = reading.find(settings.runs)
    top = _top(settings.runs)
    runs = _read(folders, _names(folders, top))
    title = runs[0].name if len(runs) == 1 else top.name
    data = page.data_of(runs, title, reading.sweep(top))
    written = page.html(data).encode("utf-8", "replace")
    path = Path(settings.out).expanduser() if settings.out else top / "report.html"
    storage.make_folder(path.parent)
    storage.write(path, written)
    seconds = time.perf_counter() - began
    count = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    print(f"{count}, {len(written) / 1e6:.1f} MB in {seconds:.1f} s: {_as_typed(path)}", flush=True)
    for run in data["runs"]:
        for problem in run["problems"]:
            print(f"  {run['name']}: {problem}", flush=True)
    return path


def _read(folders: Sequence[Path], names: Sequence[str]) -> list[reading.Read]:
    """All runs in their order; many of them on all cores, since parsing their figures is what takes the time."""
    points = [POINTS // len(folders)] * len(folders)
    if len(folders) < MANY:
        return list(map(reading.read, folders, names, points))
    with ProcessPoolExecutor() as pool:
        return list(pool.map(reading.read, folders, names, points, chunksize=4))


def _top(words: Sequence[str]) -> Path:
    """The folder that was named; of several the one that holds them all."""
    return Path(os.path.commonpath([Path(word).expanduser().absolute() for word in words]))


def _names(folders: Sequence[Path], top: Path) -> list[str]:
    """Each run's path below the folder of all, which for one run is its own name."""
    return [os.path.relpath(folder.absolute(), top) if folder.absolute() != top else top.name for folder in folders]


def _as_typed(path: Path) -> Path:
    """Short, where it lies below the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
