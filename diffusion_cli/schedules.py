"""Noise schedules: how much of the data and how much of the noise a picture holds at time t.

    x_t = alpha(t) x0 + sigma(t) noise,        t = 0 is data, t = 1 is noise, everywhere

log_snr(t) = 2 log(alpha / sigma) falls from +inf at t = 0. A schedule says alpha and sigma (or log_snr), the time of a given
log_snr, and what the noise is. Times are tensors of any shape in [0, 1] and results have their shape and dtype; tables are
kept in float64. The ends are exact: sigma(0) = 0, and alpha(1) = 0 where `reaches_zero` says so.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.beta_curves import CURVES, to_zero_terminal
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import Fraction, PositiveFloat, PositiveInt, Rate


def over_pictures(coefficient: Tensor, x: Tensor) -> Tensor:
    """[B] or [] -> a shape that multiplies x [B, ...], in the dtype and on the device of x."""
    coefficient = coefficient.to(x)
    return coefficient.view(-1, *[1] * (x.dim() - 1)) if coefficient.dim() else coefficient


class Schedule(ABC):
    """One noise schedule. Frozen: it holds numbers, no state."""

    reaches_zero = False  # is alpha(1) = 0, so that x_1 is noise alone and says nothing of x0?
    gaussian = True  # is the noise Gaussian, so that all of a great circle between two noises is noise?
    white = True  # is the noise of each pixel its own?

    @property
    def earliest(self) -> float:
        """About the earliest time that training asks about: earlier ones are not to be relied on."""
        return 1e-3

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The share of the data at t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The share of the noise at t."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Logarithm of the signal-to-noise ratio alpha^2 / sigma^2: +inf at t = 0."""
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of log_snr, within [0, 1]: by bisection, unless the schedule knows better."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60):
            middle = (low + high) / 2
            early = self.log_snr(middle) > log_snr
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return high

    def of_log_snr(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) where the schedule has this log_snr; a family known in closed form goes on past its own ends."""
        t = self.t_of_log_snr(log_snr)
        return self.alpha(t), self.sigma(t)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt) by forward differentiation, in float64: at the ends float32 leaves no digit of it.

        Where log_snr is infinite the formula is 0 times infinity; its limit is taken 1e-7 inside.
        """
        inside = t.double().clamp(1e-7, 1 - 1e-7 if self.reaches_zero else 1)
        one = torch.ones_like(inside)
        alpha = torch.func.jvp(self.alpha, (inside,), (one,))[1]
        sigma = torch.func.jvp(self.sigma, (inside,), (one,))[1]
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def timestep(self, t: Tensor) -> Tensor:
        """What a network is told of t by default: the scale of 1000 steps that time embeddings are made for."""
        return 1000 * t

    def times(self, steps: int) -> Tensor:
        """[steps + 1] float64: the schedule's own way of walking from noise to data (a sampler's grid `own`)."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def noise(self, source: Source, stream: str, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] of pure noise of unit scale: Gaussian unless the schedule says otherwise."""
        return source.normal(stream, shape)

    def mix(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [B, C, H, W] of x0 [B, C, H, W] and noise of the same shape at t [B] or []."""
        return over_pictures(self.alpha(t), x0) * x0 + over_pictures(self.sigma(t), x0) * noise

    def transfer(self, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The state at s < t of the straight path through x [B, C, H, W] at t, if x0 were the picture.

        DDIM's step on a variance-preserving schedule (Song et al. 2021, eq. 12), Euler's in sigma on EDM's (Karras et al.
        2022) and in t on the linear path. Finite at alpha_t = 0 and at sigma_s = 0; t > 0.
        """
        ratio = self.sigma(s) / self.sigma(t)
        return over_pictures(ratio, x) * x + over_pictures(self.alpha(s) - self.alpha(t) * ratio, x) * x0


class VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1, both from log_snr: the family of DDPM, of its cosine table and of the VP SDE."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor: ...

    def alpha(self, t: Tensor) -> Tensor:
        return self.of_log_snr(self.log_snr(t))[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.of_log_snr(self.log_snr(t))[1]

    def of_log_snr(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


class Knots(VariancePreserving):
    """A table of alpha^2 at N times (Ho et al. 2020, "Denoising diffusion probabilistic models").

    Index k stands at t = (k + 1) / N, so that t = 0 is clean data, and k is what the network is told. Between knots log_snr is
    linear in t; before the first, sigma / alpha is proportional to t; with a zero terminal, alpha / sigma falls linearly to 0
    over the last step.
    """

    @property
    @abstractmethod
    def alpha_bar(self) -> Tensor:
        """[N] float64, falling: alpha^2 at the knots; 0 last with a zero terminal."""

    @cached_property
    def knots(self) -> Tensor:
        """[N] float64: log_snr at the knots, falling; -inf last with a zero terminal."""
        return torch.log(self.alpha_bar) - torch.log1p(-self.alpha_bar)

    @property
    def reaches_zero(self) -> bool:  # type: ignore[override]
        return bool(self.alpha_bar[-1] == 0)

    @property
    def earliest(self) -> float:
        return 1 / len(self.knots)

    def log_snr(self, t: Tensor) -> Tensor:
        knots = _knots_on(self, t.device)
        n = len(knots)
        place = t.double() * n - 1  # the knot's index, continued between knots
        k = place.floor().clamp(0, n - 2).long()
        w = place - k
        between = torch.lerp(knots[k], knots[k + 1].clamp(min=-1e3), w)
        if self.reaches_zero:
            between = torch.where(k == n - 2, knots[k] + 2 * torch.log1p(-w.clamp(max=1)), between)
        return torch.where(place < 0, knots[0] - 2 * torch.log(place + 1), between).to(t.dtype)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        knots, l = _knots_on(self, log_snr.device), log_snr.double().contiguous()
        n = len(knots)
        k = (torch.searchsorted(-knots, -l) - 1).clamp(0, n - 2)
        w = (knots[k] - l) / (knots[k] - knots[k + 1].clamp(min=-1e3))
        if self.reaches_zero:
            w = torch.where(k == n - 2, -torch.expm1((l - knots[k]) / 2), w)
        place = torch.where(l > knots[0], torch.exp((knots[0] - l) / 2) - 1, k + w)
        return ((place + 1) / n).clamp(max=1).to(log_snr.dtype)

    def timestep(self, t: Tensor) -> Tensor:
        return len(self.knots) * t - 1


@dataclass(frozen=True)
class Betas(Knots):
    """A table of N betas by the name of its curve: alpha_k^2 = prod_{i <= k} (1 - beta_i).

    curve: linear (Ho et al. 2020), scaled_linear (linear in sqrt(beta), Rombach et al. 2022), sigmoid (Xu et al. 2022,
    GeoDiff), laplace (Hang and Gu 2024), cosine (Nichol and Dhariwal 2021, eq. 17, betas at most 0.999). The last two have no
    use for first and last. zero_terminal_snr rescales the table to end in pure noise (Lin et al. 2024, algorithm 1).
    """

    curve: Literal["linear", "scaled_linear", "sigmoid", "laplace", "cosine"] = "linear"
    steps: PositiveInt = 1000
    first: Rate = 1e-4
    last: Rate = 0.02
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}: a table of betas needs at least 2")
        if self.first > self.last:
            raise ValueError(f"first is {self.first} and last {self.last}: betas must not fall")
        if self.first == 0 and self.curve in ("linear", "scaled_linear"):
            raise ValueError("first is 0: the first beta must add some noise")
        _ = self.knots  # a table that cannot be made is an error now, not at the first batch

    @cached_property
    def alpha_bar(self) -> Tensor:
        alpha_bar = torch.cumprod(1 - CURVES[self.curve](self.steps, self.first, self.last), dim=0)
        return to_zero_terminal(alpha_bar) if self.zero_terminal_snr else alpha_bar

    @property
    def reaches_zero(self) -> bool:  # type: ignore[override]
        return self.zero_terminal_snr


@dataclass(frozen=True)
class Tabulated(Knots):
    """A table of N betas in numbers, as a pipeline of diffusers may bring it along (trained_betas).

    told_first: by which number the network is told the first knot. zero_terminal_snr: as in Betas.
    """

    betas: tuple[Fraction, ...]
    told_first: Literal[0, 1] = 0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if len(self.betas) < 2 or not all(beta > 0 for beta in self.betas) or 1 in self.betas[:-1]:
            raise ValueError("betas: a table of at least two numbers above 0 is needed, and none but the last may be 1")

    @cached_property
    def alpha_bar(self) -> Tensor:
        alpha_bar = torch.cumprod(1 - torch.tensor(self.betas, dtype=torch.float64), dim=0)
        return to_zero_terminal(alpha_bar) if self.zero_terminal_snr else alpha_bar

    def timestep(self, t: Tensor) -> Tensor:
        return len(self.betas) * t - 1 + self.told_first


@cache
def _knots_on(table: Knots, device: torch.device) -> Tensor:
    """The knots where they are needed, copied there once: a copy at every step would make a GPU wait."""
    return table.knots.to(device)


@dataclass(frozen=True)
class VP(VariancePreserving):
    """The variance-preserving SDE with a linear beta(t) (Song et al. 2021, "Score-based generative modeling", eq. 32-33)."""

    beta_min: PositiveFloat = 0.1
    beta_max: PositiveFloat = 20.0

    def __post_init__(self) -> None:
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min is {self.beta_min} and beta_max {self.beta_max}: beta must not fall")

    def log_snr(self, t: Tensor) -> Tensor:
        integral = t * self.beta_min + t**2 * (self.beta_max - self.beta_min) / 2  # of beta, 0 to t: -2 log alpha
        return -torch.log(torch.expm1(integral))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        end = (self.beta_min + self.beta_max) / 2  # of the integral, at t = 1
        integral = torch.nn.functional.softplus(-log_snr).clamp(max=end)  # log(1 + exp(-l))
        rise = self.beta_max - self.beta_min
        return (2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * rise * integral))).clamp(max=1)


