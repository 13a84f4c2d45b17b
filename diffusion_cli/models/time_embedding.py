"""Time as a vector: sines and cosines of geometric frequencies, then two linear maps.

    angle_i = time * 10000^(-i / (half - shift)),   i = 0 .. half - 1

Vaswani et al. 2017, section 3.5, with time in place of position, as in Ho et al. 2020. Two habits are in use: DDPM's
(sines first, shift 1: the last frequency is exactly 1/10000) and the one of later houses (cosines first, shift 0).

Random waves (`Waves`) have frequencies drawn once for good instead, for a time that is told as log(sigma)/4.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Order = Literal["sin_cos", "cos_sin"]


def sinusoids(number: Tensor, width: int, order: Order = "cos_sin", shift: int = 0) -> Tensor:
    """[...] float32 to [..., width]; width is even. Whole numbers and fractions alike."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=number.device)
    angle = number[..., None] * torch.exp(index * (-math.log(10000) / (half - shift)))  # [..., half]
    sin, cos = torch.sin(angle), torch.cos(angle)
    return torch.cat([sin, cos] if order == "sin_cos" else [cos, sin], dim=-1)  # [..., width]


class TimeEmbedding(nn.Module):
    """[B] float32 to [B, out_width]: sinusoids, linear, SiLU, linear.

    two_times: [B, 2], the time and how far the answer leads from it; the sum of two such embeddings, the second 0 at first.
    """

    def __init__(self, width: int, out_width: int, order: Order = "cos_sin", shift: int = 0, two_times: bool = False):
        super().__init__()
        self.width, self.order, self.shift = width, order, shift
        self.linear1 = nn.Linear(width, out_width)
        self.linear2 = nn.Linear(out_width, out_width)
        self.span = TimeEmbedding(width, out_width, order, shift) if two_times else None

    def quieten(self) -> None:
        """The last act of a network's initialisation."""
        if self.span is not None:
            nn.init.zeros_(self.span.linear2.weight)
            nn.init.zeros_(self.span.linear2.bias)

    def forward(self, time: Tensor) -> Tensor:
        if self.span is not None:
            return self._of(time[:, 0]) + self.span(time[:, 1])  # [B, out_width]
        return self._of(time)  # [B, out_width]

    def _of(self, time: Tensor) -> Tensor:
        waves = sinusoids(time.float(), self.width, self.order, self.shift)  # [B, width]
        return self.linear2(nn.functional.silu(self.linear1(waves)))  # [B, out_width]


class Waves(nn.Module):
    """[B] float32 to [B, width], cosines first: angles 2 pi bandwidth g_i time, with g_i drawn from a Gaussian and never
    trained (Tancik et al. 2020, "Fourier features", eq. 5; Song et al. 2021, appendix G, with a bandwidth of 16)."""

    frequencies: Tensor

    def __init__(self, width: int, bandwidth: float):
        super().__init__()
        self.register_buffer("frequencies", bandwidth * torch.randn(width // 2))

    def forward(self, time: Tensor) -> Tensor:
        angle = 2 * math.pi * time.float()[:, None] * self.frequencies  # [B, width / 2]
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)  # [B, width]
