"""Predictor and corrector: a move of the reverse process, then steps of Langevin dynamics at the time that was reached.

    reverse diffusion   x_s = (2 - a) x_t + b^2 score + b z,    a = alpha_t / alpha_s,  b^2 = sigma_t^2 - a^2 sigma_s^2
    ancestral           the posterior of x_s given x_t and x0, which is `Ancestral` with eta 1
    Langevin            x <- x + e score + sqrt(2 e) z,         e = 2 (snr |z| / |score|)^2

with score = (alpha x0 - x) / sigma^2 (Song et al. 2021, "Score-based generative modeling through stochastic differential
equations", eq. 46 and algorithms 2 to 5). e is found for each picture on its own; their code, and diffusers', takes the means
of both norms over the batch, which makes a picture depend on the batch that it is drawn in. Their factor 1 - beta of e on VP,
0.98 to 1, is left out. Nothing is corrected where the walk starts, and nothing at t = 0.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.ranges import NonNegativeInt, PositiveFloat
from diffusion_cli.samplers.frames import Point, noise_in, points, transfer
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule, over_pictures

_Predictor = Callable[[Tensor, Tensor, Point, Point, Tensor], Tensor]  # x, x0 [B, C, H, W], t, s, fresh noise -> x_s


def _added(t: Point, s: Point) -> float:
    """b^2: variance of the noise that the noising adds from s to t."""
    return max(t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2, 0.0)


def _ancestral(x: Tensor, x0: Tensor, t: Point, s: Point, z: Tensor) -> Tensor:
    v = _added(t, s) * (s.sigma / t.sigma) ** 2
    return s.alpha * x0 + math.sqrt(s.sigma**2 - v) * noise_in(x, x0, t) + math.sqrt(v) * z


def _reverse_diffusion(x: Tensor, x0: Tensor, t: Point, s: Point, z: Tensor) -> Tensor:
    if t.alpha == 0:  # a = 0: the drift over such a move is no small change, and eq. 46 would double the noise
        return _ancestral(x, x0, t, s, z)
    a, b2 = t.alpha / s.alpha, _added(t, s)
    return (2 - a) * x - b2 / t.sigma * noise_in(x, x0, t) + math.sqrt(b2) * z


_PREDICTORS: dict[str, _Predictor] = {"reverse_diffusion": _reverse_diffusion, "ancestral": _ancestral}


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Order 1. corrections: Langevin steps at every time between the first and 0, one call of the network each; snr: how large
    their noise is beside the score. The last move is `transfer`: no noise is left."""

    predictor: Literal["reverse_diffusion", "ancestral"] = "reverse_diffusion"
    corrections: NonNegativeInt = 1
    snr: PositiveFloat = 0.16

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        predict = _PREDICTORS[self.predictor]
        for i, (t, s) in enumerate(pairwise(points(schedule, times))):
            x0 = ask(x, t.t)
            yield State(i, t.t, x, x0)
            if s.sigma == 0:
                x = transfer(x, x0, t, s)
                continue
            x = predict(x, x0, t, s, noise(i))
            for k in range(1, self.corrections + 1):
                x = self._corrected(x, ask(x, s.t), s, noise(i, k))
        yield State(len(times) - 1, times[-1], x, x)

    def _corrected(self, x: Tensor, x0: Tensor, at: Point, z: Tensor) -> Tensor:
        score = -noise_in(x, x0, at) / at.sigma
        size = self.snr * z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)  # [B]
        e = 2 * torch.where(size.isfinite(), size, 0) ** 2  # without a score there is no step
        return x + over_pictures(e, x) * score + over_pictures(torch.sqrt(2 * e), x) * z