@dataclass(frozen=True)
class VE(Schedule):
    """The variance-exploding SDE (Song et al. 2021, eq. 30-31), with its true marginal sigma(t)^2 - sigma(0)^2: 0 at t = 0."""

    sigma_min: PositiveFloat = 0.01
    sigma_max: PositiveFloat = 50.0

    def __post_init__(self) -> None:
        _check_sigmas(self.sigma_min, self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.sqrt(torch.expm1(2 * math.log(self.sigma_max / self.sigma_min) * t))

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        growth = torch.log1p(torch.exp(-log_snr) / self.sigma_min**2)
        return (growth / (2 * math.log(self.sigma_max / self.sigma_min))).clamp(max=1)

    def of_log_snr(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_snr), torch.exp(-log_snr / 2)


@dataclass(frozen=True)
class EDM(Schedule):
    """x_t = x0 + sigma noise (Karras et al. 2022, "Elucidating the design space"), with sigma = sigma_max t^rho.

    A uniform walk in t is then nearly their grid (eq. 5); `times` is exactly it: from sigma_max to sigma_min, then 0.
    """

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0

    def __post_init__(self) -> None:
        _check_sigmas(self.sigma_min, self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t**self.rho

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp((-log_snr / 2 - math.log(self.sigma_max)) / self.rho).clamp(max=1)

    def of_log_snr(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_snr), torch.exp(-log_snr / 2)

    def times(self, steps: int) -> Tensor:
        end = (self.sigma_min / self.sigma_max) ** (1 / self.rho)
        return torch.cat([torch.linspace(1, end, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class Flow(Schedule):
    """The straight line from data to noise (Liu et al. 2023; Lipman et al. 2023): x_t = (1 - t) x0 + t noise."""

    reaches_zero = True

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class Mix(Flow):
    """The tutorials' mixing, x (1 - amount) + noise amount, with noise uniform over the range of a picture, [-1, 1]."""

    gaussian = False

    def noise(self, source: Source, stream: str, shape: tuple[int, ...]) -> Tensor:
        return 2 * source.uniform(stream, shape) - 1


@dataclass(frozen=True)
class Shifted(Schedule):
    """Another schedule with all its noise `factor` times stronger: log_snr(t) - 2 log(factor), in the same family.

    For larger pictures, whose neighbouring pixels average the noise away: factor = size / 64 on a cosine schedule (Hoogeboom
    et al. 2023, "Simple diffusion", eq. 4); 3 on the straight line for 1024 pixels (Esser et al. 2024, eq. 23).
    """

    base: Schedule
    factor: PositiveFloat = 3.0

    @property
    def reaches_zero(self) -> bool:  # type: ignore[override]
        return self.base.reaches_zero

    @property
    def gaussian(self) -> bool:  # type: ignore[override]
        return self.base.gaussian

    @property
    def white(self) -> bool:  # type: ignore[override]
        return self.base.white

    @property
    def earliest(self) -> float:
        return self.base.earliest

    def alpha(self, t: Tensor) -> Tensor:
        return self.of_log_snr(self.log_snr(t))[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.of_log_snr(self.log_snr(t))[1]

    def log_snr(self, t: Tensor) -> Tensor:
        return self.base.log_snr(t) - 2 * math.log(self.factor)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.base.t_of_log_snr(log_snr + 2 * math.log(self.factor))

    def of_log_snr(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.base.of_log_snr(log_snr)

    def timestep(self, t: Tensor) -> Tensor:
        return self.base.timestep(t)

    def times(self, steps: int) -> Tensor:
        return self.base.times(steps)

    def noise(self, source: Source, stream: str, shape: tuple[int, ...]) -> Tensor:
        return self.base.noise(source, stream, shape)


def _check_sigmas(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"sigma_min is {low} and sigma_max {high}: sigma_min must be below")
