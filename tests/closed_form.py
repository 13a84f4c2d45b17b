"""What the tests of the mathematics share: data with a denoiser in closed form, and the product of all that can be chosen.

For data N(m, s^2) and for mixtures of such, E[x0 | x_t] is known for any alpha and sigma, and so is the exact solution of the
probability-flow ODE: in one dimension the flow keeps the order of points, so it carries the quantiles of p_t to those of p_s.
"""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli import losses as losses  # the doors: importing them defines every subclass
from diffusion_cli import samplers as samplers
from diffusion_cli.coloured import Coloured, Offset, Pyramid
from diffusion_cli.schedules import (
    EDM,
    VE,
    VP,
    Betas,
    Flow,
    Mix,
    Schedule,
    Shifted,
    Tabulated,
    VariancePreserving,
    over_pictures,
)

torch.set_num_threads(1)

_NEED_ARGUMENTS = {
    Offset: [Offset(Flow()), Offset(EDM(), 0.3, True)],
    Pyramid: [Pyramid(Betas("cosine"))],
    Shifted: [Shifted(Flow()), Shifted(Betas("cosine"), 4.0), Shifted(EDM(), 2.0), Shifted(Betas(zero_terminal_snr=True))],
    Tabulated: [Tabulated((1e-3, 0.01, *(0.1,) * 40)), Tabulated((1e-3, 0.01, *(0.1,) * 40), 1, True)],
}
_GRIDS_THAT_NEED_ARGUMENTS: dict[type, list[samplers.Grid]] = {
    samplers.Tail: [samplers.Tail(samplers.Uniform(), 0.65), samplers.Tail(samplers.Own(), 1.0)],
    samplers.ShiftedGrid: [samplers.ShiftedGrid(samplers.Own(), 3.0), samplers.ShiftedGrid(samplers.Trailing(), 0.4)],
    samplers.Listed: [],  # says itself how many steps there are: tests/test_grids.py
}
_VARIANTS = [
    *(Betas(curve) for curve in ("scaled_linear", "sigmoid", "laplace", "cosine")),
    *(Betas(curve, zero_terminal_snr=True) for curve in ("linear", "scaled_linear", "cosine")),
    Betas(steps=50, last=0.3),
]


def concrete(base: type) -> list[type]:
    """Every class of the house below `base` that can be made: what a test runs over, so that a new one is picked up."""
    below = [c for sub in base.__subclasses__() for c in [sub, *concrete(sub)]]
    house = [c for c in below if c.__module__.startswith("diffusion_cli") and not c.__name__.startswith("_")]
    return sorted({c for c in house if not inspect.isabstract(c)}, key=lambda c: c.__name__)


def name(thing: object) -> str:
    """A short id for pytest."""
    if isinstance(thing, type):
        return thing.__name__
    if isinstance(thing, Shifted | Coloured):
        return f"{type(thing).__name__}-{name(thing.base)}"
    if isinstance(thing, Betas):
        return f"Betas-{thing.curve}{'-zero' if thing.zero_terminal_snr else ''}-{thing.steps}"
    if isinstance(thing, Tabulated):
        return f"Tabulated{'-zero' if thing.zero_terminal_snr else ''}"
    return type(thing).__name__


def all_schedules() -> list[Schedule]:
    """Every schedule with the defaults of its dataclass, and the variants of those that have some."""
    made = [s for c in concrete(Schedule) for s in (_NEED_ARGUMENTS[c] if c in _NEED_ARGUMENTS else [c()])]
    return made + _VARIANTS


def all_grids() -> list[samplers.Grid]:
    """Every grid with its defaults."""
    special = _GRIDS_THAT_NEED_ARGUMENTS
    return [g for c in concrete(samplers.Grid) for g in (special[c] if c in special else [c()])]


