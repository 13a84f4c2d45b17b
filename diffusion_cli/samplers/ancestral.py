"""DDIM, DDPM, Euler, Euler ancestral and consistency models' sampling are one move with more or less fresh noise.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - v) n + sqrt(v) z,    n = (x_t - alpha_t x0) / sigma_t,
    v = eta^2 (sigma_s / sigma_t)^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)

eta = 0 is DDIM and Euler (no noise); eta = 1 is the posterior of DDPM on a variance-preserving schedule (Ho et al. 2020, eq. 7;
Song et al. 2021, "Denoising diffusion implicit models", eq. 16) and k-diffusion's euler_ancestral on alpha = 1. With
v = sigma_s^2 nothing is kept but x0: the multistep sampling of consistency models (Song et al. 2023, algorithm 1) and of latent
ones (Luo et al. 2023, "LCM").

Where a network has learned the variance of its steps, the new noise is (sigma_t / sigma_s)^f times as large, f of each pixel
between 0, the posterior's, and 1, the whole step's (Nichol and Dhariwal 2021, eq. 15; losses/hybrid.py).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.ranges import NonNegativeFloat
from diffusion_cli.samplers.frames import Point, noise_in, points
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State, Varied
from diffusion_cli.schedules import Schedule


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Order 1. eta: share of fresh noise (0 none). variance: of that noise, the posterior's (`small`), the whole step's,
    sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, which is beta on a DDPM table (`large`: Ho et al. 2020, section 3.2), all the
    noise there is, sigma_s^2 (`all`), or what the network has learned, between the first two (`learned`)."""

    eta: NonNegativeFloat = 0.0
    variance: Literal["small", "large", "all", "learned"] = "small"

    @property
    def varied(self) -> bool:
        return self.variance == "learned"

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        for i, (t, s) in enumerate(pairwise(points(schedule, times))):
            x0 = ask(x, t.t)
            yield State(i, t.t, x, x0)
            kept, fresh = self.spread(t, s)
            x = s.alpha * x0 + kept * noise_in(x, x0, t)
            if fresh > 0 and self.varied:
                assert isinstance(ask, Varied)
                x = x + fresh * (t.sigma / s.sigma) ** ask.v() * noise(i)
            elif fresh > 0:
                x = x + fresh * noise(i)
        yield State(len(times) - 1, times[-1], x, x)

    def spread(self, t: Point, s: Point) -> tuple[float, float]:
        """Standard deviations (kept, fresh) of the old and of the new noise in x_s; both 0 at s = 0."""
        added = max(t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2, 0.0)  # by the noising from s to t
        posterior = added * (s.sigma / t.sigma) ** 2
        v = min(self.eta**2 * (s.sigma**2 if self.variance == "all" else posterior), s.sigma**2)
        fresh = self.eta**2 * added if self.variance == "large" and s.sigma > 0 else v
        return math.sqrt(s.sigma**2 - v), math.sqrt(fresh)


@dataclass(frozen=True)
class Leap(Ancestral):
    """Of a network that leads from any time to any other: `eta` 0 goes from time to time of the grid along its path, `all` with
    eta 1 to the picture and back by fresh noise. Any other denoiser is walked as by Ancestral."""

    def goal(self, schedule: Schedule) -> Callable[[Tensor], Tensor]:
        if self.eta > 0:
            return torch.zeros_like
        times = self.times(schedule)
        return lambda t: times[times < t.cpu()][0].to(t)
