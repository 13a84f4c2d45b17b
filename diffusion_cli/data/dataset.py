"""A data set is one config node: its constructor's signature is the schema, and `load` reads one split of it.

What all sets share is here: which pictures are taken (split, held-out share, classes, limit) and whether they are held in
memory or streamed. A set of its own adds `read`, and nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_cli import randomness
from diffusion_cli.data.pictures import Pictures, Skipped, Source, Streamed
from diffusion_cli.errors import DataError
from diffusion_cli.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt


@dataclass(frozen=True)
class Raw:
    """A split as it is stored. labels: int64 [N] or None; classes: all names; texts: N captions or None."""

    source: Source
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    texts: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset(ABC):
    """The keys that every data set has.

    size: pictures are size x size pixels. channels: 1 grey, 3 RGB. classes: keep only these, by number or by name.
    labels: whether the network is told the class. flip: mirror half of the pictures while training.
    resize: squeeze (proportions lost), crop (middle of the longer side), pad (black bars).
    split: what `load("train")` reads. test_share: share of it held out where the set has no test split.
    limit: only the first so many pictures of a split; 0 is all. memory: gigabytes; a larger set is streamed.
    workers: processes that decode. max_bad: share of unreadable pictures that is tolerated.
    """

    size: PositiveInt
    channels: Literal[1, 3]
    classes: tuple[str | int, ...] | None = None
    labels: bool = False
    flip: bool = False
    resize: Literal["squeeze", "crop", "pad"] = "squeeze"
    split: str = "train"
    test_share: Fraction = 0.0
    limit: NonNegativeInt = 0
    workers: NonNegativeInt = 4
    memory: NonNegativeFloat = 2.0
    max_bad: Fraction = 0.01

    @abstractmethod
    def read(self, split: str) -> Raw | None:
        """The split of that name as it is stored, or None when there is no such split."""

    def load(self, split: str = "train") -> Pictures | None:
        """The pictures for training ("train") or for a test ("test"); None when there is nothing to test on.

        Raises DataError with one line when they are missing, unreachable or unreadable.
        """
        raw, rows = self._rows(split)
        if raw is None:
            return None
        if self.labels and raw.labels is None:
            raise DataError("dataset.labels=true, but this data set has no labels")
        rows = self._chosen(raw, rows)
        if not len(rows):
            raise DataError(f"no pictures are left of split {split!r}: see dataset.classes and dataset.test_share")
        streamed = Streamed(raw.source, rows, self.size, self.channels, self.resize, self.workers, self.max_bad)
        images: Tensor | Streamed = streamed
        skipped: tuple[Skipped, ...] = ()
        if np.prod(streamed.shape) <= self.memory * 1e9:
            from diffusion_cli.data.streaming import decode_all

            images, kept, skipped = decode_all(streamed)
            rows = rows[kept]
        return Pictures(
            images,
            labels=None if raw.labels is None else torch.from_numpy(raw.labels[rows]),
            classes=raw.classes,
            texts=None if raw.texts is None else tuple(raw.texts[row] for row in rows),
            skipped=skipped,
        )

    def _rows(self, split: str) -> tuple[Raw | None, np.ndarray]:
        """What is stored, and the rows of it that belong to the split."""
        own_test = self.read("test") if self.split != "test" and (split == "test" or self.test_share) else None
        if split == "test" and own_test is not None:
            return own_test, np.arange(len(own_test.source))
        if split == "test" and not self.test_share:
            return None, np.arange(0)
        stored = self.read(self.split)
        if stored is None:
            raise DataError(f"this data set has no split {self.split!r} (dataset.split)")
        count = len(stored.source)
        if own_test is not None or not self.test_share:
            return stored, np.arange(count)
        # held out by a counted rule: the rows whose draw is smallest, so the same ones on any machine
        draws = randomness.Source(0, torch.arange(count)).uniform("test_share")
        order, held = draws.argsort(stable=True).numpy(), round(count * self.test_share)
        return stored, np.sort(order[:held] if split == "test" else order[held:])

    def _chosen(self, raw: Raw, rows: np.ndarray) -> np.ndarray:
        if self.classes is not None:
            if raw.labels is None:
                raise DataError(f"dataset.classes={list(self.classes)}, but this data set has no labels")
            rows = rows[np.isin(raw.labels[rows], [class_id(name, raw.classes) for name in self.classes])]
        return rows[: self.limit] if self.limit else rows


def class_id(wanted: str | int, classes: tuple[str, ...]) -> int:
    """The number of a class given by number or by name."""
    if isinstance(wanted, int) and 0 <= wanted < len(classes):
        return wanted
    if str(wanted) in classes:
        return classes.index(str(wanted))
    close = get_close_matches(str(wanted), classes, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    shown = ", ".join(classes[:20]) + (f", ... ({len(classes)} in all)" if len(classes) > 20 else "")
    raise DataError(f"dataset.classes: there is no class {wanted!r}{hint}; the classes are {shown}")


def class_names(found: Iterable[str]) -> tuple[str, ...]:
    """Sorted, each once; numbers by value: 2 before 10."""
    names = set(found)
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def existing(path: Path) -> Path:
    """The path, ~ expanded, if there is something at it; else DataError."""
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"dataset.path={path} does not exist")
    return path
