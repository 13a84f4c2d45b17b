"""Where a walk stands, and the frames in which its differential equation is one line.

    noise frame   y = x / alpha,  rho = sigma / alpha:     dy = n d rho        k-diffusion, DPM-Solver, DEIS, PNDM
    data frame    z = x / sigma,  kappa = alpha / sigma:   dz = x0 d kappa     DPM-Solver++, UniPC, SA-Solver
    own frame     dx = x0 d alpha + n d sigma                                  EDM on alpha = 1, flow matching in t

with n = (x - alpha x0) / sigma and lambda = log kappa = -log rho (Lu et al. 2022, "DPM-Solver", eq. 3.4; Zhang and Chen 2023,
"Fast sampling of diffusion models with exponential integrator", eq. 11). All three agree to order 1: that move is `transfer`.
rho is infinite at alpha = 0 and kappa at t = 0, so from pure noise and to the picture every rule moves by `transfer`.
Coefficients are Python's floats: they cost a GPU nothing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_cli.schedules import Schedule


class Point(NamedTuple):
    """A time t [] float64 of the walk with its shares of data and noise."""

    t: Tensor
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """log(alpha / sigma): -inf at alpha = 0, +inf at t = 0."""
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha) - math.log(self.sigma)

    @property
    def rho(self) -> float:
        """sigma / alpha, k-diffusion's sigma: +inf at alpha = 0, 0 at t = 0."""
        return math.inf if self.alpha == 0 else self.sigma / self.alpha


def point(schedule: Schedule, t: Tensor) -> Point:
    return Point(t, float(schedule.alpha(t)), float(schedule.sigma(t)))


def points(schedule: Schedule, times: Tensor) -> list[Point]:
    """One for each of times [n]."""
    return [Point(*of) for of in zip(times, schedule.alpha(times).tolist(), schedule.sigma(times).tolist(), strict=True)]


def point_at(schedule: Schedule, lam: float) -> Point:
    """The point where log(alpha / sigma) is lam."""
    return point(schedule, schedule.t_of_log_snr(torch.tensor(2 * lam, dtype=torch.float64)))


def noise_in(x: Tensor, x0: Tensor, at: Point) -> Tensor:
    """n [B, C, H, W], the noise that x [B, C, H, W] holds there if x0 is the picture. at.sigma > 0."""
    return (x - at.alpha * x0) / at.sigma


def transfer(x: Tensor, x0: Tensor, t: Point, s: Point) -> Tensor:
    """Schedule.transfer between points: exact at alpha_t = 0 and at sigma_s = 0."""
    ratio = s.sigma / t.sigma
    return ratio * x + (s.alpha - t.alpha * ratio) * x0
