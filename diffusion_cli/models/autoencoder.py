"""Autoencoders: a picture becomes a smaller map of latents and a picture again, at the price of a bottleneck.

    L = norm(y - x) + penalty,   y = decode(z),  z from encode(x)

    KL   z = mean + std eps;     penalty = kl_weight KL( N(mean, std^2) || N(0, 1) ), summed over latents
    VQ   z = nearest code;       penalty = commitment |z_e - code|^2, a mean over latents           (codebook.py)

Kingma and Welling 2013, "Auto-encoding variational Bayes", equation 10; van den Oord et al. 2017, "Neural discrete
representation learning", equation 3; both as first stages of diffusion in Rombach et al. 2022, "High-resolution image
synthesis with latent diffusion models", appendix G: there the error is summed over pixels and channels, so here, where a norm
is their mean, the sum of the KL is divided by their number, and the same kl_weight weighs the same.

The convolutions are those of diffusers' AutoencoderKL and VQModel, whose weights fit as they are.
"""

import math
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_cli.models.codebook import Codebook
from diffusion_cli.models.network import check_halvings
from diffusion_cli.randomness import Source
from diffusion_cli.ranges import NonNegativeFloat, PositiveInt, Rate
from diffusion_cli.vision import mend_torchvision


class Passed(NamedTuple):
    """What comes of a batch of pictures.

    y [B, C, H, W]: the reconstructions; penalty [B]: the price of the bottleneck; z [B, c, h, w]: what was to be coded;
    told [B, K]: what the bottleneck tells of each picture, whose mean over pictures `figures` reads.
    """

    y: Tensor
    penalty: Tensor
    z: Tensor
    told: Tensor


class Autoencoder(nn.Module, ABC):
    """Base of all autoencoders. channels, image_size: of the pictures, facts of the data set, as with networks.

    latent_channels, latent_size: of the latents [B, c, h, w].
    """

    def __init__(self, channels: int, image_size: int, latent_channels: int, latent_size: int):
        super().__init__()
        self.channels = channels
        self.image_size = image_size
        self.latent_channels = latent_channels
        self.latent_size = latent_size

    @abstractmethod
    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] -> latents [B, c, h, w] float32, before any quantisation.

        noise [B, c, h, w], standard normal: a sample instead of the mean, where the latents have a distribution.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> pictures [B, C, H, W] float32, about [-1, 1]; quantises first, where there is a codebook."""

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor) -> Passed:
        """Pictures and standard normal noise [B, c, h, w]: there and back, with the price."""

    @abstractmethod
    def figures(self, told: Tensor) -> dict[str, Tensor]:
        """Figures of the bottleneck, from the mean [K] of what it told of many pictures."""

    @property
    @abstractmethod
    def last(self) -> Tensor:
        """The weights of the decoder's last layer, where the losses of two players are weighed against each other."""

    def observe(self, z: Tensor, source: Source) -> None:
        """Called once for a training batch, after `forward`: for what is learned without a gradient."""


