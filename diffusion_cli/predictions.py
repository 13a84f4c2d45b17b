"""What the network's raw output F means: one row (a, b) of a 2 x 2 system.

Every target in use is linear in data and noise, F = a(t) x0 + b(t) noise. Together with the noised picture,

    [x_t]   [alpha sigma] [x0   ]        det   = alpha b - sigma a
    [ F ] = [  a     b  ] [noise]        x0    = ( b x_t - sigma F) / det
                                         noise = (alpha F - a x_t ) / det

so a prediction is its row; what to train on and how to read the answer follow. c_in scales the network's input and c_noise is
what it is told of the time. A mean-squared loss on F with weight 1 is each paper's own weighting.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.ranges import PositiveFloat, PositiveInt
from diffusion_cli.schedules import Schedule, over_pictures

# of log(sigma / alpha) / 4 where alpha falls to 0 and the ratio has no end: a ratio of 400, of which nothing is seen. A picture
# in 400 exceeds it where t is uniform on the straight line; EDM ends at 80. Told infinity, a network has met no such thing
FARTHEST = 1.5


@dataclass(frozen=True)
class Prediction(ABC):
    """One meaning of F on one schedule. Times t are [B] or []; pictures [B, C, H, W]."""

    schedule: Schedule

    @abstractmethod
    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) with F = a x0 + b noise."""

    def c_in(self, t: Tensor) -> Tensor:
        """Factor on x_t before the network sees it."""
        return torch.ones_like(t)

    def c_noise(self, t: Tensor) -> Tensor:
        """The number by which the network is told the time."""
        return self.schedule.timestep(t)

    def determinant(self, t: Tensor) -> Tensor:
        """alpha b - sigma a: an error dF in F is an error -sigma dF / det in x0 and alpha dF / det in the noise."""
        a, b = self.row(t)
        return self.schedule.alpha(t) * b - self.schedule.sigma(t) * a

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The F [B, C, H, W] that the network should give."""
        a, b = self.row(t)
        return over_pictures(a, x0) * x0 + over_pictures(b, x0) * noise

    def decode(self, F: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """F and x_t [B, C, H, W] at t -> (x0, noise)."""
        a, b = self.row(t)
        det = self.determinant(t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = over_pictures(b / det, x) * x - over_pictures(sigma / det, x) * F
        noise = over_pictures(alpha / det, x) * F - over_pictures(a / det, x) * x
        return x0, noise


@dataclass(frozen=True)
class _NeedsSignal(Prediction):
    """det = alpha (times a power of sigma): x0 cannot be read off where nothing of it is left."""

    def __post_init__(self) -> None:
        if self.schedule.reaches_zero:
            name = type(self).__name__.lower()
            raise ValueError(
                f"prediction={name} cannot be used on a schedule that ends in pure noise (alpha = 0 at t = 1): "
                "choose prediction=v, x0, flow or edm, or another schedule"
            )


@dataclass(frozen=True)
class Eps(_NeedsSignal):
    """F = noise (Ho et al. 2020)."""

    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class X0(Prediction):
    """F = x0, the picture itself."""

    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


@dataclass(frozen=True)
class V(Prediction):
    """F = alpha noise - sigma x0 (Salimans and Ho 2022, appendix D)."""

    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -self.schedule.sigma(t), self.schedule.alpha(t)


@dataclass(frozen=True)
class Velocity(Prediction):
    """F = dx_t / dt = alpha' x0 + sigma' noise; noise - x0 on the straight line (Lipman et al. 2023)."""

    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.velocity(t)


@dataclass(frozen=True)
class Preconditioned(Prediction):
    """EDM's F, whose input and target have unit variance at every noise level (Karras et al. 2022, table 1 and eq. 7-8).

    Theirs is x0 = c_skip x + c_out F on alpha = 1. Written as a row and with alpha left in,
    (a, b) = (sigma / sigma_data, -alpha sigma_data) / S with S^2 = sigma^2 + alpha^2 sigma_data^2: finite on any schedule.
    """

    sigma_data: PositiveFloat = 0.5

    def _scale(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.schedule.sigma(t) ** 2 + (self.schedule.alpha(t) * self.sigma_data) ** 2)

    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        S = self._scale(t)
        return self.schedule.sigma(t) / (self.sigma_data * S), -self.schedule.alpha(t) * self.sigma_data / S

    def c_in(self, t: Tensor) -> Tensor:
        return 1 / self._scale(t)

    def c_noise(self, t: Tensor) -> Tensor:
        return (-self.schedule.log_snr(t) / 8).clamp(-10, FARTHEST if self.schedule.reaches_zero else 10)


@dataclass(frozen=True)
class Score(_NeedsSignal):
    """F = -noise / sigma, the gradient of the log-density of x_t (Song et al. 2021)."""

    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -1 / self.schedule.sigma(t)


@dataclass(frozen=True)
class UnitScore(_NeedsSignal):
    """F = -noise / s, told s, with s = sigma / 2: the score of pictures in [0, 1], where noise is half as large as in [-1, 1].

    The networks of Song et al. 2021 on the variance-exploding SDE, as ScoreSdeVePipeline of diffusers has them.
    """

    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -2 / self.schedule.sigma(t)

    def c_noise(self, t: Tensor) -> Tensor:
        return self.schedule.sigma(t) / 2


@dataclass(frozen=True)
class NextStep(Prediction):
    """F = x_s, the same picture with the same noise one step cleaner: s = t - 1 / steps (the 16-step CIFAR-10 tutorial)."""

    steps: PositiveInt = 16

    def row(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = (t - 1 / self.steps).clamp(min=0)
        return self.schedule.alpha(s), self.schedule.sigma(s)

    def c_noise(self, t: Tensor) -> Tensor:
        return (1 - t) * self.steps  # the index of the step, from 0
