"""Several processes at one folder. They share nothing but its files: each makes its part and says so by writing it.

No process waits for another but the first, which draws the grid when all is there; whoever dies leaves the rest of the work
to the same command. A process that makes no progress for `PATIENCE` seconds (or three times what the first one needed for
its slowest file) is given up.
"""

import time
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from diffusion_cli.distributed import Process
from diffusion_cli.errors import Stopped, StorageError
from diffusion_cli.sampling.writing import Album
from diffusion_cli.signals import StopRequest

PATIENCE = 600.0  # seconds


def share(album: Album, batch: int, process: Process) -> np.ndarray:
    """The files that this process makes, int64 [K]: by turns, and a batch is made by one process only."""
    files = np.arange(len(album))
    together = max(batch, album.form.size)  # pictures that stay together
    return files[(files * album.form.size // together) % process.world == process.rank]


def wait(remaining: Callable[[], int], stop: StopRequest, patience: float, what: str) -> None:
    """Until nothing remains. Raises StorageError when it does not fall for `patience` seconds, Stopped after a signal."""
    before, since, pause = remaining(), time.monotonic(), 0.05
    while before:
        if stop.number:
            give_up(stop, "while it waited for the other processes")
        if time.monotonic() - since > patience:
            raise StorageError(f"{what} for {patience:.0f} s: another process has ended or hangs; the same command goes on")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        now = remaining()
        if now != before:
            before, since = now, time.monotonic()


def give_up(stop: StopRequest, where: str) -> NoReturn:
    raise Stopped(f"stopped by {stop.name} {where}: the same command goes on", stop.number)
