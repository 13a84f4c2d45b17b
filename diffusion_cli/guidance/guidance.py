"""The contract of guidance: it answers the sampler's question denoise(x, t) -> x0, with one batched call of the network."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.samplers import Denoise


class Guidance(ABC):
    @abstractmethod
    def guide(self, denoiser: Denoiser, cond: Tensor | None) -> Denoise:
        """The question for pictures under a condition: labels [B], or None where the network is told nothing."""


@dataclass(frozen=True)
class Unguided(Guidance):
    """What the network says of itself."""

    def guide(self, denoiser: Denoiser, cond: Tensor | None) -> Denoise:
        return lambda x, t: denoiser(x, t, cond)
