"""Rows of figures by number: made batch by batch, kept in files until all are there, by any number of processes.

Batches are aligned, so row i is always made together with the others of batch i // batch, whichever process makes it, and the
table is the same to the bit on one process as on many. A stopped command goes on with what is there. Each file holds some
batches; whoever makes it writes it whole or not at all. Nothing but rows stays in memory.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from diffusion_cli import storage
from diffusion_cli.distributed import Process
from diffusion_cli.sampling.together import PATIENCE, give_up, wait
from diffusion_cli.signals import StopRequest

TOGETHER = 1000  # rows in a file, or one batch where that is more

Make = Callable[[Tensor], Mapping[str, Tensor]]  # numbers int64 [B] -> columns [B, ...] on the host
Told = Callable[[int], object]  # told after each batch how many rows it had


def made(make: Make, first: int, end: int, batch: int, stop: StopRequest, told: Told) -> dict[str, Tensor]:
    """Rows first .. end - 1, here and now. first is a multiple of batch. Raises Stopped after a signal."""
    table: dict[str, Tensor] = {}
    for at in range(first, end, batch):
        if stop.number:
            give_up(stop, f"with {end - at:,} pictures left to measure")
        ids = torch.arange(at, min(at + batch, end))
        for name, values in make(ids).items():
            if name not in table:
                table[name] = torch.empty(end - first, *values.shape[1:], dtype=values.dtype)
            table[name][at - first : at - first + len(ids)] = values
        told(len(ids))
    return table


@dataclass(frozen=True)
class Ledger:
    """Rows 0 .. count - 1 of a table in files of a folder, which all processes see."""

    folder: Path
    name: str
    count: int
    batch: int

    @property
    def size(self) -> int:
        """Rows in a file: whole batches."""
        return self.batch * math.ceil(TOGETHER / self.batch)

    def __len__(self) -> int:
        return math.ceil(self.count / self.size)

    def span(self, file: int) -> tuple[int, int]:
        return file * self.size, min((file + 1) * self.size, self.count)

    def path(self, file: int) -> Path:
        first, end = self.span(file)
        return self.folder / f"{self.name}_{first:08d}_{end:08d}.safetensors"

    def fill(self, make: Make, me: Process, stop: StopRequest, told: Told) -> None:
        """Makes this process's share of what is not there. Raises Stopped."""
        for file in range(me.rank, len(self), me.world):
            first, end = self.span(file)
            if self.path(file).exists():
                told(end - first)
                continue
            table = made(make, first, end, self.batch, stop, told)
            storage.make_folder(self.folder)
            storage.write(self.path(file), safetensors.torch.save(table))

    def read(self, stop: StopRequest) -> dict[str, Tensor]:
        """The whole table, once every process has written its part. Raises StorageError where one of them never does."""
        absent = lambda: sum(not self.path(file).exists() for file in range(len(self)))  # noqa: E731
        wait(absent, stop, PATIENCE, f"figures of other processes have not come to {self.folder}")
        table: dict[str, Tensor] = {}
        for file in range(len(self)):
            first, end = self.span(file)
            for name, values in safetensors.torch.load_file(self.path(file)).items():
                if name not in table:
                    table[name] = torch.empty(self.count, *values.shape[1:], dtype=values.dtype)
                table[name][first:end] = values
        return table
