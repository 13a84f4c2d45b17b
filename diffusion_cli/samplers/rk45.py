"""The probability-flow ODE by a general solver: score_sde's RK45 sampler (Song et al. 2021, section 4.3), with torchdiffeq.

In the angle a of tan a = sigma / alpha the flow is finite and smooth from pure noise (a = pi / 2) to the data (a = 0), whatever
the schedule, and knows nothing of how that runs through t, so that a table's knots do not trouble the step size:

    u = x / sqrt(alpha^2 + sigma^2),    du/da = cos(a) n - sin(a) x0        n, x0: the noise and the picture foreseen at a

(Salimans and Ho 2022, "Progressive distillation", appendix D, where the right-hand side is their v.) dopri5 is Dormand and
Prince's pair of orders 5 and 4, known as RK45. A network is less smooth than the flow it was taught: with small tolerances the
solver follows its ripples and asks hundreds of times.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_cli.ranges import PositiveFloat
from diffusion_cli.samplers.frames import Point, noise_in, point_at, points, transfer
from diffusion_cli.samplers.sampler import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule

_FIXED = ("midpoint", "rk4")  # one move of the rule from one time of the grid to the next; rtol and atol mean nothing


@dataclass(frozen=True)
class ProbabilityFlow(Sampler):
    """States at the grid's times; between them the solver takes as many steps as it needs. From the last time above 0 one
    `transfer` leads to the picture.

    Adaptive methods take one step size for the whole batch, that of the picture with the largest error: a picture is the same
    in every batch to within the tolerance, but not to the bit. `midpoint`, `rk4` and sampler=dpm_adaptive keep it exactly.
    """

    method: Literal["dopri5", "dopri8", "bosh3", "adaptive_heun", "midpoint", "rk4"] = "dopri5"
    rtol: PositiveFloat = 1e-4
    atol: PositiveFloat = 1e-4

    def moves(self, ask: Denoise, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
        for i, (t, s) in enumerate(pairwise(points(schedule, times))):
            x0 = ask(x, t.t)
            yield State(i, t.t, x, x0)
            x = self._flow(ask, schedule, x, t, s) if s.sigma > 0 else transfer(x, x0, t, s)
        yield State(len(times) - 1, times[-1], x, x)

    def _flow(self, ask: Denoise, schedule: Schedule, x: Tensor, t: Point, s: Point) -> Tensor:
        """x [B, C, H, W] carried from t to s."""
        from torchdiffeq import odeint

        start, end = math.atan2(t.sigma, t.alpha), math.atan2(s.sigma, s.alpha)

        def slope(angle: Tensor, u: Tensor) -> Tensor:
            a = min(max(float(angle), end), start)  # in float32 it may lie outside by a rounding
            at = point_at(schedule, -math.log(math.tan(a)))
            x = math.hypot(at.alpha, at.sigma) * u
            x0 = ask(x, at.t)
            return math.cos(a) * noise_in(x, x0, at) - math.sin(a) * x0

        angles = torch.tensor([start, end], dtype=torch.float64, device=x.device)
        # a step has to end at `end`: beyond it lie times that the grid did not ask for, and at last sigma = 0
        options: dict[str, Any] = {} if self.method in _FIXED else {"norm": _largest_rms, "step_t": angles[1:]}
        u = x / math.hypot(t.alpha, t.sigma)
        u = odeint(slope, u, angles, rtol=self.rtol, atol=self.atol, method=self.method, options=options)[-1]
        return math.hypot(s.alpha, s.sigma) * u


def _largest_rms(error: Tensor) -> Tensor:
    """Of the pictures of error [B, C, H, W]."""
    return error.flatten(1).square().mean(1).sqrt().max()
