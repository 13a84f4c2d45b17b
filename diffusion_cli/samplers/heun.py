"""Heun's rule (order 2) for the probability-flow ODE in the schedule's own terms, dx = x0 d alpha + n d sigma.

Euler's step on it is schedule.transfer; the corrector averages (x0, n) over both ends. On alpha = 1 this is algorithm 1 of
Karras et al. 2022 (without churn), on the straight line Heun's rule in t. It asks twice a step, but for the last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule, over_pictures


@dataclass(frozen=True)
class Heun(Sampler):
    """Order 2, deterministic; 2 steps - 1 calls of the network."""

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        for i, (t, s) in enumerate(pairwise(times)):
            x0 = ask(x, t)
            yield State(i, t, x, x0)
            x_s = schedule.transfer(x, x0, t, s)
            if s > 0:  # n is not defined at sigma = 0, and x0 is already the answer there
                y0 = ask(x_s, s)
                n_t = (x - over_pictures(schedule.alpha(t), x) * x0) / over_pictures(schedule.sigma(t), x)
                n_s = (x_s - over_pictures(schedule.alpha(s), x) * y0) / over_pictures(schedule.sigma(s), x)
                d_alpha, d_sigma = schedule.alpha(s) - schedule.alpha(t), schedule.sigma(s) - schedule.sigma(t)
                x_s = x + over_pictures(d_alpha, x) * (x0 + y0) / 2 + over_pictures(d_sigma, x) * (n_t + n_s) / 2
            x = x_s
        yield State(len(times) - 1, times[-1], x, x)
