"""DDIM, DDPM, Euler and Euler ancestral are one move with more or less fresh noise.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - v) n + sqrt(v) z,    n = (x_t - alpha_t x0) / sigma_t,
    v = eta^2 (sigma_s / sigma_t)^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)

eta = 0 is DDIM and Euler (no noise); eta = 1 is the posterior of DDPM on a variance-preserving schedule (Ho et al. 2020, eq. 7;
Song et al. 2021, "Denoising diffusion implicit models", eq. 16) and k-diffusion's euler_ancestral on alpha = 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.ranges import NonNegativeFloat
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule, over_pictures


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Order 1. eta: share of fresh noise (0 none). variance: of that noise, the posterior's (`small`), or the whole step's,
    sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, which is beta on a DDPM table (`large`: Ho et al. 2020, section 3.2)."""

    eta: NonNegativeFloat = 0.0
    variance: Literal["small", "large"] = "small"

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        for i, (t, s) in enumerate(pairwise(times)):
            x0 = ask(x, t)
            yield State(i, t, x, x0)
            kept, fresh = self.spread(schedule, t, s)
            n = (x - over_pictures(schedule.alpha(t), x) * x0) / over_pictures(schedule.sigma(t), x)
            x = over_pictures(schedule.alpha(s), x) * x0 + over_pictures(kept, x) * n
            if fresh > 0:
                x = x + over_pictures(fresh, x) * noise(i)
        yield State(len(times) - 1, times[-1], x, x)

    def spread(self, schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Standard deviations (kept, fresh) of the old and of the new noise in x_s; fresh is 0 at s = 0."""
        sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
        added = sigma_t**2 - (schedule.alpha(t) / schedule.alpha(s)) ** 2 * sigma_s**2  # by the noising from s to t
        v = torch.minimum(self.eta**2 * (sigma_s / sigma_t) ** 2 * added, sigma_s**2)
        fresh = self.eta**2 * added * (s > 0) if self.variance == "large" else v
        return torch.sqrt(sigma_s**2 - v), torch.sqrt(fresh)