SCHEDULES = all_schedules()
GRIDS = all_grids()
FAMILIES = [Betas(), Betas("cosine"), VP(), EDM(), Flow(), VE()]  # one of each kind, for the slower tests
assert Mix() in SCHEDULES and Betas() in SCHEDULES


def preserves_variance(schedule: Schedule) -> bool:
    """Should alpha^2 + sigma^2 be 1? Shifting stays in the family."""
    return (
        preserves_variance(schedule.base)
        if isinstance(schedule, Shifted | Coloured)
        else isinstance(schedule, VariancePreserving)
    )


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pictures(batch: int, seed: int = 0) -> Tensor:
    """[batch, 2, 3, 2] float64 standard normal."""
    return torch.randn(batch, 2, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, wanted: Tensor, atol: float) -> None:
    """Every element within atol; never a signed sum, and not-a-number fails."""
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype).expand_as(got), rtol=0, atol=atol)


def distance_from_uniform(u: Tensor) -> float:
    """Kolmogorov and Smirnov's distance between points in [0, 1] and the uniform law; above 1.95 / sqrt(n) with p = 0.001."""
    u = u.double().flatten().sort().values
    rank = torch.arange(len(u), dtype=torch.float64) / len(u)
    return float(torch.maximum(u - rank, rank + 1 / len(u) - u).max())


@dataclass(frozen=True)
class Gaussian:
    """Pixels N(m, s^2), independent of each other."""

    m: float = 0.3
    s: float = 0.5

    def spread(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Standard deviation of x_t."""
        return torch.sqrt((schedule.alpha(t) * self.s) ** 2 + schedule.sigma(t) ** 2)

    def denoise(self, schedule: Schedule):
        def ask(x: Tensor, t: Tensor) -> Tensor:
            alpha, spread = schedule.alpha(t), self.spread(schedule, t)
            gain = over_pictures(alpha * self.s**2 / spread**2, x)
            return self.m + gain * (x - over_pictures(alpha, x) * self.m)

        return ask

    def carry(self, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x at t carried to s by the exact probability flow."""
        ratio = self.spread(schedule, s) / self.spread(schedule, t)
        return schedule.alpha(s) * self.m + ratio * (x - schedule.alpha(t) * self.m)


@dataclass(frozen=True)
class Mixture:
    """Pixels from two Gaussians: a denoiser that is not linear."""

    weights: tuple[float, ...] = (0.35, 0.65)
    means: tuple[float, ...] = (-0.6, 0.5)
    scales: tuple[float, ...] = (0.25, 0.35)

    def _parts(self, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each component of x_t; the components stand last."""
        alpha, sigma = schedule.alpha(t)[..., None], schedule.sigma(t)[..., None]
        return alpha * f64(*self.means), torch.sqrt((alpha * f64(*self.scales)) ** 2 + sigma**2)

    def denoise(self, schedule: Schedule):
        def ask(x: Tensor, t: Tensor) -> Tensor:
            mean, spread = (p.view(*t.shape, *[1] * (x.dim() - t.dim()), -1) for p in self._parts(schedule, t))
            alpha = over_pictures(schedule.alpha(t), x)[..., None] if t.dim() else schedule.alpha(t)
            away = (x[..., None] - mean) / spread
            share = torch.softmax(torch.log(f64(*self.weights)) - torch.log(spread) - away**2 / 2, dim=-1)
            expected = f64(*self.means) + alpha * f64(*self.scales) ** 2 / spread * away
            return (share * expected).sum(-1)

        return ask

    def cdf(self, schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
        mean, spread = self._parts(schedule, t)
        return (f64(*self.weights) * torch.erfc((mean - x[..., None]) / spread / math.sqrt(2)) / 2).sum(-1)

    def carry(self, schedule: Schedule, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x at t carried to s: the point of p_s with the same quantile, by bisection."""
        wanted = self.cdf(schedule, x, t)
        low, high = torch.full_like(x, -1e3), torch.full_like(x, 1e3)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(schedule, middle, s) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2
