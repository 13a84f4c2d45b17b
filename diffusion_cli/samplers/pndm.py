"""PNDM (Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds"): iPNDM after a warm-up that asks more.

Any rule for ordinary equations says which noise n to follow; the step along it is DDIM's (eq. 11 and 12):

    x_s = alpha_s / alpha_t x_t + (sigma_s - sigma_t alpha_s / alpha_t) n

The last four n are weighed as Adams and Bashforth do for equal steps. The first three moves are made by Runge and Kutta's rule
(PRK: 4 questions each), or the first one by Heun's (PLMS, Stable Diffusion's choice: 2 questions) and more points are taken as
there are some. Of order 4 where the steps are equal in sigma / alpha, of order 2 where they are not.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from diffusion_cli.samplers.frames import Point, noise_in, point, points, transfer
from diffusion_cli.samplers.multistep_weights import moments, weights
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule

_Foresee = Callable[[Tensor, Point], Tensor]  # x [B, C, H, W] at a point -> n


def _along(x: Tensor, n: Tensor, t: Point, s: Point) -> Tensor:
    """x [B, C, H, W] at t carried to s along the noise n."""
    ratio = s.alpha / t.alpha
    return ratio * x + (s.sigma - t.sigma * ratio) * n


def _runge_kutta(foresee: _Foresee, x: Tensor, n: Tensor, t: Point, middle: Point, s: Point) -> Tensor:
    """The noise to follow from t to s: n at t, twice that in the middle, and at s."""
    first = foresee(_along(x, n, t, middle), middle)
    second = foresee(_along(x, first, t, middle), middle)
    third = foresee(_along(x, second, t, s), s)
    return (n + 2 * first + 2 * second + third) / 6


def _heun(foresee: _Foresee, x: Tensor, n: Tensor, t: Point, middle: Point, s: Point) -> Tensor:
    """The mean of the noise at t and at s."""
    return (n + foresee(_along(x, n, t, s), s)) / 2


_WARM_UP = {"runge_kutta": (_runge_kutta, 3), "heun": (_heun, 1)}  # the rule and for how many moves


@dataclass(frozen=True)
class PNDM(Sampler):
    """Deterministic; steps + 9 calls of the network with `runge_kutta`, steps + 1 with `heun`."""

    warm_up: Literal["runge_kutta", "heun"] = "runge_kutta"

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        rule, warm = _WARM_UP[self.warm_up]
        past: list[Tensor] = []  # the noise at the last points, newest first; none from alpha = 0

        def foresee(x: Tensor, at: Point) -> Tensor:
            return noise_in(x, ask(x, at.t), at)

        for i, (t, s) in enumerate(pairwise(points(schedule, times))):
            x0 = ask(x, t.t)
            yield State(i, t.t, x, x0)
            if math.isinf(t.lam) or math.isinf(s.lam):
                x = transfer(x, x0, t, s)
                continue
            past = [noise_in(x, x0, t), *past][:4]
            if len(past) <= warm:
                n = rule(foresee, x, past[0], t, point(schedule, (t.t + s.t) / 2), s)
            else:
                shares = weights([-float(k) for k in range(len(past))], moments(len(past), 0.0))
                n = sum((share * p for share, p in zip(shares[1:], past[1:], strict=True)), shares[0] * past[0])
            x = _along(x, n, t, s)
        yield State(len(times) - 1, times[-1], x, x)
