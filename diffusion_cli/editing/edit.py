"""The contract of an edit: a walk that is bound to agree with what is known of the picture."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from diffusion_cli.samplers import Denoise, Noise, Sampler, State
from diffusion_cli.schedules import Schedule


class Edit(ABC):
    @abstractmethod
    def walk(self, ask: Denoise, schedule: Schedule, sampler: Sampler, x: Tensor, noise: Noise) -> Iterator[State]:
        """The sampler's states from x [B, C, H, W] at the grid's first time, bound by the edit."""


@dataclass(frozen=True)
class Free(Edit):
    """Bound by nothing."""

    def walk(self, ask: Denoise, schedule: Schedule, sampler: Sampler, x: Tensor, noise: Noise) -> Iterator[State]:
        return sampler.walk(ask, schedule, x, noise)
