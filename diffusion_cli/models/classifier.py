"""Classifiers of noised pictures: logits = classifier(x, time), told the noise level as a denoiser's network is.

The encoder is the downward half of the U-Net (unet.py) with attention pooling at its end: one token, the mean over all pixels,
reads all pixels once more, and what it read is the input of a linear map to the classes.

    tokens = [mean; pixels] + positions,   read = softmax(q_mean k^T / sqrt(d)) v,   logits = linear(read)

Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis", section 4 and appendix H; the pooling is CLIP's
(Radford et al. 2021, section 2.4).
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.network import check_halvings
from diffusion_cli.models.time_embedding import TimeEmbedding
from diffusion_cli.models.unet import Block, Downsample, Level, ResidualBlock, SelfAttention
from diffusion_cli.ranges import NonNegativeInt, PositiveInt, Rate


class Classifier(nn.Module, ABC):
    """Base of all classifiers. channels, image_size: of the pictures; num_classes: logits that it gives.

    As with networks, the first three arguments of a constructor are facts of the data set.
    """

    def __init__(self, channels: int, image_size: int, num_classes: int):
        super().__init__()
        self.channels = channels
        self.image_size = image_size
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, C, H, W] of about unit scale, time [B] from 0, clean, to 1000, noise -> logits [B, num_classes]."""

    def maps(self, x: Tensor, time: Tensor) -> list[Tensor]:
        """The same -> feature maps [B, c, h, w] of each level, by which pictures are compared (losses/perceptual.py)."""
        raise NotImplementedError


class AttentionPool(nn.Module):
    """[B, C, H, W] to [B, C]: the mean of all pixels reads them once more."""

    def __init__(self, width: int, pixels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(pixels + 1, width) / width**0.5)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # [B, N, C]
        tokens = torch.cat([pixels.mean(1, keepdim=True), pixels], dim=1) + self.positions  # [B, 1 + N, C]
        q = self.q(tokens[:, :1]).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, 1, d]
        k, v = self.kv(tokens).unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)  # each [B, heads, 1 + N, d]
        return self.out(nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))  # [B, C]


class Encoder(Classifier):
    """Levels of width * multipliers[i] channels, each of half the size of the one before; attention_levels as in the U-Net.

    head_width: channels of an attention head, in the levels and in the pooling.
    ValueError: a size that cannot be halved so often, a width that groups or heads do not divide, an unknown level.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: PositiveInt,
        width: PositiveInt = 32,
        multipliers: tuple[PositiveInt, ...] = (1, 2, 2),
        blocks: PositiveInt = 2,
        attention_levels: tuple[NonNegativeInt, ...] = (2,),
        head_width: PositiveInt = 32,
        dropout: Rate = 0.1,
        groups: PositiveInt = 8,
    ):
        super().__init__(channels, image_size, num_classes)
        last = len(multipliers) - 1
        if last < 0:
            raise ValueError("multipliers is empty: give one number for each level, such as [1,2,2]")
        check_halvings(image_size, last, f"multipliers has {last + 1} levels", "fewer multipliers")
        if width % groups != 0 or width % 2 != 0 or width < 4:
            raise ValueError(f"width is {width} and groups is {groups}: choose an even multiple of groups, at least 4")
        for level in {*attention_levels, last}:
            if level > last:
                raise ValueError(f"attention_levels has {level} and multipliers has {last + 1} levels, counted from 0")
            if width * multipliers[level] % head_width != 0:
                here = width * multipliers[level]
                raise ValueError(f"head_width is {head_width} and level {level} has {here} channels: choose a divisor")
        emb_width, eps = 4 * width, 1e-6
        self.time_embedding = TimeEmbedding(width, emb_width)

        def block(c_in: int, c_out: int, attend: bool) -> Block:
            attention = SelfAttention(c_out, c_out // head_width, groups, eps) if attend else None
            return Block(ResidualBlock(c_in, c_out, emb_width, groups, eps, dropout), attention)

        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        here = width
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            row = [block(here if i == 0 else width * multiplier, width * multiplier, level in attention_levels)
                   for i in range(blocks)]  # fmt: skip
            here = width * multiplier
            self.down.append(Level(row, Downsample(here, "both") if level < last else None))
        self.norm_out = nn.GroupNorm(groups, here, eps)
        self.pool = AttentionPool(here, (image_size // 2**last) ** 2, here // head_width)
        self.logits = nn.Linear(here, num_classes)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.logits(self.pool(nnf.silu(self.norm_out(self.maps(x, time)[-1]))))  # [B, num_classes]

    def maps(self, x: Tensor, time: Tensor) -> list[Tensor]:
        emb = nnf.silu(self.time_embedding(time))  # [B, E]
        h, found = self.conv_in(x), []  # [B, width, H, W]
        for level in self.down:
            for block in level.blocks:
                h = block(h, emb)  # [B, c, h, w]
            found.append(h)
            if level.resize is not None:
                h = level.resize(h)  # [B, c, h/2, w/2]
        return found
