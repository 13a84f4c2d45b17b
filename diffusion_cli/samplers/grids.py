"""Where the steps land: grids of times 1 = t_0 > t_1 > ... > t_n = 0, in float64, for any schedule.

leading, linspace and trailing choose among the N indices of a table (diffusers' names; Lin et al. 2024, table 2), index k at
t = (k + 1) / N; on a schedule without a table they mean the same times. What a grid refuses, it refuses by a ValueError.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from diffusion_cli.schedules import Schedule


class Grid(ABC):
    @abstractmethod
    def times(self, steps: int, schedule: Schedule) -> Tensor:
        """[steps + 1] float64, falling; the last is 0."""


def _line(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


def _to_zero(times: Tensor) -> Tensor:
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def _of_sigma(sigma: Tensor, schedule: Schedule) -> Tensor:
    """The times [n] at which sigma / alpha is sigma [n]."""
    return schedule.t_of_log_snr(-2 * torch.log(sigma))


def _log_sigmas(sigma_min: float, sigma_max: float, schedule: Schedule) -> tuple[float, float]:
    """Logarithms of both ends of sigma / alpha, the upper one no higher than the schedule's own."""
    if sigma_min >= sigma_max:
        raise ValueError(
            f"sampler.grid.sigma_min is {sigma_min} and sampler.grid.sigma_max {sigma_max}: sigma_min must be below"
        )
    end = -float(schedule.log_snr(torch.ones((), dtype=torch.float64))) / 2
    low, high = math.log(sigma_min), min(math.log(sigma_max), end)
    if low >= high:
        raise ValueError(
            f"sampler.grid.sigma_min is {sigma_min}, but this schedule ends at {math.exp(end):.4g}: it must be below"
        )
    return low, high


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
        low, high = (math.exp(end / self.rho) for end in _log_sigmas(self.sigma_min, self.sigma_max, schedule))
        return _to_zero(_of_sigma(_line(high, low, steps) ** self.rho, schedule))


@dataclass(frozen=True)
class Exponential(Grid):
    """log(sigma / alpha) falls from that of sigma_max (or the schedule's end) to that of sigma_min as u^rho, u from 1 to 0 in
    equal steps: k-diffusion's exponential grid, and its polyexponential one with another rho than 1."""

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 1.0

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        low, high = _log_sigmas(self.sigma_min, self.sigma_max, schedule)
        return _to_zero(_of_sigma(torch.exp(low + (high - low) * _line(1, 0, steps) ** self.rho), schedule))


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
        if end >= self.high:
            raise ValueError(f"sampler.grid.high is {self.high}, but this schedule's log_snr ends at {end:.4g}: raise it")
        return _to_zero(schedule.t_of_log_snr(_line(max(self.low, end), self.high, steps)))


@dataclass(frozen=True)
class Leading(Grid):
    """Indices 0, N//n, 2 (N//n) ...: starts a little below pure noise. offset: added to each as far as the table goes (Stable
    Diffusion has 1)."""

    table: PositiveInt = 1000
    offset: NonNegativeInt = 0

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        _check_table(steps, self.table)
        k = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (self.table // steps)
        return _to_zero((k + min(self.offset, self.table - 1 - float(k[0])) + 1) / self.table)


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
class ShiftedGrid(Grid):
    """Another grid moved towards the noise: t -> f t / (1 + (f - 1) t), its ends unmoved.

    On the straight line this makes sigma / alpha `factor` times larger at every step: the shift of flow models for large
    pictures (Esser et al. 2024, eq. 23). factor below 1 moves towards the data.
    """

    grid: Grid
    factor: PositiveFloat = 3.0

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        t = self.grid.times(steps, schedule)
        return self.factor * t / (1 + (self.factor - 1) * t)


@dataclass(frozen=True)
class Listed(Grid):
    """The numbers `at`, falling: the times t, or values of sigma / alpha, to ask at. The 0 at the end may be left out.

    For grids that were searched for (Sabour et al. 2024, "Align your steps") and for distilled models.
    """

    at: tuple[float, ...]
    of: Literal["t", "sigma"] = "t"

    def __post_init__(self) -> None:
        at = self.asked
        if not at or any(a <= b for a, b in pairwise((*at, 0.0))) or (self.of == "t" and at[0] > 1):
            span = "from 1 or below to 0" if self.of == "t" else "to 0"
            raise ValueError(f"at is {list(self.at)}: a list of numbers that fall {span} is needed")

    @property
    def asked(self) -> tuple[float, ...]:
        """`at` without the end."""
        return self.at[:-1] if self.at and self.at[-1] == 0 else self.at

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        if steps != len(self.asked):
            n = len(self.asked)
            raise ValueError(f"sampler.steps is {steps}, but sampler.grid.at lists {n}: write sampler.steps={n}")
        at = torch.tensor(self.asked, dtype=torch.float64)
        return _to_zero(at if self.of == "t" else _of_sigma(at, schedule))


@dataclass(frozen=True)
class Beta(Grid):
    """Quantiles of a Beta distribution: smaller steps at both ends (Lee et al. 2024, "Beta sampling is all you need")."""

    a: PositiveFloat = 0.6
    b: PositiveFloat = 0.6

    def times(self, steps: int, schedule: Schedule) -> Tensor:
        from scipy.special import betaincinv  # takes a third of a second to import

        return torch.from_numpy(betaincinv(self.a, self.b, _line(1, 0, steps + 1).numpy()))


def _check_table(steps: int, table: int) -> None:
    if steps > table:
        raise ValueError(f"sampler.steps is {steps}, but the grid's table has only {table} indices: raise sampler.grid.table")
