"""EDM2: a U-Net whose activations, weights and updates keep their magnitude by construction (magnitudes.py).

    encoder block   x = unit(shortcut(resize(x)));  y as below
    decoder block   y as below;  x = shortcut(resize(x))           after x was joined with the map of the way down, if any
    both            y = conv2(dropout(silu(conv1(silu(x)) (1 + gain linear(emb)))));  x <- mixed(x, y, 0.3)
    attention       q, k, v = unit(linear(x)) for each head;  x <- mixed(x, out(softmax(q k^T / sqrt(d)) v), 0.3)
    emb             silu(mixed(linear(waves(time)), linear(sqrt(N) one-hot label), 0.5))

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", configuration G: no biases, no group
norms, and of learned scales only a gain in each block and one at the end, which begin at 0. A channel of ones beside the
picture stands in for biases. Sizes: width 128 is XS (125M), 192 S, 256 M, 320 L, 384 XL, for ImageNet at 64 pixels or latents;
trained with Adam at a rate of about 0.01 that falls by the inverse square root of the step, without weight decay.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.magnitudes import Table, Waves, Weights, joined, mixed, silu, unit
from diffusion_cli.models.network import Network, check_halvings
from diffusion_cli.models.resampling import doubled, halved
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate

_SHARE = 0.3  # of a branch in the sum with what goes past it
_CLIP = 256.0  # activations that fp16 could not hold are cut


class CosineAttention(nn.Module):
    """[B, C, H, W] to the same."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.heads = width // head_width
        self.qkv, self.out = Weights(width, 3 * width), Weights(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, C]
        q, k, v = unit(self.qkv(tokens).unflatten(2, (3, self.heads, -1)), 4).transpose(1, 3).unbind(2)  # [B, heads, N, d]
        read = self.out(nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # [B, N, C]
        return mixed(x, read.transpose(1, 2).unflatten(2, x.shape[2:]), _SHARE)


class Block(nn.Module):
    """[B, c_in, H, W] and emb [B, E] to [B, c_out, H, W], or at twice or half the size. way: up, down or nothing."""

    def __init__(
        self, c_in: int, c_out: int, emb_width: int, head_width: int | None, dropout: float, encoder: bool, way: str = ""
    ):
        super().__init__()
        self.encoder, self.way = encoder, way
        self.conv1 = Weights(c_out if encoder else c_in, c_out, 3)
        self.emb = Weights(emb_width, c_out)
        self.gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Weights(c_out, c_out, 3)
        self.shortcut = Weights(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = CosineAttention(c_out, head_width) if head_width else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.way:
            x = halved(x, "mean") if self.way == "down" else doubled(x, "mean")  # [B, c_in, H', W']
        if self.encoder:
            x = unit(self.shortcut(x), 1)  # [B, c_out, H', W']
        y = self.conv1(silu(x))  # [B, c_out, H', W']
        y = silu(y * (1 + self.emb(emb, self.gain))[:, :, None, None].to(y.dtype))
        y = self.conv2(self.dropout(y))  # [B, c_out, H', W']
        x = mixed(x if self.encoder else self.shortcut(x), y, _SHARE)
        return self.attention(x).clamp(-_CLIP, _CLIP)  # [B, c_out, H', W']


class EDM2(Network):
    """Levels of width * multipliers[i] channels, each of half the size of the one before; blocks of each on the way down, one
    more on the way up. attention_levels: 0 is the full size; the middle always has it. head_width: channels of an attention
    head. bandwidth: of the random waves of time, 1 for a time that is told as log(sigma)/4 (prediction=edm).

    ValueError: a size that cannot be halved so often, channels that heads do not divide.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        hint_channels: NonNegativeInt = 0,
        width: PositiveInt = 128,
        multipliers: tuple[PositiveInt, ...] = (1, 2, 3, 4),
        blocks: PositiveInt = 3,
        attention_levels: tuple[NonNegativeInt, ...] = (2, 3),
        head_width: PositiveInt = 64,
        dropout: Rate = 0.0,
        bandwidth: PositiveFloat = 1.0,
    ):
        super().__init__(channels, image_size, num_classes, hint_channels)
        last = len(multipliers) - 1
        if not multipliers:
            raise ValueError("multipliers is empty: give one number for each level, such as [1,2,2]")
        check_halvings(image_size, last, f"multipliers has {last + 1} levels", "fewer multipliers")
        for level in {*attention_levels, last} & set(range(last + 1)):
            if width * multipliers[level] % head_width:
                raise ValueError(
                    f"head_width is {head_width} and level {level} has {width * multipliers[level]} channels: choose a "
                    "head_width that divides them"
                )
        self.bandwidth = bandwidth
        emb = width * max(multipliers)

        def block(c_in: int, c_out: int, encoder: bool, way: str = "", attend: bool = False) -> Block:
            return Block(c_in, c_out, emb, head_width if attend else None, dropout, encoder, way)

        waves = width * multipliers[0]
        self.waves, self.time = Waves(waves, bandwidth), Weights(waves, emb)
        self.class_embedding = Table(num_classes + 1, emb) if num_classes else None
        here = width * multipliers[0]
        self.conv_in = Weights(1 + channels + hint_channels, here, 3)
        skips, down, up = [here], list[Block](), list[Block]()
        for level, multiplier in enumerate(multipliers):
            if level:
                down.append(block(here, here, True, "down"))
                skips.append(here)
            for _ in range(blocks):
                down.append(block(here, width * multiplier, True, "", level in attention_levels))
                here = width * multiplier
                skips.append(here)
        self.mid = nn.ModuleList([block(here, here, False, "", True), block(here, here, False)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            if level < last:
                up.append(block(here, here, False, "up"))
            for _ in range(blocks + 1):
                up.append(block(here + skips.pop(), width * multiplier, False, "", level in attention_levels))
                here = width * multiplier
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.conv_out, self.gain_out = Weights(here, channels, 3), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        emb = self.time(self.waves(time))  # [B, E]
        labels = self.labels(x, cond)
        if labels is not None:
            emb = mixed(emb, self.class_embedding(labels), 0.5)  # [B, E]
        emb = silu(emb)
        h = self.conv_in(torch.cat([torch.ones_like(x[:, :1]), x], dim=1))  # [B, width, H, W]
        skips = [h]
        for block in self.down:
            h = block(h, emb)  # [B, c, h, w]
            skips.append(h)
        for block in self.mid:
            h = block(h, emb)  # [B, c, h, w]
        for block in self.up:
            h = block(h if block.way else joined(h, skips.pop()), emb)  # [B, c, h, w]
        return self.conv_out(h, self.gain_out)  # [B, C, H, W]
