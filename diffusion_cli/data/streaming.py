"""Decoding in worker processes: batch after batch for sets too large to hold, or all of them once for the others.

What comes out does not depend on the number of workers: a worker only decodes the numbers that it is told. So one that dies is
replaced, and its numbers are told once more.
"""

import atexit
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion_cli.data.pictures import Decoded, Skipped, Streamed
from diffusion_cli.errors import DataError

CHUNK = 256  # pictures in one message of a worker when all are decoded
DEATHS = 3  # of workers one after the other, without a batch between them, of which the last is not made up for


@dataclass(frozen=True)
class _Once:
    """A list of batches as an object that a DataLoader can iterate."""

    numbers: Iterator[list[int]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.numbers)


def decoded(images: Streamed, numbers: Iterator[list[int]]) -> Iterator[Decoded]:
    """Each list of picture numbers, decoded, in order. A worker that dies is replaced; DataError where that is in vain."""
    workers, waiting, deaths = min(images.workers, available_cores()), deque[list[int]](), 0

    def told() -> Iterator[list[int]]:
        """What was told and has not come back, then what comes next."""
        yield from list(waiting)
        for some in numbers:
            waiting.append(some)
            yield some

    while True:
        before = signal.getsignal(signal.SIGCHLD)
        found = iter(_loader(images, told(), workers))
        if workers:  # else a death would end whatever the program does at that moment, a step of training for one
            signal.signal(signal.SIGCHLD, before)
        end = partial(_kill, list(getattr(found, "_workers", ())))
        atexit.register(end)  # where an error keeps this generator: the interpreter would wait for them
        try:
            while True:
                with _hearing_of_deaths(workers):
                    batch = next(found, None)
                if batch is None:
                    return
                waiting.popleft()
                deaths = 0
                yield batch
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
                raise
            reason = str(error).strip()
        finally:
            end()
        deaths += 1
        if deaths == DEATHS:
            raise DataError(
                f"a process that decodes pictures died (out of memory?); fewer may do: dataset.workers={workers // 2}. {reason}"
            )
        tqdm.write(f"a process that decodes pictures died, and another goes on in its place: {reason}", file=sys.stderr)


def _kill(workers: list[BaseProcess]) -> None:
    """Once: they leave gentler signals to the run, and one of them may wait for one that is dead."""
    while workers:
        workers.pop().kill()


def _loader(images: Streamed, numbers: Iterator[list[int]], workers: int) -> DataLoader[Decoded]:
    return DataLoader(
        images,  # type: ignore[arg-type]  # its __getitems__ is all that is asked for
        batch_sampler=_Once(numbers),
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        worker_init_fn=_leave_signals,
    )


@contextmanager
def _hearing_of_deaths(workers: int) -> Iterator[None]:
    """RuntimeError for a worker that is dead, or dies within the block, as torch's own handler raises it anywhere."""
    if not workers:
        yield
        return
    died = lambda number, frame: torch._C._error_if_any_worker_fails()  # noqa: E731
    before = signal.signal(signal.SIGCHLD, died)
    try:
        torch._C._error_if_any_worker_fails()
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _leave_signals(worker: int) -> None:
    """Ctrl-C and Slurm reach every process, but the run decides when to stop; its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Decoded) -> Decoded:
    return batch


def available_cores() -> int:
    """Cores this process may use: in a container or a Slurm job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mended(images: Streamed, batch: Decoded, skipped: dict[str, Skipped]) -> tuple[np.ndarray, list[int]]:
    """uint8 [B, C, H, W] and the numbers, each bad picture replaced by the next good one; `skipped` grows by the bad ones.

    Raises DataError when they are more than `max_bad` of the set.
    """
    ids = list(batch.ids)
    for place, bad in batch.bad.items():
        number, found = ids[place], bad
        while True:
            skipped[found.name] = found
            images.refuse(list(skipped.values()))
            number = (number + 1) % len(images)
            pixels, _, trouble = images.__getitems__([number])
            if not trouble:
                break
            found = trouble[0]
        batch.images[place], ids[place] = pixels[0], number
    return batch.images, ids


def decode_all(images: Streamed) -> tuple[Tensor, np.ndarray, tuple[Skipped, ...]]:
    """All pictures uint8 [K, C, H, W], the numbers of the K that could be read, and the others.

    Raises DataError when the others are more than `max_bad`.
    """
    count = len(images)
    chunks = (list(range(first, min(first + CHUNK, count))) for first in range(0, count, CHUNK))
    # a process takes longer to start than a thousand pictures to decode
    batches = decoded(images, chunks) if count > 4 * CHUNK else map(images.__getitems__, chunks)
    pixels, good = torch.empty(images.shape, dtype=torch.uint8), np.ones(count, dtype=bool)
    skipped: list[Skipped] = []
    for batch in batches:
        pixels[batch.ids[0] : batch.ids[-1] + 1] = torch.from_numpy(batch.images)
        skipped += batch.bad.values()
        good[[batch.ids[place] for place in batch.bad]] = False
    images.refuse(skipped)
    kept = np.flatnonzero(good)
    return pixels[kept] if skipped else pixels, kept, tuple(skipped)
