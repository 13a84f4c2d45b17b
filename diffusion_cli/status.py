"""What is known of a run's folder from outside, without torch: its status, and whether a process works in it."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from diffusion_cli import storage
from diffusion_cli.errors import StorageError

FOLDERS = ("checkpoints", "samples", "tensorboard", "generated", "evaluated", "exported", "parts", "averages")


def check_own(folder: Path) -> None:
    """Raises StorageError where a folder of the run is a link that leads out of it: a stranger's run could write there."""
    for path in (folder / name for name in FOLDERS):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise StorageError(
                f"{path} is a link that leads out of the run: remove it; a whole run may lie elsewhere, by outputs="
            )


def write_status(folder: Path, state: str, step: int, **facts: Any) -> None:
    """running, finished, preempted, pruned or failed: for whoever asks from outside. pid: whose word it is."""
    text = {"state": state, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(), **facts}
    storage.write(folder / "status.json", (json.dumps(text, indent=1) + "\n").encode())


def status_of(folder: Path) -> dict[str, Any]:
    """What status.json says; nothing where there is none."""
    try:
        found = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def note_failure(folder: Path, reason: str, state: str = "failed", **facts: Any) -> None:
    """Of a run that could not say it itself: what it wrote of its step and figures stays."""
    storage.make_folder(folder)
    before = status_of(folder)
    kept = {key: before[key] for key in ("total", "figures") if key in before}
    write_status(folder, state, before.get("step", 0), **kept, reason=reason, **facts)


def locked(folder: Path) -> TextIO:
    """An open file whose lock the operating system lets go with the process, however it ends."""
    path = folder / ".lock"
    with storage.named("lock", path):
        file = open(path, "a+", opener=storage.no_link)  # noqa: SIM115 (it is held)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip() or "unknown"
            file.close()
            raise StorageError(
                f"{folder} is in use by another process (pid {other}): wait for it, or choose another name="
            ) from None
    os.register_at_fork(after_in_child=file.close)  # else workers that outlive a killed run hold its lock for some seconds
    return file
