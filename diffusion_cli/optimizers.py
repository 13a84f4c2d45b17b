"""Optimizers as recipes: the rule that updates the weights, and the learning rate as a pure function of the step.

Nothing of the rate is saved: a resumed run computes it again from the step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from diffusion_cli.ranges import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Rate


class Decay(ABC):
    """How the learning rate falls over a run."""

    @abstractmethod
    def factor(self, step: int, total: int) -> float:
        """Factor on the rate at step 0, 1 ... of `total`."""


@dataclass(frozen=True)
class Constant(Decay):
    def factor(self, step: int, total: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Decay):
    def factor(self, step: int, total: int) -> float:
        return max(0.0, 1 - step / total)


@dataclass(frozen=True)
class Cosine(Decay):
    """Half a cosine (Loshchilov and Hutter 2017)."""

    def factor(self, step: int, total: int) -> float:
        return (1 + math.cos(math.pi * min(1.0, step / total))) / 2


@dataclass(frozen=True)
class Late(Decay):
    """Constant, then linear to 0 over the last `share` of the run."""

    share: Fraction = 0.3

    def factor(self, step: int, total: int) -> float:
        return min(1.0, max(0.0, 1 - step / total) / self.share) if self.share else 1.0


@dataclass(frozen=True)
class Steps(Decay):
    """Times `by` after every `every` steps, but the rate never falls below floor (as a share of the first rate)."""

    every: PositiveInt = 5000
    by: Fraction = 0.9
    floor: Fraction = 0.0

    def factor(self, step: int, total: int) -> float:
        return max(self.floor, self.by ** (step // self.every))


class Optimizer(ABC):
    """A recipe: makes a torch optimizer and says the rate at each step."""

    clip: float | None

    @abstractmethod
    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer: ...

    @abstractmethod
    def rate(self, step: int, total: int) -> float:
        """The learning rate of step 0, 1 ... of `total`."""


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Kingma and Ba 2015; Loshchilov and Hutter 2019); with weight_decay 0, Adam.

    warmup: steps of a linear rise from 0; clip: largest norm of the gradient, None for no limit.
    """

    lr: PositiveFloat
    betas: tuple[Rate, Rate]
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup: NonNegativeInt
    clip: PositiveFloat | None
    decay: Decay

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )

    def rate(self, step: int, total: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * rise * self.decay.factor(step, total)
