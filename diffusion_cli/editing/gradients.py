"""Conditioning through the network's derivative J = d x0 / d x_t. By Tweedie's formulas

    E[x0 | x_t, y] = x0 + (sigma^2 / alpha) grad_x log p(y | x_t),        Cov[x0 | x_t] = V = (sigma^2 / alpha) J

and with x0 given x_t taken for Gaussian, N(x0, V), the gradient is that of log N(y; A x0, A V A^T + noise^2 I):

    E[x0 | x_t, y] = x0 + V A^T (A V A^T + noise^2 I)^-1 (y - A x0)

Moments solves the system by conjugate gradients (Rozet et al. 2024, "Learning diffusion priors from observations by expectation
maximization", MMPS, algorithm 3): exact for Gaussian data. Guided puts a number for A V A^T: DPS (Chung et al. 2023, "Diffusion
posterior sampling", eq. 11) with the number of Song et al. 2023 ("Pseudoinverse-guided diffusion models", section 3.3), so
that one scale suits all levels of noise. At alpha = 0 nothing is known of x0 but its mean, and the walk goes freely.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.editing.known import Known
from diffusion_cli.editing.method import Binding
from diffusion_cli.ranges import NonNegativeFloat, PositiveInt
from diffusion_cli.samplers import Denoise
from diffusion_cli.schedules import Schedule, over_pictures

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gradient(Binding):
    def foresee(self, known: Known, ask: Denoise, schedule: Schedule, x: Tensor, t: Tensor, clip: bool) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        gain = over_pictures(torch.where(alpha > 0, sigma**2 / alpha, 0), x)
        x0, pull = with_derivative(ask, x, t)

        def spread(u: Tensor) -> Tensor:
            """V A^T u."""
            return gain * pull(known.operator.unit * known.operator.back(u))

        lacking = known.lacking(x0)
        found = spread(self.solve(known, schedule, t, lambda u: known.operator.measure(spread(u)), lacking))
        x0 = x0 + shortened(found, known.operator.back(lacking) / known.operator.share**0.5)
        return x0.clamp(-1, 1) if clip else x0

    @abstractmethod
    def solve(self, known: Known, schedule: Schedule, t: Tensor, spread: Linear, lacking: Tensor) -> Tensor:
        """u with (A V A^T + noise^2 I) u = y - A x0. spread: A V A^T."""


@dataclass(frozen=True)
class Guided(Gradient):
    """DPS. scale: 1 is the formula; more pulls harder. One derivative for each call of the network."""

    scale: NonNegativeFloat = 1.0

    def solve(self, known: Known, schedule: Schedule, t: Tensor, spread: Linear, lacking: Tensor) -> Tensor:
        return over_pictures(self.scale / known.doubt(schedule, t), lacking) * lacking


@dataclass(frozen=True)
class Moments(Gradient):
    """MMPS. iterations: of conjugate gradients, each one derivative. One is enough for most networks."""

    iterations: PositiveInt = 1

    def solve(self, known: Known, schedule: Schedule, t: Tensor, spread: Linear, lacking: Tensor) -> Tensor:
        return conjugate_gradients(lambda u: spread(u) + known.noise**2 * u, lacking, self.iterations)


def shortened(x: Tensor, limit: Tensor) -> Tensor:
    """x [B, ...] in its direction, no longer than limit [B, ...].

    The limit is the length of a correction that is as strong where nothing is known as where something is. A covariance allows
    little more, and for a network, whose J is not quite one, the quotient of two small numbers may be anything.
    """
    ratio = limit.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    return over_pictures(torch.where(ratio < 1, ratio, 1), x) * x


def with_derivative(ask: Denoise, x: Tensor, t: Tensor) -> tuple[Tensor, Linear]:
    """ask(x, t) and v -> J^T v, also where gradients are off: inference tensors are copied into the outside."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().detach().requires_grad_()
        x0 = ask(x, t.clone())

    def pull(v: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return torch.autograd.grad(x0, x, v.clone(), retain_graph=True)[0]

    return x0.detach(), pull


def conjugate_gradients(apply: Linear, b: Tensor, iterations: int) -> Tensor:
    """u with apply(u) = b, each picture of b [B, ...] for itself. A direction in which apply is not positive is left alone."""
    dot = lambda a, c: (a * c).flatten(1).sum(1)  # noqa: E731 ([B])
    share = lambda over, under: over_pictures(torch.where(under > 0, over / under, 0), b)  # noqa: E731
    u, r, p = torch.zeros_like(b), b, b
    size = dot(r, r)
    for _ in range(iterations):
        applied = apply(p)
        step = share(size, dot(p, applied))
        u, r = u + step * p, r - step * applied
        size, before = dot(r, r), size
        p = r + share(size, before) * p
    return u
