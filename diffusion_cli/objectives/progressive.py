"""Progressive distillation: a student of N steps learns to do in one step of DDIM what its teacher does in two.

    x_m, x_s: DDIM of the teacher from x_t to m = t - 1/2N and on to s = t - 1/N,     t = k / N
    target    x0 = (x_s - r x_t) / (alpha_s - r alpha_t),    r = sigma_s / sigma_t:   the x0 by which one step leads to x_s

(Salimans and Ho 2022, "Progressive distillation for fast sampling of diffusion models", algorithm 2; with prediction=v weight 1
is their SNR + 1.) One run halves the steps once: the next one has this one as init= and teacher, and half the steps. A teacher
that is no student itself may go by Heun's rule, which needs fewer steps for the same path.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffusion_cli.objectives.consistency import flowed
from diffusion_cli.objectives.method import Lesson, Method, aside
from diffusion_cli.ranges import PositiveInt
from diffusion_cli.samplers import Ancestral, Sampler
from diffusion_cli.schedules import Schedule, over_pictures


@dataclass(frozen=True)
class Progressive(Method):
    """steps: N, of the student on a uniform grid; the teacher's are twice as many, of that solver."""

    teacher: str | None
    steps: PositiveInt
    solver: Literal["euler", "heun"] = "euler"

    denoises = False

    @property
    def place(self) -> str | None:
        return self.teacher

    def check_teacher(self, method: Method | None) -> None:
        if not isinstance(method, Progressive):
            super().check_teacher(method)
        elif method.steps != 2 * self.steps or self.solver != "euler":
            half = f"choose objective.method.steps={method.steps // 2} objective.method.solver=euler"
            half = "and an odd number has no half" if method.steps % 2 else half
            raise ValueError(f"it goes in {method.steps} of DDIM's steps and in no others: {half}")

    def strange(self, sampler: Sampler, schedule: Schedule) -> str | None:
        known = isinstance(sampler, Ancestral) and sampler.eta == 0 and sampler.length(schedule) == self.steps
        if known and torch.allclose(sampler.times(schedule), torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)):
            return None
        return f"was taught one walk, and this is another: sampler=ddim sampler.steps={self.steps} is the one"

    def loss(self, lesson: Lesson) -> Tensor:
        lesson = replace(lesson, t=torch.ceil(lesson.t * self.steps).clamp(1, self.steps) / self.steps)
        return self.taught(lesson).loss()

    def taught(self, lesson: Lesson) -> Lesson:
        """The lesson at t = k / N with the x0 of the teacher's two steps."""
        schedule, x, t = lesson.denoiser.schedule, lesson.x, lesson.t
        m, s = ((t - part / self.steps).clamp(min=0) for part in (0.5, 1.0))
        s = torch.where(s * self.steps < 0.25, 0, s)  # exactly 0 at the last step
        heun = self.solver == "heun"
        with aside(x.device):
            x_s = flowed(lesson, flowed(lesson, x, t, m, heun), m, s, heun)
        r = schedule.sigma(s) / schedule.sigma(t)
        x0 = (x_s - over_pictures(r, x) * x) / over_pictures(schedule.alpha(s) - r * schedule.alpha(t), x)
        return lesson.towards(x0)
