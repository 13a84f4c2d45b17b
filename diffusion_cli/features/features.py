"""The contract of features: words of a config that open an extractor, which turns uint8 pictures into vectors.

The name says which kind, the digest says which weights: figures are comparable where both are the same, and only there.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_cli.assembly import Facts


class Seen(NamedTuple):
    """features [B, D] float32; logits [B, K] float32 of classes, None where a network knows none."""

    features: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """look: uint8 [B, C, H, W] on the device -> Seen. digest: 16 hex digits of the weights and of what is done with pictures.
    classes: names of the logits, where they are classes of the data. read: B texts -> [B, D] in the space of the features, of
    length 1 as they are, where the network knows texts."""

    name: str
    digest: str
    look: Callable[[Tensor], Seen]
    logits: bool = False
    classes: list[str] | None = None
    read: Callable[[Sequence[str]], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        with torch.autocast(images.device.type, enabled=False):
            seen = self.look(images)
        return Seen(seen.features.float().cpu(), None if seen.logits is None else seen.logits.float().cpu())


class Features(ABC):
    """Base of all features; its class name, in small letters, is the word of the command line."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def open(self, facts: Facts, device: torch.device, trust: Collection[str] = ()) -> Extractor:
        """For pictures of these facts. Raises UserError with the way out where weights are missing or do not fit."""


def colour(images: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] -> [B, 3, H, W]: grey is the same in all channels."""
    return images.expand(-1, 3, -1, -1)


def of_words(*words: object) -> str:
    """16 hex digits of what fixes weights that are drawn."""
    return hashlib.sha256("\x1f".join(map(str, words)).encode()).hexdigest()[:16]


def of_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
