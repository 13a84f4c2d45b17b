"""What is known of a picture, y = A x0 + noise, and the operators A of the edits.

Every A here has orthogonal rows of one length, A A^T = unit I, so its pseudo-inverse is A^+ = A^T / unit, and the picture
nearest to x0 that agrees with y is

    x0 + A^+ (y - A x0)        the range-null space decomposition (Wang et al. 2023, "DDNM", eq. 10)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_cli.schedules import Schedule, over_pictures

SPREAD = 0.5  # standard deviation of pixels in [-1, 1], about (EDM's sigma_data): where a formula needs some prior


class Operator(ABC):
    """A, for pictures x [B, C, H, W] and what is known of them, y [B, ...]."""

    unit: float  # A A^T = unit I
    share: float  # of the picture's numbers: how many are known

    @abstractmethod
    def measure(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def back(self, y: Tensor) -> Tensor:
        """A^+ y: [B, C, H, W]."""

    def agree(self, x: Tensor, y: Tensor) -> Tensor:
        """The picture nearest to x with A x = y."""
        return x + self.back(y - self.measure(x))

    def to(self, x: Tensor) -> "Operator":
        """The same on the device of x."""
        return self


@dataclass(frozen=True)
class Seen(Operator):
    """Some pixels: mask bool [H, W] or [C, H, W], true where they are known. What is not known of y is 0."""

    mask: Tensor
    unit = 1.0

    @property
    def share(self) -> float:  # type: ignore[override]
        return float(self.mask.float().mean())

    def measure(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0)

    def back(self, y: Tensor) -> Tensor:
        return y

    def agree(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.mask, y, x)  # to the bit

    def to(self, x: Tensor) -> "Seen":
        return Seen(self.mask.to(x.device))


@dataclass(frozen=True)
class Grey(Operator):
    """The mean of the channels: y [B, 1, H, W]."""

    channels: int

    @property
    def unit(self) -> float:  # type: ignore[override]
        return 1 / self.channels

    share = unit

    def measure(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)

    def back(self, y: Tensor) -> Tensor:
        return y.expand(-1, self.channels, -1, -1)


@dataclass(frozen=True)
class Blocks(Operator):
    """The means of blocks of factor x factor pixels: y [B, C, H / factor, W / factor]."""

    factor: int

    @property
    def unit(self) -> float:  # type: ignore[override]
        return 1 / self.factor**2

    share = unit

    def measure(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, self.factor)

    def back(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


@dataclass(frozen=True)
class Known:
    """y [1, ...] = A x0 + noise n. noise: standard deviation, in units in which a picture lies within [-1, 1]; 0: exact."""

    operator: Operator
    y: Tensor
    noise: float = 0.0

    def to(self, x: Tensor) -> "Known":
        return replace(self, operator=self.operator.to(x), y=self.y.to(x))

    def lacking(self, x0: Tensor) -> Tensor:
        """y - A x0 [B, ...]."""
        return self.y - self.operator.measure(x0)

    def agree(self, x0: Tensor) -> Tensor:
        """The nearest picture [B, C, H, W] that agrees with y exactly."""
        return self.operator.agree(x0, self.y)

    def doubt(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The variance of y given x_t at t [] or [B], had pixels the variance SPREAD^2 and nothing to do with each other."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        foreseen = (SPREAD * sigma) ** 2 / ((SPREAD * alpha) ** 2 + sigma**2)  # of a pixel of x0
        return self.operator.unit * foreseen + self.noise**2

    def nearer(self, schedule: Schedule, x0: Tensor, t: Tensor) -> Tensor:
        """x0 moved to agree with y; with noise only as far as x0 is less certain than y."""
        if self.noise == 0:
            return self.agree(x0)
        share = 1 - self.noise**2 / self.doubt(schedule, t)
        return x0 + over_pictures(share, x0) * self.operator.back(self.lacking(x0))
