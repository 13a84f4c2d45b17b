"""A run is a folder, outputs/<name>: its checkpoints, pictures, figures, status, and a lock while a process works in it.

checkpoints/step_00001000/  samples/  tensorboard/  metrics.jsonl  status.json  config.yaml
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from torch.utils.tensorboard import FileWriter, SummaryWriter, summary

from diffusion_cli import drawing, storage
from diffusion_cli.distributed import process
from diffusion_cli.errors import StorageError
from diffusion_cli.status import check_own, locked, write_status
from diffusion_cli.status import status_of as status_of


def say(line: str) -> None:
    """One line for the person at the terminal, past any progress bar; of several processes the first one speaks."""
    from tqdm import tqdm

    if not process().first:
        return
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def cache_home() -> Path:
    """Where what can be made again is kept for all runs of a user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-cli"


class Run:
    """The folder of one run, open for this process alone."""

    def __init__(self, folder: Path):
        check_own(folder)
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.samples = folder / "samples"
        for path in (folder, self.checkpoints, self.samples):
            storage.make_folder(path)
        self._lock = locked(folder)
        self._told = threading.excepthook
        self._written: set[frozenset[object]] = set()
        self._board: SummaryWriter | None = None
        self._board_works = True

    # -- figures -------------------------------------------------------------------------------------------------------

    def open_figures(self, step: int) -> None:
        """Figures go on after `step`: what an interrupted attempt wrote beyond it is dropped, here and in TensorBoard."""
        path = self.folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        storage.write(path, "".join(line + "\n" for line in kept).encode())
        self._written = {_mark(json.loads(line)) for line in kept}
        self._on_board("close")
        threading.excepthook = _quiet(self._told)
        with self._board_failing():
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else 0, flush_secs=30)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """One line, unless it was written: what was owed may have been made up for by an attempt that saved nothing more."""
        mark = _mark({"step": step, **values})
        if mark in self._written:
            return
        self._written.add(mark)
        storage.append(self.folder / "metrics.jsonl", json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            self._on_board("add_scalar", tag, value, step)

    def history(self, tag: str) -> list[tuple[float, float]]:
        """(step, value) of one figure over the whole run."""
        rows = map(json.loads, _whole_lines(self.folder / "metrics.jsonl"))
        return [(row["step"], row[tag]) for row in rows if tag in row]

    def last_figures(self) -> dict[str, float]:
        """The newest loss, speed and evaluation that were written: what `Trainer.fit` returned, read back."""
        rows = map(json.loads, _whole_lines(self.folder / "metrics.jsonl"))
        newest = {tag: value for row in rows for tag, value in row.items() if tag.count("/") == 1}
        wanted = ("train/loss", "speed/images_per_second")
        return {tag: value for tag, value in newest.items() if tag in wanted or tag.startswith("evaluate")}

    def picture(self, step: int, tag: str, image: Image) -> Path:
        path = self.samples / f"{tag}_{step:08d}.png"
        storage.write(path, drawing.png(image, {"step": step, "tag": tag}))
        self._on_board("add_image", f"preview/{tag}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        return path

    def text(self, tag: str, text: str, step: int = 0) -> None:
        self._on_board("add_text", tag, text, step)

    def hyperparameters(self, step: int, choices: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """One row of TensorBoard's table of runs. It draws the figures too, so they have names of their own, and a file of
        their own, which takes the place of one that an attempt wrote whose end was not noted."""
        plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in choices.items()}
        final = {f"final/{tag}": value for tag, value in figures.items()}
        if self._board is None or not self._board_works:
            return
        folder = self.folder / "tensorboard"
        with self._board_failing():
            for earlier in folder.glob("*.final"):
                with suppress(StorageError):
                    storage.remove_file(earlier)
            file = FileWriter(str(folder), filename_suffix=".final")
            for row in (*summary.hparams(plain, final), *(summary.scalar(tag, value) for tag, value in final.items())):
                file.add_summary(row, step)
            file.close()

    def _on_board(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._board is not None and self._board_works:
            with self._board_failing():
                getattr(self._board, method)(*arguments, **named)

    @contextmanager
    def _board_failing(self) -> Iterator[None]:
        """TensorBoard is a convenience: when its disk fails, training goes on without it."""
        try:
            yield
        except OSError as error:
            self._board_works = False
            say(f"TensorBoard's files cannot be written ({error.strerror}); training goes on without them")

    # -- status --------------------------------------------------------------------------------------------------------

    def status(self, state: str, step: int, **facts: Any) -> None:
        """running, finished, preempted or failed: for whoever asks from outside."""
        write_status(self.folder, state, step, **facts)

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        storage.write(path, data)
        return path

    def close(self) -> None:
        self._on_board("close")
        threading.excepthook = self._told
        self._lock.close()


class Onlooker(Run):
    """The same folder for a process that is not the first: it reads, and writes nothing."""

    def __init__(self, folder: Path):
        self.folder, self.checkpoints, self.samples = folder, folder / "checkpoints", folder / "samples"
        self._board, self._board_works = None, False

    def open_figures(self, step: int) -> None:
        pass

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def status(self, state: str, step: int, **facts: Any) -> None:
        pass

    def write(self, name: str, data: bytes) -> Path:
        return self.folder / name

    def close(self) -> None:
        pass


def _quiet(told: Callable[[threading.ExceptHookArgs], object]) -> Callable[[threading.ExceptHookArgs], None]:
    """For threading.excepthook: TensorBoard's thread prints a traceback of an error that its next figure raises here too."""

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not (isinstance(raised.exc_value, OSError) and type(raised.thread).__module__.startswith("tensorboard")):
            told(raised)

    return hook


def _mark(row: Mapping[str, float]) -> frozenset[object]:
    """Which line this is: its step and the names of its figures."""
    return frozenset([row["step"], *row])


def _whole_lines(path: Path) -> list[str]:
    """Lines of figures, without one that a crash cut short, or that is none of ours."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(row, dict)
            and type(row.get("step")) is int
            and all(isinstance(value, int | float) for value in row.values())
        ):
            lines.append(line)
    return lines


def on_board(folder: Path, step: int, values: Mapping[str, float]) -> None:
    """Figures of a checkpoint, made after its training or beside it, in the run's TensorBoard."""
    try:
        with SummaryWriter(str(folder / "tensorboard")) as board:
            for tag, value in values.items():
                board.add_scalar(tag, value, step)
    except OSError as error:
        say(f"TensorBoard's files cannot be written: {error.strerror}")
