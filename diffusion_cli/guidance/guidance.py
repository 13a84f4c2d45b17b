"""The contract of guidance: it answers the sampler's question denoise(x, t) -> x0, never being part of the sampler.

A guidance holds numbers alone. What it remembers over a walk lives in the question that `guide` makes, a new one for each walk.
One that asks a second model says in `helper` which: it is found and loaded by whoever can read checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_cli.denoiser import Condition, Denoiser
from diffusion_cli.ranges import NonNegativeFloat, PositiveFloat
from diffusion_cli.schedules import Schedule, over_pictures

# (x [B, C, H, W], t [] or [B], hint: the x0 foreseen before [B, C, H, W] or None) -> x0 [B, C, H, W]
Guided = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Helper:
    """A second trained model. kind: Denoiser or NoisyClassifier; ckpt: a run or a checkpoint, None for the run that is asked
    itself; step: that checkpoint of the run, None for its newest (of the run itself: the very one that is asked)."""

    kind: type[nn.Module]
    ckpt: str | None
    step: int | None
    weights: Literal["ema", "raw"]


class Guidance(ABC):
    leads_away = False  # does it ask what the network says of the untold condition?

    def helper(self) -> Helper | None:
        """The second model that `guide` needs, if any."""
        return None

    def check(self, denoiser: Denoiser, null_taught: bool) -> None:
        """ValueError where this denoiser cannot be guided so. null_taught: whether labels were hidden while it was trained."""
        return

    @abstractmethod
    def guide(self, denoiser: Denoiser, cond: Condition | None, helper: nn.Module | None = None) -> Guided:
        """The question for the pictures of one walk. cond: what they are told, or None; helper: the model that it named."""


@dataclass(frozen=True)
class Unguided(Guidance):
    """What the network says of itself."""

    def guide(self, denoiser: Denoiser, cond: Condition | None, helper: nn.Module | None = None) -> Guided:
        told = None if cond is None else cond.told
        return lambda x, t, hint: denoiser(x, t, told, hint)


@dataclass(frozen=True)
class Scaled(Guidance):
    """Guidance of some strength within an interval of noise levels; outside, and at its neutral scale, it costs nothing.

    interval: (low, high] of sigma / alpha, which is EDM's sigma and t / (1 - t) on the straight line; high null: no end
    (Kynkaanniemi et al. 2024, "Applying guidance in a limited interval improves sample and distribution quality").
    """

    scale: NonNegativeFloat = 2.0
    interval: tuple[NonNegativeFloat, PositiveFloat | None] | None = None

    neutral = 1.0  # the scale that changes nothing

    def __post_init__(self) -> None:
        if self.interval is not None and self.interval[1] is not None and self.interval[0] >= self.interval[1]:
            low, high = self.interval
            raise ValueError(f"interval is [{low:g},{high:g}]: the first noise level must be below the second, as in [0.3,3]")

    def active(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Whether it changes the answer at t [] or [B], of its shape."""
        if self.scale == self.neutral or self.interval is None:
            return torch.full_like(t, self.scale != self.neutral, dtype=torch.bool)
        low, high = self.interval
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        above = sigma > low * alpha
        return above if high is None else above & (sigma <= high * alpha)


def chosen(which: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """x [B, C, H, W] where `which`, [] or [B], is true; elsewhere other [B, C, H, W]."""
    return torch.where(over_pictures(which, x) > 0, x, other)