class AutoencoderKL(Autoencoder):
    """Latents with a normal distribution each, held near the standard one by its KL divergence.

    widths: channels of each level, each of half the size of the one before; attention: of all pixels of the smallest level;
    quant_conv: mixes the channels of the latents once more at both sides of the bottleneck.
    ValueError: a size that cannot be halved so often, widths that groups do not divide, diffusers missing.
    """

    peer: Any

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        latent_channels: PositiveInt = 4,
        widths: tuple[PositiveInt, ...] = (32, 64),
        blocks: PositiveInt = 1,
        groups: PositiveInt = 8,
        attention: bool = True,
        quant_conv: bool = True,
        kl_weight: NonNegativeFloat = 1e-6,
    ):
        super().__init__(channels, image_size, latent_channels, _latent_size(image_size, widths, groups))
        self.kl_weight = kl_weight
        from diffusers import AutoencoderKL as Peer

        self.peer = Peer(
            **_shape(channels, image_size, latent_channels, widths, blocks, groups, attention),
            use_quant_conv=quant_conv,
            use_post_quant_conv=quant_conv,
        )
        if not quant_conv:
            self.peer.quant_conv = self.peer.post_quant_conv = nn.Identity()

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) [B, c, h, w] of the latents of pictures."""
        mean, log_variance = self.peer.quant_conv(self.peer.encoder(x)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # [B, c, h, w] each

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_variance = self.moments(x)
        return mean if noise is None else mean + torch.exp(log_variance / 2) * noise  # [B, c, h, w]

    def decode(self, z: Tensor) -> Tensor:
        return self.peer.decoder(self.peer.post_quant_conv(z)).float()  # [B, C, H, W]

    def forward(self, x: Tensor, noise: Tensor) -> Passed:
        mean, log_variance = self.moments(x)
        divergence = kl(mean, log_variance).flatten(1).sum(1)  # [B], nats
        y = self.decode(mean + torch.exp(log_variance / 2) * noise)  # [B, C, H, W]
        bits = divergence.detach() / math.log(2) / mean[0].numel()
        return Passed(y, self.kl_weight * divergence / x[0].numel(), mean.detach(), bits[:, None])

    def figures(self, told: Tensor) -> dict[str, Tensor]:
        return {"kl_bits_per_latent": told[0]}

    @property
    def last(self) -> Tensor:
        return _last(self.peer)


class AutoencoderVQ(Autoencoder):
    """Each latent vector becomes the nearest of `codes` learned ones; the gradient passes straight through.

    commitment: weight of the squared distance by which the encoder is drawn to its codes. decay: the codes are moving averages
    of what falls to them, with that share of the old at each step; null: they are learned by gradient. The others as of
    AutoencoderKL.
    """

    peer: Any  # to a type checker diffusers' classes lack what their constructors register

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        latent_channels: PositiveInt = 4,
        widths: tuple[PositiveInt, ...] = (32, 64),
        blocks: PositiveInt = 1,
        groups: PositiveInt = 8,
        attention: bool = True,
        codes: PositiveInt = 256,
        commitment: NonNegativeFloat = 0.25,
        decay: Rate | None = 0.99,
    ):
        super().__init__(channels, image_size, latent_channels, _latent_size(image_size, widths, groups))
        self.commitment = commitment
        from diffusers import VQModel as Peer

        self.peer = Peer(
            **_shape(channels, image_size, latent_channels, widths, blocks, groups, attention),
            num_vq_embeddings=codes,
            vq_embed_dim=latent_channels,
        )
        self.peer.quantize = Codebook(codes, latent_channels, decay)  # under the name that the peer's weights have

    @property
    def codebook(self) -> Codebook:
        book: Codebook = self.peer.quantize
        return book

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.peer.quant_conv(self.peer.encoder(x)).float()  # [B, c, h, w]

    def decode(self, z: Tensor) -> Tensor:
        return self._decode(self.codebook(z).quantised)

    def _decode(self, quantised: Tensor) -> Tensor:
        return self.peer.decoder(self.peer.post_quant_conv(quantised)).float()  # [B, C, H, W]

    def forward(self, x: Tensor, noise: Tensor) -> Passed:
        z = self.encode(x)  # [B, c, h, w]
        found = self.codebook(z)
        penalty = self.commitment * found.to_code + found.to_vector  # [B]
        return Passed(self._decode(found.quantised), penalty, z.detach(), found.shares)

    def figures(self, told: Tensor) -> dict[str, Tensor]:
        """codebook_perplexity: how many codes, used equally, have that entropy; codebook_use: the share used at all."""
        entropy = -torch.xlogy(told, told).sum()
        return {"codebook_perplexity": torch.exp(entropy), "codebook_use": (told > 0).float().mean()}

    def observe(self, z: Tensor, source: Source) -> None:
        self.codebook.update(z, source)

    @property
    def last(self) -> Tensor:
        return _last(self.peer)


def _last(peer: Any) -> Tensor:
    weights: Tensor = peer.decoder.conv_out.weight
    return weights


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL( N(mean, variance) || N(0, 1) ) in nats, element by element."""
    return 0.5 * (mean.square() + torch.exp(log_variance) - 1 - log_variance)


def _shape(
    channels: int, image_size: int, latent_channels: int, widths: tuple[int, ...], blocks: int, groups: int, attention: bool
) -> dict[str, Any]:
    """What both say of encoder and decoder, in diffusers' words."""
    return {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "latent_channels": latent_channels,
        "norm_num_groups": groups,
        "sample_size": image_size,
        "mid_block_add_attention": attention,
    }


def _latent_size(image_size: int, widths: tuple[int, ...], groups: int) -> int:
    """Pixels at each side of the latents. ValueError for what no network of diffusers can be."""
    if find_spec("diffusers") is None:
        raise ValueError("autoencoders need diffusers: pip install 'diffusion-cli[diffusers]'")
    mend_torchvision()  # which diffusers imports
    if not widths:
        raise ValueError("widths is empty: give one number for each level, such as [32,64]")
    check_halvings(image_size, len(widths) - 1, f"widths has {len(widths)} levels", "fewer widths")
    for width in widths:
        if width % groups:
            raise ValueError(f"widths has {width} and groups is {groups}: choose multiples of groups")
    return image_size // 2 ** (len(widths) - 1)
