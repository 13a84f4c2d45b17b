"""Adaptive projected guidance: only what is new in the guiding direction, and not too much of it.

    d    = x0(label) - x0(null) + momentum d_before
    d   <- d min(1, threshold / |d|)
    d    = d_parallel + d_orthogonal     along and across x0(label)
    x0   = x0(label) + (scale - 1) (d_orthogonal + parallel d_parallel)

Sadat et al. 2024, "Eliminating oversaturation and artifacts of high guidance scales in diffusion models": their eta is
`parallel`, r is `threshold`, beta is `momentum`. The part along x0 mostly adds contrast. parallel 1, no threshold and no
momentum is classifier-free guidance. d_before belongs to a walk: it lives in the rule, of which each walk has its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.guidance.cfg import LabelFree, Rule
from diffusion_cli.ranges import NonNegativeFloat, PositiveFloat
from diffusion_cli.schedules import Schedule


@dataclass(frozen=True)
class APG(LabelFree):
    """parallel: share kept of the part along x0. threshold: longest d, over all values of a picture; null: any length.
    momentum: of d from question to question; the paper's are negative, -0.75 to 0. ValueError: not within (-1, 1)."""

    parallel: NonNegativeFloat = 0.0
    threshold: PositiveFloat | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum:g}: the sum of past directions stays finite only between -1 and 1")

    def rule(self, schedule: Schedule) -> Rule:
        before: Tensor | None = None

        def combine(x: Tensor, t: Tensor, told: Tensor, untold: Tensor) -> Tensor:
            nonlocal before
            d = told - untold if before is None else told - untold + self.momentum * before  # [B, C, H, W]
            before = d
            if self.threshold is not None:
                d = d * (self.threshold / dot(d, d).sqrt().clamp(min=1e-12)).clamp(max=1)
            along = dot(d, told) / dot(told, told).clamp(min=1e-12) * told
            return told + (self.scale - 1) * (d - along + self.parallel * along)

        return combine


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of pictures, [B, C, H, W] twice -> [B, 1, 1, 1]."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))[:, None, None, None]
