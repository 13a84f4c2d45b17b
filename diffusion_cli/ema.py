"""Exponential moving averages of the weights: shadow <- beta shadow + (1 - beta) weights, beta by the images seen.

The average is a second copy of the module and never swapped into the one that trains.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from diffusion_cli.pace import Pace
from diffusion_cli.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


class EMA(ABC):
    """second: another average that is tracked beside; snapshots: steps from one snapshot of both to the next, 0 for none."""

    second: "EMA | None" = None
    snapshots: int = 0

    @abstractmethod
    def beta(self, step: int, pace: Pace) -> float:
        """The share of the old average that step 0, 1 ... keeps, each of as many pictures as pace says."""


@dataclass(frozen=True)
class HalfLife(EMA):
    """Half of the average is younger than `images`, or than `rampup` of all images seen (Karras et al. 2022, appendix F)."""

    images: PositiveFloat = 500_000
    rampup: NonNegativeFloat = 0.05

    def beta(self, step: int, pace: Pace) -> float:
        half_life = min(self.images, pace.seen(step + 1) * self.rampup) if self.rampup else self.images
        return 0.5 ** (pace.size(step) / max(half_life, 1e-8))


@dataclass(frozen=True)
class Decay(EMA):
    """The same beta at every step (Ho et al. 2020); with warmup at most (1 + n) / (10 + n) at the n-th step."""

    decay: Fraction = 0.9999
    warmup: bool = True

    def beta(self, step: int, pace: Pace) -> float:
        return min(self.decay, (2 + step) / (11 + step)) if self.warmup else self.decay


LONGEST = 12**-0.5  # the relative standard deviation of all weights alike, exponent 0


def exponent(length: float) -> float:
    """gamma of a relative standard deviation: (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = length^2 (EDM2, algorithm 2)."""
    return float(max(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real))


@dataclass(frozen=True)
class Power(EMA):
    """What was trained at tau pictures weighs as tau^gamma, so that the average grows with the run (Karras et al. 2024, EDM2,
    section 3.1).

    length: standard deviation of these weights as a share of the run, which says gamma; beside: that of a second average. From
    snapshots of both every so many steps averages of other lengths are made after training (averages.py).
    """

    length: PositiveFloat = 0.05
    beside: PositiveFloat = 0.1
    every: PositiveInt = 1000

    def __post_init__(self) -> None:
        if max(self.length, self.beside) >= LONGEST or self.length == self.beside:
            raise ValueError(
                f"length is {self.length} and beside {self.beside}: two different ones below {LONGEST:.4f}, which weighs all "
                "steps alike"
            )

    @property
    def second(self) -> EMA:  # type: ignore[override]
        return replace(self, length=self.beside, beside=self.length)

    @property
    def snapshots(self) -> int:  # type: ignore[override]
        return self.every

    def beta(self, step: int, pace: Pace) -> float:
        return float((1 - pace.size(step) / pace.seen(step + 1)) ** (exponent(self.length) + 1))


@dataclass(frozen=True)
class Latest(EMA):
    """No average: the newest weights."""

    def beta(self, step: int, pace: Pace) -> float:
        return 0.0


@torch.no_grad()
def update(shadow: nn.Module, module: nn.Module, beta: float) -> None:
    """One update of all parameters of the shadow; buffers are copied. What is frozen stays as it is, to the bit."""
    torch._foreach_lerp_(list(shadow.parameters()), [p.detach() for p in module.parameters()], 1 - beta)
    for mine, theirs in zip(shadow.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)
