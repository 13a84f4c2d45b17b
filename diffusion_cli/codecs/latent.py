"""Latents of an autoencoder, shifted and scaled to mean 0 and standard deviation 1 in each channel.

    x = (z - mean) / std,   z = encode(picture)

Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", appendix G, divide by one std of all
channels (0.18215 is its inverse for Stable Diffusion 1); here each channel has its own, and a shift.
Of a vector-quantised autoencoder x is what comes before quantisation, and decoding quantises, as there.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion_cli.codecs.codec import Codec
from diffusion_cli.models.autoencoder import Autoencoder
from diffusion_cli.randomness import Source

SMALLEST = 1e-6  # std of a channel that says nothing


class Latent(Codec):
    """An autoencoder with the mean and std [c] of its latents, which are 0 and 1 until they were measured."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Autoencoder):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.zeros(network.latent_channels))
        self.register_buffer("std", torch.ones(network.latent_channels))

    def shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """Convolutions take any size that can be halved as often; the one that the autoencoder was trained on suits it best."""
        network, factor = self.network, self.factor
        if channels != network.channels or size % factor:
            raise ValueError(
                f"the autoencoder was trained on {network.channels} x {network.image_size} x {network.image_size} and takes "
                f"sizes that are multiples of {factor}, and the pictures are {channels} x {size} x {size}: choose "
                f"dataset.size={network.image_size} dataset.channels={network.channels}"
            )
        return network.latent_channels, size // factor, size // factor

    @property
    def factor(self) -> int:
        """Pixels along a side of what becomes one latent."""
        return self.network.image_size // self.network.latent_size

    def encode(self, pictures: Tensor, source: Source | None = None) -> Tensor:
        network = self.network
        sizes = (network.latent_channels, *(side // self.factor for side in pictures.shape[2:]))
        noise = None if source is None else source.normal("latents", sizes)
        return (network.encode(pictures, noise) - _over_latents(self.mean)) / _over_latents(self.std)  # [B, c, h, w]

    def decode(self, x: Tensor) -> Tensor:
        return self.network.decode(x * _over_latents(self.std) + _over_latents(self.mean))  # [B, C, H, W]

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Sets mean and std [c] to those of the latents of these pictures, batches [B, C, H, W] of any sizes."""
        first = second = torch.zeros(len(self.mean), dtype=torch.float64)
        count = 0
        for pictures in batches:
            z = self.network.encode(pictures).transpose(0, 1).flatten(1).cpu().double()  # [c, B h w]
            first, second, count = first + z.sum(1), second + z.square().sum(1), count + z.shape[1]
        mean = first / count
        self.mean.copy_(mean)
        self.std.copy_((second / count - mean.square()).clamp(min=SMALLEST**2).sqrt())


def _over_latents(channel: Tensor) -> Tensor:
    """[c] -> [c, 1, 1]."""
    return channel[:, None, None]
