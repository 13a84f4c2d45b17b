"""CFG-Zero*: classifier-free guidance of the velocity, with the untold one scaled to fit the told one, and a start at rest.

    v    = s v(null) + scale (v(label) - s v(null)),      s = <v(label), v(null)> / |v(null)|^2     for each picture
    v    = 0                                              while t > 1 - zero_init

Fan et al. 2025, "CFG-Zero*: improved classifier-free guidance for flow matching models", algorithm 1: early on the
network's velocity is worse than none. v is dx_t/dt of the schedule,

    v = alpha' x0 + sigma' noise = (alpha' - alpha sigma' / sigma) x0 + (sigma' / sigma) x_t,

noise - x0 on the straight line, where the paper states it. s depends on the curve (alpha, sigma) and not on how fast t runs
along it. The paper rests for the first 4 % of the steps; here it is the share of t, since a question does not know of
steps.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from diffusion_cli.denoiser import Condition, Denoiser
from diffusion_cli.guidance.apg import dot
from diffusion_cli.guidance.cfg import LabelFree, Rule
from diffusion_cli.guidance.guidance import Guided, chosen
from diffusion_cli.ranges import Fraction
from diffusion_cli.schedules import Schedule, over_pictures


@dataclass(frozen=True)
class CFGZero(LabelFree):
    """zero_init: share of t, from the noise, in which the walk rests; 0: none. It costs no call of the network.

    A sampler that clips x0 does not rest: on the straight line the x0 of no velocity is the noise itself.
    """

    zero_init: Fraction = 0.04

    def guide(self, denoiser: Denoiser, cond: Condition | None, helper: nn.Module | None = None) -> Guided:
        guided, schedule = super().guide(denoiser, cond, helper), denoiser.schedule

        def ask(x: Tensor, t: Tensor, hint: Tensor | None = None) -> Tensor:
            rests = self.active(schedule, t) & (t > 1 - self.zero_init)
            if not rests.any():
                return guided(x, t, hint)
            of_x0, of_x = _velocity(schedule, t)
            resting = over_pictures(-of_x / of_x0, x) * x  # the x0 of v = 0
            return resting if rests.all() else chosen(rests, resting, guided(x, t, hint))

        return ask

    def rule(self, schedule: Schedule) -> Rule:
        def combine(x: Tensor, t: Tensor, told: Tensor, untold: Tensor) -> Tensor:
            of_x0, of_x = (over_pictures(c, x) for c in _velocity(schedule, t))
            v_told, v_untold = of_x0 * told + of_x * x, of_x0 * untold + of_x * x  # [B, C, H, W]
            fitted = dot(v_told, v_untold) / dot(v_untold, v_untold).clamp(min=1e-12) * v_untold
            return (fitted + self.scale * (v_told - fitted) - of_x * x) / of_x0

        return combine


def _velocity(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with v = p x0 + q x_t."""
    d_alpha, d_sigma = schedule.velocity(t)
    q = d_sigma / schedule.sigma(t)
    return d_alpha - schedule.alpha(t) * q, q
