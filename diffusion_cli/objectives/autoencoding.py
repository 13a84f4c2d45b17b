"""Training an autoencoder: a picture there and back through a bottleneck, whose latents will be diffused.

    L = norm(y - x) + penalty,   (y, penalty) = autoencoder(x)        models/autoencoder.py says the penalty

Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1. What is told apart by
eye but not by a pixelwise norm, fine texture above all, is blurred. Two more terms are against that: a distance by the eyes of
a trained classifier (perceptual=classifier, losses/perceptual.py), which is added to the norm, and a critic
(objective/critic=patch, losses/critic.py), which is weighed against both.
"""

from collections.abc import Iterator, Mapping

import torch
from PIL.Image import Image
from torch import Tensor, nn

from diffusion_cli import drawing
from diffusion_cli.codecs import Latent
from diffusion_cli.data import Batch, Pictures
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.evaluation.reconstruction import errors
from diffusion_cli.losses import MAE, Norm, PatchCritic, Perceptual
from diffusion_cli.losses.critic import duel, moves
from diffusion_cli.models.autoencoder import Passed
from diffusion_cli.objectives.denoising import gather
from diffusion_cli.objectives.objective import Aside, Objective, Tally
from diffusion_cli.randomness import Source

MEASURED = 2048  # training pictures that the mean and spread of latents are taken of, at most


class Autoencoding(Objective):
    """An autoencoder, with the scale of its latents, the norm of what it gets wrong, and the critic that it is to deceive.

    perceptual: the eyes that see what it gets wrong, beside the norm.
    """

    shown = "reconstructions"
    example = "diffusion-report {run}"

    def __init__(
        self,
        autoencoder: Latent,
        perceptual: Perceptual | None = None,
        norm: Norm = MAE(),  # noqa: B008 (frozen)
        critic: PatchCritic | None = None,
    ):
        super().__init__()
        self._perceptual = Aside(perceptual)
        self.autoencoder = autoencoder
        self.norm = norm
        self.rules = critic
        if critic is not None:
            self.critic = critic.make(autoencoder.network.channels, autoencoder.network.image_size)
            self.coupled = True  # lambda is of the whole batch

    @property
    def perceptual(self) -> Perceptual | None:
        return self._perceptual.module

    @property
    def network(self) -> nn.Module:
        return self.autoencoder.network

    def meet(self, pictures: Pictures, device: torch.device, flip: bool) -> None:
        if self.perceptual is not None:
            self.perceptual.to(device)

    def loss(self, batch: Batch, source: Source) -> tuple[Tensor, Mapping[str, Tally]]:
        network = self.autoencoder.network
        duels = self.rules is not None and self.rules.plays(source.step)
        there_and_back = network.forward if duels else network  # compiled, its last layer could not be asked alone for lambda
        passed: Passed = there_and_back(batch.x, source.normal("latents", self._latent()))
        if self.training:
            network.observe(passed.z, source)
        error = self.norm(passed.y, batch.x)  # [B]
        one = torch.ones_like(error[0])
        tallies = {name: Tally(value, one) for name, value in network.figures(passed.told.mean(0)).items()}
        tallies["reconstruction"] = Tally(error.detach().mean(), one)
        tallies["penalty"] = Tally(passed.penalty.detach().mean(), one)
        if self.perceptual is not None:
            seen = self.perceptual(passed.y, batch.x)  # [B]
            tallies["perceptual"] = Tally(seen.detach().mean(), one)
            error = error + self.perceptual.weight * seen
        loss = error + passed.penalty
        if self.rules is not None and duels:
            found = duel(self.critic, batch.x, passed.y, error, network.last)
            loss = loss + moves(found.critic) + self.rules.weight * found.balance * moves(found.adversarial)
            tallies |= {name: Tally(value.detach().mean(), one) for name, value in found._asdict().items()}
        return loss, tallies

    def figure_names(self, tally: str) -> list[str]:
        return []

    def _latent(self) -> tuple[int, int, int]:
        network = self.autoencoder.network
        return self.autoencoder.shape(network.channels, network.image_size)

    def _there_and_back(self, x: Tensor) -> Passed:
        """By the mean of the latents; the reconstructions are as they come, and leave [-1, 1] a little."""
        passed: Passed = self.autoencoder.network(x, torch.zeros(len(x), *self._latent(), device=x.device))
        return passed

    @torch.no_grad()
    def preview(self, pictures: Pictures, source: Source) -> Mapping[str, Image]:
        """`reconstructions`: pictures, what comes back of them, and the difference, grey where there is none."""
        ids = torch.arange(min(10, len(pictures), len(source.slots)))
        x = to_float(gather(pictures, ids)).to(source.slots.device)  # [B, C, H, W]
        y = self._there_and_back(x).y.clamp(-1, 1)
        named = {"picture": x, "reconstruction": y, "difference": y - x}
        return {"reconstructions": drawing.rows({name: to_uint8(row) for name, row in named.items()})}

    @torch.no_grad()
    def evaluate(self, pictures: Pictures, source: Source, batch: int) -> dict[str, float]:
        """psnr and ssim, means over pictures; mae, mse: mean absolute and squared error; perceptual: the distance of that loss;
        the figures of the bottleneck.

        Reconstructions are of the mean of the latents and kept within [-1, 1].
        """
        network, count = self.autoencoder.network, min(len(pictures), len(source.slots))
        sums: dict[str, Tensor] = {}
        told: Tensor | None = None
        for x in _floats(pictures, count, batch, source.slots.device):
            passed = self._there_and_back(x)
            found = errors(x, passed.y.clamp(-1, 1))
            if self.perceptual is not None:
                found["perceptual"] = self.perceptual(passed.y, x)
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.sum()
            told = passed.told.sum(0) + (0 if told is None else told)  # [K]
        assert told is not None
        bottleneck = network.figures(told / count)
        return {name: float(total) / count for name, total in sums.items()} | {k: float(v) for k, v in bottleneck.items()}

    def settle(self, pictures: Pictures, batch: int) -> None:
        """The mean and spread of the latents of training pictures, which the checkpoint carries."""
        count, device = min(MEASURED, len(pictures)), self.autoencoder.mean.device
        self.autoencoder.measure(_floats(pictures, count, batch, device))


def _floats(pictures: Pictures, count: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """The first `count` pictures, [B, C, H, W] in [-1, 1]."""
    for first in range(0, count, batch):
        yield to_float(gather(pictures, torch.arange(first, min(first + batch, count)))).to(device)
