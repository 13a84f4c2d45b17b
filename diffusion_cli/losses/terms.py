"""What may be added to a denoiser's loss; here, comparisons of the pictures of a batch with each other.

    dispersive    + w log mean_ij exp(-|z_i - z_j|^2 / (D tau))      z: what a layer makes of picture i, D numbers
    contrastive   - w |F - target'|^2                                target': another picture's, of another noise, at t

Dispersive: a picture's features keep away from those of others, which needs no second view and no other network (Wang and He
2025, "Diffuse and disperse", eq. 6 and algorithm 1). Contrastive: what is said of one picture is not what would be said of
another (Stoica et al. 2025, "Contrastive flow matching", eq. 6). Others are those of the same part on the same process.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_cli.denoiser import Denoiser
from diffusion_cli.losses.loss import Loss
from diffusion_cli.losses.weights import Learned
from diffusion_cli.predictions import Prediction
from diffusion_cli.ranges import PositiveFloat, Rate


@dataclass(frozen=True)
class Told:
    """Of a batch: what was asked, what came, what a layer made of it, [[B, D]] where one was listened to, and what was said of
    the variance, [B, C, H, W] or None."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    correction: Tensor
    F: Tensor
    z: list[Tensor]
    v: Tensor | None = None


class Term(ABC):
    learns_variance = False  # does the network say the variance of a step beside its mean?
    coupled = True  # does it compare pictures, so that a batch in parts is another one?

    @abstractmethod
    def check(self, denoiser: Denoiser, loss: Loss) -> None:
        """ValueError where this denoiser or this loss cannot have it."""

    @contextmanager
    def listening(self, network: nn.Module) -> Iterator[list[Tensor]]:
        """What the block hears of the network: nothing, unless a term says more."""
        yield []

    @abstractmethod
    def __call__(self, told: Told, prediction: Prediction, loss: Loss) -> Tensor:
        """[B]: what is added."""


@dataclass(frozen=True)
class Dispersive(Term):
    """layer: a part of the network by its name, mid.0 of a U-Net, blocks.2 of a transformer; theirs is at a quarter of the
    depth. weight, temperature: w and tau."""

    layer: str
    weight: PositiveFloat = 0.5
    temperature: PositiveFloat = 0.5

    def check(self, denoiser: Denoiser, loss: Loss) -> None:
        network = denoiser.network
        names = [name for name, _ in network.named_modules() if name.count(".") == 1 and name.endswith(".0")]
        if self.layer not in dict(network.named_modules()):
            raise ValueError(f"layer={self.layer} is no part of {type(network).__name__}: it has {', '.join(names)} and others")

    @contextmanager
    def listening(self, network: nn.Module) -> Iterator[list[Tensor]]:
        heard: list[Tensor] = []
        note = lambda part, given, made: heard.append(made.flatten(1))  # noqa: E731
        handle = network.get_submodule(self.layer).register_forward_hook(note)
        try:
            yield heard
        finally:
            handle.remove()

    def __call__(self, told: Told, prediction: Prediction, loss: Loss) -> Tensor:
        if not told.z:
            raise RuntimeError(f"nothing was heard of the layer {self.layer}, as of a network that is compiled: compile=false")
        z = told.z[-1].float()  # [B, D]
        norms = z.square().mean(1)  # [B]
        squares = (norms[:, None] + norms - 2 * z @ z.T / z.shape[1]).clamp(min=0)  # [B, B], of which the diagonal is 0
        mean = torch.logsumexp(-squares.flatten() / self.temperature, 0) - 2 * math.log(len(z))
        return (self.weight * mean).expand(len(z))  # [B]


@dataclass(frozen=True)
class Contrastive(Term):
    """weight: w. The other picture is the one before in the batch."""

    weight: Rate = 0.05

    def check(self, denoiser: Denoiser, loss: Loss) -> None:
        if isinstance(loss.weight, Learned):
            raise ValueError("a learned weight of noise levels grows without end on a difference of errors: loss/weight=one")

    def __call__(self, told: Told, prediction: Prediction, loss: Loss) -> Tensor:
        other = prediction.target(told.x0.roll(1, 0), told.noise.roll(1, 0), told.t)
        return -self.weight * told.correction * loss.weight(loss.norm(told.F, other), prediction, told.t)
