"""Autoguidance: away from what a worse version of the model says.

    x0 = x0(worse) + scale (x0 - x0(worse))

Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", section 3. The worse model is smaller, or
trained for less long, with the same data and labels; it needs no labels at all. The two may be of different schedules: the
worse one is asked at the same log_snr, with x scaled to its own sigma.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from diffusion_cli.denoiser import Condition, Denoiser
from diffusion_cli.guidance.guidance import Guided, Helper, Scaled, chosen
from diffusion_cli.ranges import PositiveInt
from diffusion_cli.schedules import Schedule, over_pictures


@dataclass(frozen=True)
class Auto(Scaled):
    """ckpt: the run or checkpoint of the worse model; null: the run that is asked itself, at another step or with other
    weights. step: that checkpoint of the run; null: its newest. ValueError: neither ckpt nor step, and the same weights."""

    ckpt: str | None = None
    step: PositiveInt | None = None
    weights: Literal["ema", "raw"] = "ema"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ckpt is None and self.step is None and self.weights == "ema":
            raise ValueError(
                "a worse model is needed: guidance.ckpt= a smaller or shorter run, guidance.step= an earlier checkpoint of "
                "this run, or guidance.weights=raw"
            )

    def helper(self) -> Helper:
        return Helper(Denoiser, self.ckpt, self.step, self.weights)

    def guide(self, denoiser: Denoiser, cond: Condition | None, helper: nn.Module | None = None) -> Guided:
        assert isinstance(helper, Denoiser)
        worse, told = helper, None if cond is None else cond.told
        told_worse = told if helper.network.told else None

        def ask(x: Tensor, t: Tensor, hint: Tensor | None = None) -> Tensor:
            x0 = denoiser(x, t, told, hint)
            active = self.active(denoiser.schedule, t)
            if not active.any():
                return x0
            z, s = carried(x, t, denoiser.schedule, worse.schedule)
            foreseen = worse(z, s, told_worse, hint)
            return chosen(active, foreseen + self.scale * (x0 - foreseen), x0)

        return ask


def carried(x: Tensor, t: Tensor, schedule: Schedule, other: Schedule) -> tuple[Tensor, Tensor]:
    """(x, t) of a schedule -> the same picture with the same noise at the same log_snr of another one.

    Beyond the other's end, it is asked at its end.
    """
    if schedule == other:
        return x, t
    s = other.t_of_log_snr(schedule.log_snr(t))
    return over_pictures(other.sigma(s) / schedule.sigma(t), x) * x, s
