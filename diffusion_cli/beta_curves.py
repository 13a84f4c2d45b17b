"""Tables of betas by name, and how a table is made to end in pure noise: what schedules.Betas is made of.

    beta_k, k = 0 .. N - 1:    alpha_k^2 = prod_{i <= k} (1 - beta_i)            (Ho et al. 2020, eq. 4)

Each curve's paper is named at schedules.Betas.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def _from_alpha_bar(alpha_bar: Callable[[float], float], steps: int) -> Tensor:
    """Betas whose products follow alpha_bar(t), none above 0.999."""
    values = [alpha_bar(k / steps) for k in range(steps + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(values)], dtype=torch.float64)


def _cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """The inverse of the Laplace distribution of log_snr, as diffusers tabulates it (alpha, not alpha^2, follows sigmoid)."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def _line(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


CURVES: dict[str, Callable[[int, float, float], Tensor]] = {  # (N, first, last) -> betas [N] float64
    "linear": lambda steps, first, last: _line(first, last, steps),
    "scaled_linear": lambda steps, first, last: _line(first**0.5, last**0.5, steps) ** 2,
    "sigmoid": lambda steps, first, last: torch.sigmoid(_line(-6, 6, steps)) * (last - first) + first,
    "laplace": lambda steps, first, last: _from_alpha_bar(_laplace, steps),
    "cosine": lambda steps, first, last: _from_alpha_bar(_cosine, steps),
}


def to_zero_terminal(alpha_bar: Tensor) -> Tensor:
    """Shifts alpha so that the last is 0 and scales it so that the first stays (Lin et al. 2024, algorithm 1)."""
    alpha = alpha_bar.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
