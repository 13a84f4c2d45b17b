"""Rules that ask twice a move, of order 2, with or without fresh noise; and Euler's beside them, which asks once.

In the noise frame, y = x / alpha and rho = sigma / alpha, a move from t to s is in three parts:

    churn       rho_hat = (1 + gamma) rho_t      y_hat = y_t + S_noise sqrt(rho_hat^2 - rho_t^2) z
    rule        rho_hat -> rho_down              Euler's, Heun's, or one that asks half way
    ancestral   rho_down -> rho_s                y_s = y_down + S_noise rho_up z
                rho_up = min(rho_s, eta rho_s sqrt(1 - rho_s^2 / rho_hat^2)),    rho_down^2 = rho_s^2 - rho_up^2

Churn is algorithm 2 of Karras et al. 2022, "Elucidating the design space": gamma = min(S_churn / steps, sqrt(2) - 1) where
S_min <= rho_t <= S_max, and never past the schedule's own end. The ancestral part is k-diffusion's (Katherine Crowson), on
alpha = 1 the posterior's variance of Song et al. 2021. To the picture every rule moves by `transfer`: no noise is left.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.ranges import NonNegativeFloat, PositiveFloat
from diffusion_cli.samplers.frames import Point, noise_in, point, point_at, points, transfer
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule

Draw = Callable[[int], Tensor]  # which of this move's fresh noises -> [B, C, H, W]
ANCESTRAL, CHURN, MIDDLE = 0, 1, 2


@dataclass(frozen=True)
class OneStep(Sampler):
    """eta: share of ancestral noise. S_churn: noise added before the moves, over all steps; S_min, S_max: where, in
    sigma / alpha (null: no upper end); S_noise: what all fresh noise is multiplied by, a little above 1 where a network
    removes too much."""

    eta: NonNegativeFloat = 0.0
    S_churn: NonNegativeFloat = 0.0
    S_min: NonNegativeFloat = 0.0
    S_max: PositiveFloat | None = None
    S_noise: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        if self.S_max is not None and self.S_min > self.S_max:
            raise ValueError(f"S_min is {self.S_min} and S_max {self.S_max}: no step lies between, so that none would churn")

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        for i, (t, s) in enumerate(pairwise(points(schedule, times))):
            hat = self._churned(schedule, t)
            x_hat = x
            if hat.rho > t.rho:
                added = math.sqrt(hat.rho**2 - t.rho**2)
                x_hat = hat.alpha * (x / t.alpha + self.S_noise * added * noise(i, CHURN))
            x0 = ask(x_hat, hat.t)
            yield State(i, t.t, x, x0)
            x = self.move(ask, schedule, x_hat, x0, hat, s, partial(noise, i))
        yield State(len(times) - 1, times[-1], x, x)

    @abstractmethod
    def move(self, ask: Denoise, schedule: Schedule, x: Tensor, x0: Tensor, t: Point, s: Point, draw: Draw) -> Tensor:
        """x [B, C, H, W] at s, from x at t with the picture x0 foreseen there. To s.sigma = 0 by `transfer`."""

    def ancestral(self, schedule: Schedule, t: Point, s: Point) -> tuple[Point, float]:
        """The point that a rule moves down to, and rho_up of the noise that then leads to s. s itself and 0 if eta is 0."""
        up = s.rho * min(1.0, self.eta * math.sqrt(1 - (s.rho / t.rho) ** 2))
        if up == 0:
            return s, 0.0
        down = math.sqrt(s.rho**2 - up**2)
        clean = torch.zeros((), dtype=torch.float64)
        return (point_at(schedule, -math.log(down)) if down > 0 else point(schedule, clean)), up

    def lifted(self, x: Tensor, low: Point, s: Point, up: float, draw: Draw) -> Tensor:
        """x at low with the noise that leads to s."""
        return s.alpha * (x / low.alpha + self.S_noise * up * draw(ANCESTRAL)) if up > 0 else x

    def _churned(self, schedule: Schedule, t: Point) -> Point:
        """Where the move starts: t, or a point with more noise."""
        inside = self.S_min <= t.rho and (self.S_max is None or t.rho <= self.S_max)
        gamma = min(self.S_churn / self.steps, math.sqrt(2) - 1) if inside else 0.0
        if gamma == 0 or t.alpha == 0:
            return t
        return point_at(schedule, -math.log((1 + gamma) * t.rho))  # not beyond t = 1


def _half_way(schedule: Schedule, t: Point, s: Point) -> Point:
    """At the mean of lambda, the geometric mean of rho."""
    return point_at(schedule, (t.lam + s.lam) / 2)


_Straight = Callable[[Tensor, Tensor, Tensor, Point, Point], Tensor]  # x, x0, n [B, C, H, W], t, s -> x_s
_STRAIGHT: dict[str, _Straight] = {  # the move along a constant derivative, frame by frame
    "own": lambda x, x0, n, t, s: x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * n,
    "noise": lambda x, x0, n, t, s: s.alpha * (x / t.alpha + (s.rho - t.rho) * n),
    "data": lambda x, x0, n, t, s: transfer(x, x0, t, s),
}


@dataclass(frozen=True)
class Euler(OneStep):
    """Order 1, one call of the network a step: algorithm 2 of Karras et al. 2022 without its correction."""

    def move(self, ask: Denoise, schedule: Schedule, x: Tensor, x0: Tensor, t: Point, s: Point, draw: Draw) -> Tensor:
        low, up = self.ancestral(schedule, t, s)
        return self.lifted(transfer(x, x0, t, low), low, s, up, draw)


@dataclass(frozen=True)
class Heun(OneStep):
    """Order 2: Euler's move, and again with the mean of the derivatives at both ends. 2 steps - 1 calls of the network.

    frame: whose derivative. `own` is dx = x0 d alpha + n d sigma: algorithm 1 and 2 of Karras et al. 2022 on alpha = 1,
    Heun's rule in t on the straight line. `noise` is k-diffusion's on every schedule. From pure noise it is always `own`.
    """

    frame: Literal["own", "noise", "data"] = "own"

    def move(self, ask: Denoise, schedule: Schedule, x: Tensor, x0: Tensor, t: Point, s: Point, draw: Draw) -> Tensor:
        low, up = self.ancestral(schedule, t, s)
        y = transfer(x, x0, t, low)
        if low.sigma > 0:  # the noise is not defined at sigma = 0
            y0 = ask(y, low.t)
            n = (noise_in(x, x0, t) + noise_in(y, y0, low)) / 2
            y = _STRAIGHT[self.frame if t.alpha > 0 else "own"](x, (x0 + y0) / 2, n, t, low)
        return self.lifted(y, low, s, up, draw)


@dataclass(frozen=True)
class HalfWay(OneStep):
    """Order 2: the derivative of the whole move is asked for half way in log(alpha / sigma). 2 steps - 1 calls.

    frame: `noise` is k-diffusion's dpm_2, a Karras-like form of DPM-Solver-2; `data` is DPM-Solver++(2S) (Lu et al. 2022,
    "DPM-Solver++", algorithm 1 with r = 1/2). From pure noise, where half way has no meaning, the first move is Euler's.
    """

    frame: Literal["noise", "data"] = "data"

    def move(self, ask: Denoise, schedule: Schedule, x: Tensor, x0: Tensor, t: Point, s: Point, draw: Draw) -> Tensor:
        low, up = self.ancestral(schedule, t, s)
        if t.alpha == 0 or low.sigma == 0:
            return self.lifted(transfer(x, x0, t, low), low, s, up, draw)
        m = _half_way(schedule, t, low)
        x_m = transfer(x, x0, t, m)
        x0_m = ask(x_m, m.t)
        return self.lifted(_STRAIGHT[self.frame](x, x0_m, noise_in(x_m, x0_m, m), t, low), low, s, up, draw)


@dataclass(frozen=True)
class NoisyHalfWay(OneStep):
    """DPM-Solver++(2S) whose question half way is asked of a noisy picture too: k-diffusion's dpmpp_sde. 2 steps - 1 calls.

    Both noises belong to one path: that of the whole move goes on from that of its first half, as the ancestral part itself
    would carry it on (at eta 1 exactly the reverse process with x0 held). k-diffusion's come from a Brownian tree in sigma,
    which agrees to leading order. With eta 0 it is HalfWay's data frame.
    """

    def move(self, ask: Denoise, schedule: Schedule, x: Tensor, x0: Tensor, t: Point, s: Point, draw: Draw) -> Tensor:
        low, up = self.ancestral(schedule, t, s)
        if t.alpha == 0 or s.sigma == 0:
            return self.lifted(transfer(x, x0, t, low), low, s, up, draw)
        m = _half_way(schedule, t, s)
        low_m, up_m = self.ancestral(schedule, t, m)
        x_m = transfer(x, x0, t, low_m)
        if up == 0:
            return transfer(x, ask(x_m, m.t), t, s)
        first = up_m * draw(MIDDLE)
        x_m = m.alpha * (x_m / low_m.alpha + self.S_noise * first)
        x_s = transfer(x, ask(x_m, m.t), t, low)
        carried = self.ancestral(schedule, m, s)[0].rho / m.rho  # what a move from m to s leaves of noise at m
        second = math.sqrt(max(up**2 - (carried * up_m) ** 2, 0.0))
        return s.alpha * (x_s / low.alpha + self.S_noise * (carried * first + second * draw(ANCESTRAL)))
