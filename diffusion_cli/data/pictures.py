"""What a data set gives when it is read: pictures in memory as uint8 or, where they are too many, decoded when asked for."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion_cli.data.decoding import Encoded, Resize, Unreadable, decode
from diffusion_cli.errors import DataError


class Skipped(NamedTuple):
    """A picture that cannot be read: a file's path or the place in a table, and why."""

    name: str
    reason: str


class Source(Protocol):
    """Encoded pictures by number."""

    def __len__(self) -> int: ...

    def read(self, rows: list[int]) -> list[Encoded]: ...

    def name(self, row: int) -> str: ...


@dataclass(frozen=True)
class Arrays:
    """Bare pixels: pixels uint8 [N, H, W] or [N, H, W, 3]."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: list[int]) -> list[Encoded]:
        return [self.pixels[row] for row in rows]

    def name(self, row: int) -> str:
        return f"row {row}"


class Decoded(NamedTuple):
    """images uint8 [B, C, H, W], empty where a picture was bad; bad: its place in the batch, and what to say of it."""

    images: np.ndarray
    ids: list[int]
    bad: dict[int, Skipped]


@dataclass(frozen=True)
class Streamed:
    """Pictures decoded on demand, in the workers of a torch DataLoader: number i is `rows[i]` of the source."""

    source: Source
    rows: np.ndarray  # [N] int64
    size: int
    channels: int
    resize: Resize
    workers: int
    max_bad: float

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.channels, self.size, self.size

    def __getitems__(self, ids: Sequence[int]) -> Decoded:
        """Called by the DataLoader with the numbers of one batch. NumPy, not tensors: those would need /dev/shm."""
        rows = self.rows[list(ids)].tolist()
        images, bad = np.zeros((len(rows), *self.shape[1:]), dtype=np.uint8), {}
        for place, (row, encoded) in enumerate(zip(rows, self.source.read(rows), strict=True)):
            try:
                images[place] = decode(encoded, size=self.size, channels=self.channels, resize=self.resize)
            except Unreadable as error:
                bad[place] = Skipped(self.source.name(row), str(error))
        return Decoded(images, list(ids), bad)

    def refuse(self, skipped: Sequence[Skipped]) -> None:
        """Raises DataError when more than `max_bad` of all pictures are bad."""
        if len(skipped) > self.max_bad * len(self):
            examples = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:5])
            allowed = f"more than dataset.max_bad={self.max_bad:g} allows"
            raise DataError(f"{len(skipped)} of {len(self)} pictures cannot be read, {allowed}:{examples}")


@dataclass(frozen=True, eq=False)
class Pictures:
    """One split of a data set.

    images: uint8 [N, C, H, W], or Streamed of that shape where they are too many to hold.
    labels: int64 [N] with the set's own numbers, also under a class filter; None where the set has none.
    classes: the names of all classes of the set; label k is classes[k].
    texts: captions, N of them, or None.
    skipped: pictures that could not be read; they are not among the N.
    """

    images: Tensor | Streamed
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    texts: tuple[str, ...] | None = None
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the shape, the labels or the pixels (of up to 2^28 bytes, evenly spread)."""
        seen = hashlib.sha256(repr((tuple(self.images.shape), self.classes, self.texts)).encode())
        if self.labels is not None:
            seen.update(self.labels.numpy().tobytes())
        if isinstance(self.images, Streamed):  # decoding costs more than hashing: 64 pictures
            some = torch.linspace(0, len(self) - 1, min(len(self), 64)).long().tolist()
            seen.update(self.images.__getitems__(some).images.tobytes())
        else:
            bytes_each = self.images[0].numel()
            stride = -(-len(self) * bytes_each // 2**28)
            seen.update(self.images[::stride].numpy().tobytes())
        return seen.hexdigest()[:16]
