"""Multistep rules: what was foreseen at the last points is drawn through by a polynomial, and the move integrates it exactly.

With h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t) and v the share of the move that is done, the reverse process whose
fresh noise is eta times that of the forward process (eta = 0: the probability flow) moves by

    data frame    x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s int_0^1 H e^(-H (1 - v)) x0(v) dv
                        + sigma_s sqrt(1 - e^(-2 eta h)) z                                               H = (1 + eta) h
    noise frame   x_s = (alpha_s / alpha_t) x_t - (1 + eta) sigma_s int_0^1 h e^(h (1 - v)) n(v) dv
                        + sigma_s sqrt(eta (e^(2 h) - 1)) z

(Lu et al. 2022, "DPM-Solver++", proposition 4.1; Xue et al. 2023, "SA-Solver", proposition 4.2, whose tau^2 is eta). The
polynomial may be one in log SNR, in the frame's own variable, or in the number of the step. A corrector takes the point just
reached into the polynomial and makes the last move again, with the same noise and without another question (Zhao et al. 2023,
"UniPC", algorithms 1 and 2). One call of the network a step.

    data, log_snr          DPM-Solver++(2M), (3M) and their SDE forms, UniPC, SA-Solver
    noise, log_snr         DPM-Solver in its multistep form, DEIS (log rho AB; Zhang and Chen 2023)
    noise, frame           k-diffusion's LMS: Adams and Bashforth's rule in sigma / alpha
    noise, index           iPNDM: the same rule as if all steps were equal (Zhang and Chen 2023)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from diffusion_cli.ranges import Fraction, NonNegativeFloat
from diffusion_cli.samplers.frames import Point, noise_in, points, transfer
from diffusion_cli.samplers.multistep_weights import moments, weights
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule


class Seen(NamedTuple):
    """What was foreseen at step `step`: m [B, C, H, W] is x0 in the data frame and the noise in the noise frame."""

    step: int
    at: Point
    m: Tensor


class Pull(NamedTuple):
    """A move x_s = kept x_t + scale rate int_0^1 e^(z (1 - v)) m(v) dv + fresh noise."""

    kept: float
    scale: float
    rate: float
    z: float
    fresh: float


def _data_pull(t: Point, s: Point, eta: float) -> Pull:
    h = s.lam - t.lam
    H = (1 + eta) * h
    return Pull(s.sigma / t.sigma * math.exp(-eta * h), s.alpha, H, -H, s.sigma * math.sqrt(-math.expm1(-2 * eta * h)))


def _noise_pull(t: Point, s: Point, eta: float) -> Pull:
    h = s.lam - t.lam
    return Pull(s.alpha / t.alpha, -s.sigma, (1 + eta) * h, h, s.sigma * math.sqrt(eta * math.expm1(2 * h)))


class Frame(NamedTuple):
    foreseen: Callable[[Tensor, Tensor, Point], Tensor]  # x, x0 [B, C, H, W] -> m
    pull: Callable[[Point, Point, float], Pull]


FRAMES = {
    "data": Frame(lambda x, x0, t: x0, _data_pull),
    "noise": Frame(noise_in, _noise_pull),
}
# v of a point that is `away` moves of this length in log SNR and `steps` steps behind; negative in the past
_CLOCKS: dict[str, Callable[[float, int, float], float]] = {
    "log_snr": lambda away, steps, z: away,
    "frame": lambda away, steps, z: math.expm1(-z * away) / math.expm1(-z),  # rho, or kappa^(1 + eta)
    "index": lambda away, steps, z: steps,
}
_SLOPES: dict[str, Callable[[list[float]], float]] = {  # the integral of v, from those of 1 and v
    "exact": lambda integrals: integrals[1],
    "midpoint": lambda integrals: integrals[0] / 2,
    "bh1": lambda integrals: 1 / 2,
}
_CURVATURES = {"exact": 1.0, "half": 0.5}


@dataclass(frozen=True)
class Multistep(Sampler):
    """order: points in the polynomial, fewer while the walk is young, and the order of convergence on smooth grids; moves from
    pure noise and to the picture are of order 1. corrector: points in that of the corrector, the new one included, and then the
    order of convergence if it is no more than order + 1; 0 none.

    slope: of a polynomial through two points, integrated exactly, by half the move (`midpoint`: DPM-Solver's and UniPC's bh2),
    or by half of h (`bh1`: UniPC's and SA-Solver's). curvature: of one through three points, all of it, or the half that
    the published third-order DPM-Solvers take, which makes them of order 2. Neither matters to the other polynomials.

    taper: no more points than moves are left. eta: fresh noise, on moves that start within `during` (times, first and last).
    """

    frame: Literal["data", "noise"] = "data"
    clock: Literal["log_snr", "frame", "index"] = "log_snr"
    order: Literal[1, 2, 3, 4] = 2
    corrector: Literal[0, 1, 2, 3, 4, 5] = 0
    slope: Literal["exact", "midpoint", "bh1"] = "exact"
    curvature: Literal["exact", "half"] = "exact"
    taper: bool = False
    eta: NonNegativeFloat = 0.0
    during: tuple[Fraction, Fraction] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.during[0] > self.during[1]:
            raise ValueError(f"during is {list(self.during)}: the first of the two times must be the smaller")

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        frame, again = FRAMES[self.frame], None
        past: list[Seen] = []  # newest first; nothing from alpha = 0, where log SNR has no value
        for i, (t, s) in enumerate(pairwise(points(schedule, times))):
            x0, left = ask(x, t.t), len(times) - 1 - i
            seen = [Seen(i, t, frame.foreseen(x, x0, t)), *past]
            if self.corrector and again:
                x = again(seen[: self._at_most(self.corrector, left + 2)])
            yield State(i, t.t, x, x0)
            if math.isinf(t.lam) or math.isinf(s.lam):
                x = transfer(x, x0, t, s)
                continue
            past = seen[: max(self.order, self.corrector - 1)]
            pull = frame.pull(t, s, self.eta if self.during[0] <= t.t <= self.during[1] else 0.0)
            again = partial(self._move, x, seen[0], s.lam - t.lam, pull, noise(i) if pull.fresh else None)
            x = again(past[: self._at_most(self.order, left)])
        yield State(len(times) - 1, times[-1], x, x)

    def _at_most(self, wanted: int, taper: int) -> int:
        return min(wanted, taper) if self.taper else wanted

    def _move(self, x: Tensor, start: Seen, h: float, pull: Pull, z: Tensor | None, seen: list[Seen]) -> Tensor:
        """x [B, C, H, W] at start carried by h, with the polynomial through `seen`."""
        clock = _CLOCKS[self.clock]
        places = [clock((p.at.lam - start.at.lam) / h, p.step - start.step, pull.z) for p in seen]
        integrals = self._integrals(len(seen), pull.z)
        x = pull.kept * x
        for p, weight in zip(seen, weights(places, integrals), strict=True):
            x = x + pull.scale * pull.rate * weight * p.m
        return x if z is None else x + pull.fresh * z

    def _integrals(self, count: int, z: float) -> list[float]:
        """What 1, v, v^2 ... come to over the move."""
        if self.clock != "log_snr":  # the frame's equation has no exponential in these
            return [moments(1, z)[0] / (k + 1) for k in range(count)]
        integrals = moments(count, z)
        if count == 2:
            integrals[1] = _SLOPES[self.slope](integrals)
        if count == 3:
            integrals[2] *= _CURVATURES[self.curvature]
        return integrals
