"""Consistency models: one question leads from any x_t of a path to where the path ends, the picture.

    f(x_t, t) = f(x_s, s) on every path of the probability flow,   f(x, 0) = x,   f: the foreseen x0

    L = w norm(f(x_t, t), f-(x_s, s)),     rho = sigma / alpha,   s earlier than t:
    rho_s = rho_t (1 - q^-(n + 1) (1 + k sigmoid(-b rho_t))),   0 where that is negative,   n = step // every, at most stages

f- is the network as it stands, without gradient and with the same dropout (Song and Dhariwal 2023, "Improved techniques for
training consistency models", section 3.2, leave out its average); q, k, b and n are easy consistency tuning's (Geng et al.
2024, "Consistency models made easy", section 3), which begins as training a denoiser, s = 0, and moves s towards t. x_s is x0
with the same noise (consistency training: Song et al. 2023, "Consistency models", algorithm 3), or where a step of a
teacher's probability flow leads from x_t (consistency distillation, algorithm 2). f(x, 0) = x is not learned but holds by
EDM's preconditioning, and by each prediction with b(0) != 0: x0 = (b x - sigma F) / (alpha b - sigma a) is x / alpha where
sigma = 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.losses import Loss, One
from diffusion_cli.objectives.method import Lesson, Method, aside
from diffusion_cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from diffusion_cli.samplers import Ancestral, Leap, Sampler
from diffusion_cli.schedules import Schedule, over_pictures


@dataclass(frozen=True)
class Consistency(Method):
    """every: steps after which s comes q times nearer to t; stages: how often at most. weight: `gap` is 1 / (rho_t - rho_s),
    `snr` is 1 / rho_t^2 + 1 / sigma_data^2, `even` is 1 (Song et al. 2023, section 5), by which a short training learns of much
    noise sooner. teacher: of consistency distillation, None for training without one; solver: its step. ValueError: q not
    above 1."""

    every: PositiveInt
    stages: NonNegativeInt = 8
    q: PositiveFloat = 2.0
    k: NonNegativeFloat = 8.0
    b: PositiveFloat = 1.0
    weight: Literal["gap", "snr", "even"] = "gap"
    sigma_data: PositiveFloat = 0.5
    teacher: str | None = None
    solver: Literal["euler", "heun"] = "heun"

    denoises = False

    def __post_init__(self) -> None:
        if self.q <= 1:
            raise ValueError(f"q is {self.q}: s comes q times nearer to t at each stage, so q must be above 1")

    @property
    def place(self) -> str | None:
        return self.teacher

    def strange(self, sampler: Sampler, schedule: Schedule) -> str | None:
        anew = isinstance(sampler, Ancestral) and sampler.eta == 1 and sampler.variance == "all"
        if anew or isinstance(sampler, Leap) or sampler.length(schedule) == 1:
            return None
        return "leaps to the picture, and this walk goes by small steps: sampler=onestep or multistep"

    def check(self, denoiser: Denoiser, loss: Loss) -> None:
        check_boundary(denoiser)
        if not isinstance(loss.weight, One):
            raise ValueError("objective.method.weight says how much each noise level counts: write loss/weight=one")

    def loss(self, lesson: Lesson) -> Tensor:
        denoiser, schedule, x, t = lesson.denoiser, lesson.denoiser.schedule, lesson.x, lesson.t
        s, gap = self.earlier(schedule, t, lesson.source.step)
        with aside(x.device):
            if lesson.teacher is None:
                x_s = schedule.mix(lesson.x0, lesson.noise, s)
            else:
                x_s = flowed(lesson, x, t, s, self.solver == "heun")
            clean = over_pictures(s == 0, x) > 0
            target = torch.where(clean, x_s, denoiser(x_s, torch.where(s == 0, t, s), lesson.told))
        error = lesson.criterion.norm(denoiser(x, t, lesson.told), target)  # [B]
        if lesson.criterion.training:
            lesson.criterion.times.observe(t, error)
        weights = {"gap": 1 / gap, "snr": schedule.log_snr(t).exp() + self.sigma_data**-2, "even": torch.ones_like(gap)}
        return lesson.correction * weights[self.weight] * error

    def earlier(self, schedule: Schedule, t: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(s [B] in [0, t), rho_t - rho_s [B]) for t [B] in that step of training."""
        t = t.double()
        rho = schedule.sigma(t) / schedule.alpha(t)
        stage = min(step // self.every, self.stages)
        share = (self.q ** -(stage + 1) * (1 + self.k * torch.sigmoid(-self.b * rho))).clamp(max=1)  # of rho_t, to be left out
        log_snr = schedule.log_snr(t) - 2 * torch.log1p(-share)
        s = torch.where(share < 1, schedule.t_of_log_snr(log_snr.clamp(max=1e3)), 0)
        return s.float(), (rho * share).float()


def flowed(lesson: Lesson, x: Tensor, t: Tensor, s: Tensor, heun: bool = False) -> Tensor:
    """x [B, C, H, W] at t [B] carried to s [B] by the teacher's probability flow: one step of Heun, or of Euler, which is
    DDIM."""
    schedule = lesson.denoiser.schedule
    x0 = lesson.foreseen_by_teacher(x, t)
    y = schedule.transfer(x, x0, t, s)
    if not heun:
        return y
    asked = torch.where(s > 0, s, t)  # at s = 0 there is no noise to ask about, and Euler's step stays
    y0 = lesson.foreseen_by_teacher(y, asked)
    alpha, sigma = (over_pictures(of(asked) - of(t), x) for of in (schedule.alpha, schedule.sigma))
    n = (_noise(schedule, x, x0, t) + _noise(schedule, y, y0, asked)) / 2
    return torch.where(over_pictures(s > 0, x) > 0, x + alpha * (x0 + y0) / 2 + sigma * n, y)


def _noise(schedule: Schedule, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    return (x - over_pictures(schedule.alpha(t), x) * x0) / over_pictures(schedule.sigma(t), x)


def check_boundary(denoiser: Denoiser) -> None:
    """ValueError unless f(x, 0) = x whatever the network says: seen at a time just above 0, where sigma may be told from 0."""
    prediction, schedule = denoiser.prediction, denoiser.schedule
    t = torch.tensor(1e-4, dtype=torch.float64, device="cpu")
    of_x = schedule.alpha(t) * prediction.row(t)[1] / prediction.determinant(t)
    if not abs(float(of_x) - 1) < 0.1:
        name = type(prediction).__name__.lower()
        raise ValueError(
            f"prediction={name} does not give a clean picture back as it is (f(x, 0) = x), which few-step training rests on: "
            "choose prediction=edm, v, flow or eps"
        )
