"""Norms of the error of F: pictures [B, C, H, W] -> [B], a mean over channels and pixels."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.ranges import PositiveFloat


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
