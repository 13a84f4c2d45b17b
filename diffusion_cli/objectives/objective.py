"""The contract between the trainer, which knows no diffusion, and what it trains."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_cli.data import Batch, Pictures
from diffusion_cli.randomness import Source

M = TypeVar("M", bound=nn.Module | None)


class Tally(NamedTuple):
    """Sums [K] and counts [K] of K figures, added up over steps on the device and read only when reported."""

    sums: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Aside(Generic[M]):
    """A frozen module beside an objective: asked and never trained, so no part of its state, and not copied with it."""

    module: M

    def __deepcopy__(self, memo: object) -> "Aside[M]":
        return self


class Objective(nn.Module):
    """A module: all that is trained and all that a checkpoint carries is in its state.

    Of its constructor's arguments, those that assembly.PARTS names are supplied by the program; the others are its config.
    """

    shown = "samples"  # the drawing of `preview` to look at first
    example = "diffusion-sample ckpt={run} n=64 seed=1"  # what to do with the run when it is trained
    coupled = False  # whether the loss of a picture depends on the others of its batch
    repeats = False  # whether a step is like the one before but for what is in tensors: it can be recorded (capture.py)

    def meet(self, pictures: Pictures, device: torch.device, flip: bool) -> None:
        """Told once, before the first step, which pictures `Batch.ids` are numbers of, and whether some come mirrored: what it
        looks up by them stays on the device. Raises DataError where they lack what it needs."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """What is compiled, and whose weights are counted."""

    @abstractmethod
    def loss(self, batch: Batch, source: Source) -> tuple[Tensor, Mapping[str, Tally]]:
        """Per-picture loss [B], and named tallies. All randomness comes from source."""

    @abstractmethod
    def figure_names(self, tally: str) -> list[str]:
        """The K names of a tally's figures."""

    @abstractmethod
    def preview(self, pictures: Pictures, source: Source) -> Mapping[str, Image]:
        """Drawings that show how far training is, with the same pictures and noise every time."""

    @abstractmethod
    def evaluate(self, pictures: Pictures, source: Source, batch: int) -> dict[str, float]:
        """Figures on pictures that were not trained on, the same noise every time."""

    def settle(self, pictures: Pictures, batch: int) -> None:
        """Called before a checkpoint, in evaluation mode, with the training pictures: for what the state measures of them."""
