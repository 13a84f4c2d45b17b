"""Reflow: flow matching on pairs of noise and what a teacher's probability flow makes of it, so that paths become straight.

    L = E | (z - x) - v(x_t, t) |^2,     x_t = (1 - t) x + t z,     (z, x) a path's two ends
    straightness = E integral | (z - x) - v(x_t, t) |^2 dt along the student's own paths: 0 where one step is exact

(Liu et al. 2023, "Flow straight and fast", section 2.2 and eq. 7.) z is counted, so only x is kept: pair i depends on the
teacher, its sampler and i alone. A straightness is a mean over pixels.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.losses import Loss
from diffusion_cli.objectives.kept import kept
from diffusion_cli.objectives.method import Lesson, Method, Pairs
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import PositiveInt
from diffusion_cli.samplers import Euler, Sampler, Uniform, last
from diffusion_cli.schedules import Flow
from diffusion_cli.walking import walk

SEED = 7  # of the noises of pairs: another would make other pairs, and no better ones


@dataclass(frozen=True)
class Reflow(Method):
    """pairs: how many are made; sampler: by which the teacher makes them. ValueError: a schedule that is no straight line, a
    network that reads texts."""

    teacher: str | None
    pairs: PositiveInt
    sampler: Sampler

    @property
    def place(self) -> str | None:
        return self.teacher

    def check(self, denoiser: Denoiser, loss: Loss) -> None:
        if not isinstance(denoiser.schedule, Flow):
            raise ValueError("reflow is about the straight line: choose schedule=flow")
        if denoiser.network.text_width:
            raise ValueError("reflow makes pairs of labels or of nothing, not of texts: leave texts out")

    def prepared(self, teacher: Denoiser | None, taught: list[int], cache: bool, device: torch.device) -> Pairs:
        """Makes the pairs now, unless they are kept."""
        assert teacher is not None
        network = teacher.network
        shape = (self.pairs, network.channels, network.image_size, network.image_size)

        def make(ids: Tensor) -> Tensor:
            with torch.no_grad():
                return last(walk(teacher, self.sampler, Source(SEED, ids), labels(taught, ids))).x

        if cache:
            rows = kept("pairs", (teacher.digest, repr(self.sampler), repr(taught)), shape, make, device)
        else:
            rows = torch.cat([make(ids) for ids in torch.arange(self.pairs, device=device).split(256)]).__getitem__
        return lambda ids: (rows(ids), teacher.schedule.noise(Source(SEED, ids), "start", shape[1:]), labels(taught, ids))

    def loss(self, lesson: Lesson) -> Tensor:
        return self.coupled(lesson).loss()

    def coupled(self, lesson: Lesson) -> Lesson:
        """The lesson with pairs instead of pictures and noise; whose label was hidden is told none."""
        assert lesson.pairs is not None
        x0, noise, told = lesson.pairs((lesson.source.uniform("pair") * self.pairs).long())
        if told is not None and lesson.told is not None:
            null = lesson.denoiser.network.num_classes
            told = torch.where(lesson.told == null, lesson.told, told)
        return replace(lesson, x0=x0, noise=noise, told=told)

    def figures(self, denoiser: Denoiser, source: Source, told: Tensor | None) -> dict[str, Tensor]:
        return {"straightness": straightness(denoiser, source, told)}


def labels(taught: list[int], ids: Tensor) -> Tensor | None:
    """[B]: of the pairs of these numbers, in turn."""
    return torch.tensor(taught, device=ids.device)[ids % len(taught)] if taught else None


def straightness(denoiser: Denoiser, source: Source, told: Tensor | None, steps: int = 20) -> Tensor:
    """[B], of the paths from the noises of source, by Euler's rule; of a denoiser on the straight line."""
    path = torch.stack([state.x for state in walk(denoiser, Euler(steps, Uniform(), False), source, told)])
    v = (path[:-1] - path[1:]) * steps  # [steps, B, C, H, W]
    return (path[0] - path[-1] - v).square().flatten(2).mean(2).mean(0)
