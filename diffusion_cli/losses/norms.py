"""Norms of the error of F: pictures [B, C, H, W] -> [B], a mean over channels and pixels."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.ranges import Fraction, PositiveFloat


class Norm(ABC):
    @abstractmethod
    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        """[B, C, H, W] twice -> [B]."""


@dataclass(frozen=True)
class MSE(Norm):
    """Mean squared error."""

    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        return (F - target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class MAE(Norm):
    """Mean absolute error."""

    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        return (F - target).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class Huber(Norm):
    """Pseudo-Huber: sqrt(d^2 + c^2) - c, squared below c and absolute above (Charbonnier et al. 1997)."""

    c: PositiveFloat = 0.03

    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        return (torch.sqrt((F - target).square() + self.c**2) - self.c).flatten(1).mean(1)


@dataclass(frozen=True)
class Adaptive(Norm):
    """m / (m + c)^p taken as given, m the mean squared error: its gradient is that of m^(1 - p). p = 0.5 weighs every picture
    by its distance, not the square (pseudo-Huber of a whole picture: Song and Dhariwal 2023, eq. 11; Geng et al. 2024), p = 1
    all alike (Geng et al. 2025, "Mean flows", section 4.3). The value hardly falls while training; c is per pixel."""

    p: Fraction = 0.5
    c: PositiveFloat = 1e-6

    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        error = (F - target).square().flatten(1).mean(1)
        return error / (error.detach() + self.c) ** self.p
