"""Exponential moving averages of the weights: shadow <- beta shadow + (1 - beta) weights, beta by the images seen.

The average is a second copy of the module and never swapped into the one that trains.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from diffusion_cli.ranges import Fraction, NonNegativeFloat, PositiveFloat


class EMA(ABC):
    @abstractmethod
    def beta(self, images: int, batch: int) -> float:
        """The share of the old average that is kept when `batch` images more make it `images` in all."""


@dataclass(frozen=True)
class HalfLife(EMA):
    """Half of the average is younger than `images`, or than `rampup` of all images seen (Karras et al. 2022, appendix F)."""

    images: PositiveFloat = 500_000
    rampup: NonNegativeFloat = 0.05

    def beta(self, images: int, batch: int) -> float:
        half_life = min(self.images, images * self.rampup) if self.rampup else self.images
        return 0.5 ** (batch / max(half_life, 1e-8))


@dataclass(frozen=True)
class Decay(EMA):
    """The same beta at every step (Ho et al. 2020); with warmup at most (1 + n) / (10 + n) at step n."""

    decay: Fraction = 0.9999
    warmup: bool = True

    def beta(self, images: int, batch: int) -> float:
        step = images / batch
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


@dataclass(frozen=True)
class Latest(EMA):
    """No average: the newest weights."""

    def beta(self, images: int, batch: int) -> float:
        return 0.0


@torch.no_grad()
def update(shadow: nn.Module, module: nn.Module, beta: float) -> None:
    """One update of all parameters of the shadow; buffers are copied. What is frozen stays as it is, to the bit."""
    torch._foreach_lerp_(list(shadow.parameters()), [p.detach() for p in module.parameters()], 1 - beta)
    for mine, theirs in zip(shadow.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)
