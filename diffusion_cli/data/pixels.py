"""Pictures outside are uint8 in 0..255, inside float32 in [-1, 1]; the way there and back is exact on all 256 values."""

import torch
from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Floats of any shape -> the nearest uint8; what lies outside [-1, 1] is clamped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
