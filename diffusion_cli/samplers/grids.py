"""Where the steps land: grids of times 1 = t_0 > t_1 > ... > t_n = 0, in float64, for any schedule.

leading, linspace and trailing choose among the N indices of a table (diffusers' names; Lin et al. 2024, table 2), index k at
t = (k + 1) / N; on a schedule without a table they mean the same times.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.ranges import Fraction, PositiveFloat, PositiveInt
from diffusion_cli.schedules import Schedule


class Grid(ABC):
    @abstractmethod
    def times(self, steps: int, schedule: Schedule) -> Tensor:
        """[steps + 1] float64, falling; the last is 0."""


def _line(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


def _to_zero(times: Tensor) -> Tensor:
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class Own(Grid):
    """The schedule's own walk: EDM's is Karras' grid, the others' is uniform."""

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        return schedule.times(steps)


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal steps in t."""

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        return _line(1, 0, steps + 1)


@dataclass(frozen=True)
class Quadratic(Grid):
    """Equal steps in sqrt(t), so smaller ones near the data (Song et al. 2021, DDIM, appendix D.2)."""

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        return _line(1, 0, steps + 1) ** 2


@dataclass(frozen=True)
class Karras(Grid):
    """Equal steps in (sigma / alpha)^(1 / rho), sigma_max (or the schedule's end) to sigma_min (Karras et al. 2022, eq. 5)."""

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        end = float(torch.exp(-schedule.log_snr(torch.ones((), dtype=torch.float64)) / 2))
        high, low = min(self.sigma_max, end) ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigma = _line(high, low, steps) ** self.rho
        return _to_zero(schedule.t_of_log_snr(-2 * torch.log(sigma)))


@dataclass(frozen=True)
class LogSNR(Grid):
    """Equal steps in log_snr between these ends (or the schedule's), then to 0 (Lu et al. 2022, "DPM-Solver", section 3.4)."""

    low: float = -10.0
    high: float = 10.0

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high {self.high}: log_snr must rise from low to high")

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        end = float(schedule.log_snr(torch.ones((), dtype=torch.float64)))
        return _to_zero(schedule.t_of_log_snr(_line(max(self.low, end), self.high, steps)))


@dataclass(frozen=True)
class Leading(Grid):
    """Indices 0, N//n, 2 (N//n) ...: starts a little below pure noise."""

    table: PositiveInt = 1000

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        _check_table(steps, self.table)
        k = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (self.table // steps)
        return _to_zero((k + 1) / self.table)


@dataclass(frozen=True)
class Linspace(Grid):
    """Indices evenly from N - 1 to 0, both included."""

    table: PositiveInt = 1000

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        _check_table(steps, self.table)
        return _to_zero((_line(self.table - 1, 0, steps).round() + 1) / self.table)


@dataclass(frozen=True)
class Trailing(Grid):
    """Indices N - 1, N - 1 - N/n ...: starts at pure noise."""

    table: PositiveInt = 1000

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        _check_table(steps, self.table)
        return _to_zero(torch.round(self.table - torch.arange(steps, dtype=torch.float64) * self.table / steps) / self.table)


@dataclass(frozen=True)
class Tail(Grid):
    """The end of another grid, from time `start` on: what is left to walk for a picture that was noised only so far."""

    grid: Grid
    start: Fraction

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        times = self.grid.times(steps, schedule)
        start = torch.tensor([self.start], dtype=torch.float64)
        return torch.cat([start, times[times < self.start - 1e-9]])


@dataclass(frozen=True)
class Beta(Grid):
    """Quantiles of a Beta distribution: smaller steps at both ends (Lee et al. 2024, "Beta sampling is all you need")."""

    a: PositiveFloat = 0.6
    b: PositiveFloat = 0.6

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        # the distribution function by the midpoint rule; t = sin^2(u) takes the poles of the density away for a, b >= 1/2
        u = _line(0, math.pi / 2, 200_001)
        middle = (u[1:] + u[:-1]) / 2
        density = torch.sin(middle) ** (2 * self.a - 1) * torch.cos(middle) ** (2 * self.b - 1)
        cdf = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(density, 0)])
        cdf = cdf / cdf[-1]
        wanted = _line(1, 0, steps + 1)
        place = torch.searchsorted(cdf, wanted).clamp(1, len(cdf) - 1)
        low, high = cdf[place - 1], cdf[place]
        angle = u[place - 1] + (wanted - low) / (high - low).clamp(min=1e-300) * (u[1] - u[0])
        times = torch.sin(angle) ** 2
        times[0], times[-1] = 1.0, 0.0
        return times


def _check_table(steps: int, table: int) -> None:
    if steps > table:
        raise ValueError(f"sampler.steps is {steps}, but the grid's table has only {table} indices: raise sampler.grid.table")
