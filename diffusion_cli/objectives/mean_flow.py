"""Mean flows: a network of two times learns the average velocity between them, so that one question crosses any distance.

    u(x_t, t, s) = 1 / (t - s) integral_s^t v(x_r, r) dr,       x_s = x_t - (t - s) u,      v = noise - x0 on the straight line
    u = v - (t - s) du/dt,     du/dt = v du/dx + du/dt'         (the identity; t' the time alone)

    L = w norm(u(x_t, t, s), v - (t - s) du/dt),      du/dt by forward differentiation, taken as given

(Geng et al. 2025, "Mean flows for one-step generative modeling", eq. 6, 9 and 10, algorithms 1 and 2.) Where s = t it is flow
matching, and u(x, t, t) = v remains a denoiser: any sampler, guidance and figure works with it. t and s are the later and the
earlier of two times of the loss; a share of the pictures has s = t.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.losses import Loss, Times
from diffusion_cli.objectives.method import Lesson, Method, aside
from diffusion_cli.predictions import Velocity
from diffusion_cli.randomness import word_of
from diffusion_cli.ranges import Fraction
from diffusion_cli.schedules import Flow


@dataclass(frozen=True)
class MeanFlow(Method):
    """apart: the share of pictures with s < t. second: how the second of the two times is drawn; None: as loss.times says the
    first."""

    apart: Fraction = 0.75
    second: Times | None = None

    two_times = True

    def check(self, denoiser: Denoiser, loss: Loss) -> None:
        if not (isinstance(denoiser.schedule, Flow) and isinstance(denoiser.prediction, Velocity)):
            raise ValueError("mean flows are of the straight line: choose schedule=flow prediction=flow")

    def loss(self, lesson: Lesson) -> Tensor:
        t, s = self.two(lesson)
        lesson = replace(lesson, t=t)
        F = lesson.denoiser.output(lesson.x, t, lesson.told, s=s)[0]
        return lesson.criterion(F, self.target(lesson, s), t, lesson.correction, lesson.denoiser.prediction)

    def two(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """t and s [B], s <= t."""
        source = replace(lesson.source, seed=word_of(lesson.source.seed, "second time"))
        other = (self.second or lesson.criterion.times).sample(lesson.denoiser.schedule, source)
        t, s = torch.maximum(lesson.t, other), torch.minimum(lesson.t, other)
        return t, torch.where(source.uniform("apart") < self.apart, s, t)

    def target(self, lesson: Lesson, s: Tensor) -> Tensor:
        """v - (t - s) du/dt [B, C, H, W]. Fused attention, autocast and compiled networks know no forward derivative."""
        x, t, v = lesson.x, lesson.t, lesson.noise - lesson.x0
        plain = torch.autocast(x.device.type, enabled=False)
        with aside(x.device), plain, sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            u = lambda x, t: lesson.denoiser.output(x, t, lesson.told, s=s)[0]  # noqa: E731
            du = torch.func.jvp(u, (x, t), (v, torch.ones_like(t)))[1]
        return v - (t - s)[:, None, None, None] * du
