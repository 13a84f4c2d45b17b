"""The contract of a few-step method: what a denoiser is trained towards, where that is not the picture itself.

Denoising draws data, noise, times and what is told (a Lesson); a method makes a loss of them. All else, from captions to
previews, stays Denoising's. A teacher is a frozen denoiser, needed for training alone: a run is sampled without it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.guidance.auto import carried
from diffusion_cli.losses import Loss
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Sampler
from diffusion_cli.schedules import Schedule, over_pictures

Pairs = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]  # numbers [B] -> x0, noise [B, C, H, W], labels [B] or None


@dataclass(frozen=True)
class Lesson:
    """One batch: x0, noise [B, C, H, W]; t, correction [B]; told: labels [B], tokens [B, L, D] or None."""

    denoiser: Denoiser
    criterion: Loss
    source: Source
    x0: Tensor
    noise: Tensor
    t: Tensor
    correction: Tensor
    told: Tensor | None
    teacher: Denoiser | None = None
    pairs: Pairs | None = None

    @property
    def x(self) -> Tensor:
        """x_t [B, C, H, W]."""
        return self.denoiser.schedule.mix(self.x0, self.noise, self.t)

    def towards(self, x0: Tensor) -> "Lesson":
        """The same x_t, with this x0 [B, C, H, W] in it."""
        schedule, x = self.denoiser.schedule, self.x
        noise = (x - over_pictures(schedule.alpha(self.t), x) * x0) / over_pictures(schedule.sigma(self.t), x)
        return replace(self, x0=x0, noise=noise)

    def foreseen_by_teacher(self, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's x0 [B, C, H, W] for x at t [B] of the student's schedule; its own may be another one."""
        assert self.teacher is not None
        z, s = carried(x, t, self.denoiser.schedule, self.teacher.schedule)
        return self.teacher(z, s, self.told if self.teacher.network.told else None)

    def loss(self) -> Tensor:
        """[B]: the loss of a denoiser on this x0 and noise."""
        prediction = self.denoiser.prediction
        F = self.denoiser.output(self.x, self.t, self.told)[0]
        return self.criterion(F, prediction.target(self.x0, self.noise, self.t), self.t, self.correction, prediction)


class Method(ABC):
    """Numbers alone, and the name of a teacher where it needs one. What it remembers of a run is the step, in Lesson.source."""

    two_times = False  # is the network told a second time, that of where it leads to?
    denoises = True  # does the network still foresee the mean picture at every time, so that any step leads along its path?

    @property
    def place(self) -> str | None:
        """Where the teacher lies: a run, a checkpoint, hf://OWNER/NAME."""
        return None

    def check(self, denoiser: Denoiser, loss: Loss) -> None:
        """ValueError where such a denoiser cannot be trained so."""
        return

    def check_teacher(self, method: "Method | None") -> None:
        """ValueError where who was trained by that method has no path to teach."""
        if method is not None and not method.denoises:
            raise ValueError("it leaps to the picture and no longer denoises: name the run that it began from")

    def strange(self, sampler: Sampler, schedule: Schedule) -> str | None:
        """What is to be said of a walk that such a network was never taught; None of one that it was."""
        return None

    def prepared(self, teacher: Denoiser | None, taught: list[int], cache: bool, device: torch.device) -> Pairs | None:
        """What is made once, before the first step, and then Lesson.pairs. cache: kept.py may keep it."""
        return None

    @abstractmethod
    def loss(self, lesson: Lesson) -> Tensor:
        """[B]. All randomness comes from lesson.source, but for dropout."""

    def figures(self, denoiser: Denoiser, source: Source, told: Tensor | None) -> Mapping[str, Tensor]:
        """Figures [B] of an evaluation besides those of denoising."""
        return {}


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """An answer that is taken as given: without gradient, with the very dropout that the question after the block has."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        yield
    # torch before its pull request 165068 (December 2025) would give the question that is trained the weights that were
    # cast here, without gradient.
    torch.clear_autocast_cache()
