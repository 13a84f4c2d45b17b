"""The noise of a picture: a deterministic sampler walked upwards, from t = 0 to the first time of its grid.

A move is a map x_t -> x_s, and x_s is what is known. DDIM's inversion (Song et al. 2021, "Denoising diffusion implicit models",
section 4.3; diffusers' DDIMInverseScheduler) takes for the noise of x_t what the network says of x_s at t:

    n = (x_s - alpha_t x0(x_s, t)) / sigma_t,        x_t = (alpha_t / alpha_s) (x_s - sigma_s n) + sigma_t n

which is right to order 1. From there on x_t is mended by what its own move lacks (Pan et al. 2023, "Effective real image
editing with accelerated iterative diffusion inversion", eq. 8),

    x_t <- x_t + (x_s - move(x_t)) / D,        D = r + (alpha_s - alpha_t r) J,   r = sigma_s / sigma_t

D is the derivative of a move of order 1 where x0 has the derivative J = alpha_t c^2 / (alpha_t^2 c^2 + sigma_t^2), that of
pixels of standard deviation c. At alpha_t = 0 it is exact, so that nothing is divided by 0. A sampler with a memory
(multistep) is inverted in single moves without it, and so has the picture back to the order of those.
"""

from itertools import pairwise

import torch
from torch import Tensor

from diffusion_cli.editing.known import SPREAD
from diffusion_cli.editing.method import Question
from diffusion_cli.samplers import Sampler, last
from diffusion_cli.samplers.frames import noise_in, points
from diffusion_cli.schedules import Schedule

TURNS = 4  # of mending: a trained network's round trip is then within one of 255 levels


class AddsNoise(Exception):
    """The sampler draws fresh noise, so that its walks cannot be walked back."""


def invert(question: Question, schedule: Schedule, sampler: Sampler, x0: Tensor, turns: int = TURNS) -> Tensor:
    """The noise [B, C, H, W] of unit scale from which the sampler's walk ends in x0 [B, C, H, W]. Raises AddsNoise.

    Every answer is a new question's: what a question remembers belongs to the way down.
    """

    def clipped(x: Tensor, t: Tensor) -> Tensor:
        foreseen = question()(x, t)
        return foreseen.clamp(-1, 1) if sampler.clip else foreseen

    x = x0
    way = points(schedule, sampler.times(schedule))
    for t, s in reversed(list(pairwise(way))):
        wanted = x
        n = noise_in(x, clipped(x, t.t), t)
        x = t.alpha / s.alpha * (x - s.sigma * n) + t.sigma * n
        ratio = s.sigma / t.sigma
        J = t.alpha * SPREAD**2 / ((t.alpha * SPREAD) ** 2 + t.sigma**2)
        D = ratio + (s.alpha - t.alpha * ratio) * J
        for _ in range(turns):
            x = x + (wanted - last(sampler.moves(clipped, schedule, x, torch.stack([t.t, s.t]), _silent)).x) / D
    return x / way[0].sigma


def adds_noise(sampler: Sampler, schedule: Schedule) -> bool:
    """Whether walks of this sampler draw fresh noise: found out on a picture of one pixel."""
    pixel = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    try:
        last(sampler.walk(lambda x, t: 0 * x, schedule, sampler.start(schedule, pixel), _silent))
    except AddsNoise:
        return True
    return False


def _silent(step: int, which: int = 0, /) -> Tensor:
    raise AddsNoise
