"""Noise whose pixels go together, on any schedule: what a picture is as a whole, its brightness above all, is noised too.

White noise leaves a picture's mean nearly as it was: of n pixels it moves it by 1 / sqrt(n), so that a network need never
learn to make it, and a sampler that starts from noise makes pictures of middling brightness. With coloured noise

    n = white + strength * (one number for each channel)                          covariance I + strength^2 1 1^T per channel
    n = sum_k discount^k * (white of 1 / 2^k the size, each pixel a block)        for k = 0, 1 ... down to a single pixel

the mean is noised as strongly as it is to be. Offset: Guttenberg 2023, "Diffusion with offset noise". Pyramid: Whitaker 2023,
"Multi-resolution noise for diffusion model training", here with blocks and factors of 2 where that has smooth patches of random
sizes, so that every pixel has one variance. A schedule says what its noise is, so training, the start of a walk and
every sampler's fresh noise are of one kind; the papers start from white noise, which such a network has never seen.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.randomness import Source
from diffusion_cli.ranges import PositiveFloat, Rate
from diffusion_cli.schedules import Schedule


@dataclass(frozen=True)
class Coloured(Schedule):
    """alpha and sigma are those of another schedule, whose noise is white and Gaussian."""

    base: Schedule

    white = False

    def __post_init__(self) -> None:
        if not (self.base.gaussian and self.base.white):
            raise ValueError("base has noise of another kind already: choose a schedule with white Gaussian noise")

    @abstractmethod
    def noise(self, source: Source, stream: str, shape: tuple[int, ...]) -> Tensor: ...

    @property
    def reaches_zero(self) -> bool:  # type: ignore[override]
        return self.base.reaches_zero

    @property
    def earliest(self) -> float:
        return self.base.earliest

    def alpha(self, t: Tensor) -> Tensor:
        return self.base.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.base.sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return self.base.log_snr(t)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.base.t_of_log_snr(log_snr)

    def of_log_snr(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.of_log_snr(log_snr)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.velocity(t)

    def timestep(self, t: Tensor) -> Tensor:
        return self.base.timestep(t)

    def times(self, steps: int) -> Tensor:
        return self.base.times(steps)


@dataclass(frozen=True)
class Offset(Coloured):
    """strength: of the number that is added to a whole channel. unit: whether the variance of a pixel stays 1."""

    strength: PositiveFloat = 0.1
    unit: bool = False

    def noise(self, source: Source, stream: str, shape: tuple[int, ...]) -> Tensor:
        whole = source.normal(f"{stream}, offset", (shape[0], 1, 1))  # [B, C, 1, 1]
        noise = self.base.noise(source, stream, shape) + self.strength * whole
        return noise / (1 + self.strength**2) ** 0.5 if self.unit else noise


@dataclass(frozen=True)
class Pyramid(Coloured):
    """discount: of each level against the finer one. unit: whether the variance of a pixel stays 1."""

    discount: Rate = 0.8
    unit: bool = True

    def noise(self, source: Source, stream: str, shape: tuple[int, ...]) -> Tensor:
        noise, variance, k = self.base.noise(source, stream, shape), 1.0, 0
        size = list(shape[1:])
        while max(size) > 1:
            k, size = k + 1, [-(-side // 2) for side in size]
            coarse = source.normal(f"{stream}, level {k}", (shape[0], *size))  # [B, C, h, w]
            noise = noise + self.discount**k * nnf.interpolate(coarse, list(shape[1:]), mode="nearest")
            variance += self.discount ** (2 * k)
        return noise / torch.tensor(variance).sqrt() if self.unit else noise
