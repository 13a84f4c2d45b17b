"""Learned variances: where between its two extremes the variance of a step lies is learned beside the mean.

    q(x_s | x_t, x0) = N(mu(x_t, x0), beta~)     mu(x_t, x0) = (alpha_t sigma_s^2 / alpha_s x_t + alpha_s beta x0) / sigma_t^2
    p(x_s | x_t) = N(mu(x_t, D(x_t)), exp(v log beta + (1 - v) log beta~))
    beta = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2,   beta~ = beta sigma_s^2 / sigma_t^2

    L_hybrid = L + w L_vlb,    L_vlb = sum over the steps of a table of KL(q || p), and of the last one -log p(x0 | x_t)

Nichol and Dhariwal 2021, "Improved denoising diffusion probabilistic models", eq. 15 and 16. The network says v in further
channels, as 2 v - 1, which is theirs and diffusers' scale. L_vlb is in bits per dimension and reaches v alone: the mean is
taken as given (their section 3.1). The last step is judged by the 256 grey levels of a pixel (Ho et al. 2020, eq. 13), also of
latents, as Peebles and Xie 2023 do; its beta~ would be 0, and is that of the step before.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.losses.loss import Loss
from diffusion_cli.losses.terms import Term, Told
from diffusion_cli.losses.times import Discrete
from diffusion_cli.predictions import Prediction
from diffusion_cli.ranges import PositiveFloat
from diffusion_cli.schedules import Schedule, over_pictures

HALF = 1 / 255  # of the distance of two grey levels, of pictures within [-1, 1]


@dataclass(frozen=True)
class Hybrid(Term):
    """weight: w. The steps are those of loss.times, which are a table's."""

    weight: PositiveFloat = 0.001

    learns_variance = True
    coupled = False

    def check(self, denoiser: Denoiser, loss: Loss) -> None:
        if not (denoiser.schedule.gaussian and denoiser.schedule.white):
            raise ValueError(
                "objective/term=hybrid is about steps of white Gaussian noise, and that of this schedule is not: choose "
                "schedule=ddpm or cosine"
            )
        if not isinstance(loss.times, Discrete) or loss.times.steps < 2:
            raise ValueError(
                "objective/term=hybrid trains the steps of a table: choose loss=ddpm, or loss/times=discrete of at least 2"
            )

    def __call__(self, told: Told, prediction: Prediction, loss: Loss) -> Tensor:
        assert told.v is not None and isinstance(loss.times, Discrete)
        steps = loss.times.steps
        k = torch.round(told.t.double() * steps)  # [B]
        x0 = prediction.decode(told.F.detach(), prediction.schedule.mix(told.x0, told.noise, told.t), told.t)[0]
        return self.weight * steps * bits(prediction.schedule, told.x0, x0, told.v, k / steps, (k - 1) / steps)


def bits(schedule: Schedule, x0: Tensor, foreseen: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """[B], per dimension, of the steps from t to s [B] float64 with x0, the foreseen one and v [B, C, H, W]."""
    low, high, factor = (over_pictures(c, x0) for c in spread(schedule, t, s))
    log_p = v * high + (1 - v) * low  # [B, C, H, W]
    kl = (log_p - low + torch.exp(low - log_p) + (factor * (x0 - foreseen)).square() * torch.exp(-log_p) - 1) / 2
    nats = torch.where(over_pictures(s, x0) == 0, -log_level(x0, foreseen, log_p), kl)
    return nats.flatten(1).mean(1) / math.log(2)


def spread(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log beta~, log beta, the factor of x0 in the mean) of the steps from t to s [B] float64."""
    last = s == 0
    high, factor = _beta(schedule, t, s).log(), schedule.alpha(s) * _beta(schedule, t, s) / schedule.sigma(t).square()
    before, after = torch.where(last, (2 * t).clamp(max=1), t), torch.where(last, t, s)
    low = (_beta(schedule, before, after) * (schedule.sigma(after) / schedule.sigma(before)).square()).log()
    return low, high, factor


def _beta(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    return schedule.sigma(t).square() - (schedule.alpha(t) / schedule.alpha(s) * schedule.sigma(s)).square()


def log_level(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the share of N(mean, exp(log_variance)) that falls to the grey level x0: the first and last have all beyond."""
    scale = torch.exp(-log_variance / 2)
    above = torch.special.log_ndtr(scale * (mean - x0 + HALF))  # of all from this level on
    below = torch.special.log_ndtr(scale * (x0 - mean + HALF))  # of all up to it
    within = torch.special.ndtr(scale * (x0 - mean + HALF)) - torch.special.ndtr(scale * (x0 - mean - HALF))
    inner = within.clamp(min=1e-12).log()
    return torch.where(x0 < -1 + HALF, below, torch.where(x0 > 1 - HALF, above, inner))
