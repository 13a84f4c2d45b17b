"""Noise levels at which objectives report while training: tenths of t."""

import torch
from torch import Tensor

from diffusion_cli.objectives.objective import Tally

BINS = 10
BIN_NAMES = [f"t_{k / BINS:.1f}_to_{(k + 1) / BINS:.1f}" for k in range(BINS)]


def by_noise(t: Tensor, values: Tensor) -> Tally:
    """Values [B] at t [B], apart for each tenth of t."""
    tenth = (t * BINS).long().clamp(max=BINS - 1)
    level = (tenth[:, None] == torch.arange(BINS, device=t.device)).to(values)  # [B, BINS]
    return Tally(values @ level, level.sum(0))
