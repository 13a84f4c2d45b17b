"""Where a walk begins: pure noise, or a picture with so much noise as the grid's first time has (SDEdit, Meng et al. 2022)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Denoise, Sampler
from diffusion_cli.schedules import Schedule


class Start(ABC):
    @abstractmethod
    def x(self, ask: Denoise, schedule: Schedule, sampler: Sampler, source: Source, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] at the first time of the sampler's grid, for the slots of source: the numbers of the pictures."""


@dataclass(frozen=True)
class PureNoise(Start):
    def x(self, ask: Denoise, schedule: Schedule, sampler: Sampler, source: Source, shape: tuple[int, ...]) -> Tensor:
        return sampler.start(schedule, schedule.noise(source, "start", shape))


@dataclass(frozen=True)
class FromPicture(Start):
    """picture: float32 [C, H, W] within [-1, 1]. The sampler's grid is a Tail that begins where the noising ends."""

    picture: Tensor

    def x(self, ask: Denoise, schedule: Schedule, sampler: Sampler, source: Source, shape: tuple[int, ...]) -> Tensor:
        noise = schedule.noise(source, "start", shape)
        x0 = self.picture.to(noise.device).expand_as(noise)
        return schedule.mix(x0, noise, sampler.grid.times(sampler.steps, schedule)[0])
