"""The U-Net of DDPM: down, middle and up again, with every feature map of the way down joined on the way up.

    block:      h = conv1(silu(norm1(x))) + linear(silu(emb));  x <- shortcut(x) + conv2(dropout(silu(norm2(h))))
    attention:  x <- x + out(softmax(q k^T / sqrt(d)) v),  q, k, v linear in norm(x), over all pixels of a level
    emb:        embedding(time) + table[label]

    other time: h = norm2(h) (1 + scale) + shift, linear in silu(emb);  other resize: a residual block, means and doublings
    patches:    squares of p x p pixels are channels of one place, [B, C p p, H / p, W / p], for the first and last convolution
    with texts: each attention is followed by x <- x + read(norm(x), tokens), and emb has + pooled(tokens)     (texts.py)

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B; with the other time and resize it is the U-Net of
Dhariwal and Nichol 2021, "Diffusion models beat GANs on image synthesis", section 3 ("ADM"). The structure is that of
diffusers' UNet2DModel, so that weights go there and back by renaming alone; options that differ between its checkpoints are
options here. The initialisation is DDPM's: Glorot-uniform weights, zero biases, and zero for the last convolution of every
residual branch and of the network, so that a fresh block is the identity and a fresh network answers 0. With texts it is the
U-Net of Rombach et al. 2022 (appendix E.2.1) without the linear layers between its residual blocks: zero again, so that the
weights of a network without texts make the same network, which then learns to read. Patches ("space to depth") are those of
Hoogeboom et al. 2023, "Simple diffusion", section 3.2, without overlap: at p = 2 a width costs a quarter, and a CPU's
convolutions are faster with more channels of fewer places.
"""

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.network import check_halvings
from diffusion_cli.models.resampling import doubled, halved
from diffusion_cli.models.texts import CrossAttention, Text
from diffusion_cli.models.time_embedding import TimeEmbedding
from diffusion_cli.models.told import Told
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate


class ResidualBlock(nn.Module):
    """[B, c_in, H, W] and silu(emb) [B, emb_width] to [B, c_out, H, W], or at twice or half the size.

    scale_shift: how the time enters, see above; way: up, down or nothing.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_width: int,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool = False,
        way: str = "",
    ):
        super().__init__()
        self.scale_shift, self.way = scale_shift, way
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(emb_width, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = nnf.silu(self.norm1(x))  # [B, c_in, H, W]
        if self.way:
            resize = halved if self.way == "down" else doubled
            h, x = resize(h, "mean"), resize(x, "mean")  # [B, c_in, H', W']
        h, time = self.conv1(h), self.time(emb)[:, :, None, None]  # [B, c_out, H', W']
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)  # each [B, c_out, 1, 1]
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        return self.shortcut(x) + self.conv2(self.dropout(nnf.silu(h)))  # [B, c_out, H', W']


class SelfAttention(nn.Module):
    """[B, C, H, W] to the same: every pixel reads every other one."""

    def __init__(self, width: int, heads: int, groups: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, width, eps)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C], N = H * W
        # Channels lie side by side in memory: other layouts of q, k, v miss the flash kernel of a CPU.
        q, k, v = (m(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        read = nnf.scaled_dot_product_attention(q, k, v)  # [B, heads, N, C / heads]
        read = self.out(read.transpose(1, 2).flatten(2))  # [B, N, C]
        return x + read.transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]


class TextAttention(nn.Module):
    """[B, C, H, W] to the same: every pixel reads every token of a text."""

    def __init__(self, width: int, heads: int, groups: int, eps: float, text_width: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps)
        self.read = CrossAttention(width, heads, text_width)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        return x + self.read(pixels, text).transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]


class Block(nn.Module):
    """A residual block, and after it, where the level has it, attention to all pixels and to a text."""

    def __init__(self, residual: ResidualBlock, attention: SelfAttention | None, reading: TextAttention | None = None):
        super().__init__()
        self.residual = residual
        self.attention = attention if attention is not None else nn.Identity()
        self.reading = reading

    def forward(self, x: Tensor, emb: Tensor, text: Text | None = None) -> Tensor:
        h = self.attention(self.residual(x, emb))  # [B, c_out, H, W]
        return h if self.reading is None else self.reading(h, text)  # [B, c_out, H, W]


class Downsample(nn.Module):
    """[B, C, H, W] to [B, C, H/2, W/2] by a convolution of stride 2, padded at the far end only or on both sides."""

    def __init__(self, width: int, padding: Literal["end", "both"]):
        super().__init__()
        self.pad = (0, 1, 0, 1) if padding == "end" else (1, 1, 1, 1)
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nnf.pad(x, self.pad))  # [B, C, H/2, W/2]


class Upsample(nn.Module):
    """[B, C, H, W] to [B, C, 2H, 2W]: every pixel doubled, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nnf.interpolate(x, scale_factor=2.0, mode="nearest"))  # [B, C, 2H, 2W]


class Level(nn.Module):
    """The blocks of one resolution and the change to the next (none at the last)."""

    def __init__(self, blocks: list[Block], resize: Downsample | Upsample | ResidualBlock | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resize = resize

    def resized(self, x: Tensor, emb: Tensor) -> Tensor:
        """At the size of the next level, if there is one."""
        if isinstance(self.resize, ResidualBlock):
            return self.resize(x, emb)
        return x if self.resize is None else self.resize(x)


class UNet(Told):
    """Levels of width * multipliers[i] channels, each of half the size of the one before.

    attention_levels: the levels with attention after each block, 0 being the full size (the middle always has it).
    head_width: channels of an attention head; None means a single head. time_order and time_shift: see time_embedding.py.
    time: how blocks take it, added, or as a scale and a shift; resize: by a convolution, or by a block.
    patch_size: pixels along the side of one place of level 0.
    ValueError: a size that cannot be halved so often, a width that groups or heads do not divide, an unknown level.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        hint_channels: NonNegativeInt = 0,
        text_width: NonNegativeInt = 0,
        augment_width: NonNegativeInt = 0,
        two_times: bool = False,
        variance_channels: NonNegativeInt = 0,
        width: PositiveInt = 128,
        multipliers: tuple[PositiveInt, ...] = (1, 2, 2, 2),
        blocks: PositiveInt = 2,
        attention_levels: tuple[NonNegativeInt, ...] = (1,),
        head_width: PositiveInt | None = None,
        dropout: Rate = 0.1,
        groups: PositiveInt = 32,
        norm_eps: PositiveFloat = 1e-6,
        time_order: Literal["sin_cos", "cos_sin"] = "sin_cos",
        time_shift: Literal[0, 1] = 1,
        downsample_padding: Literal["end", "both"] = "end",
        time: Literal["add", "scale_shift"] = "add",
        resize: Literal["conv", "block"] = "conv",
        patch_size: PositiveInt = 1,
    ):
        super().__init__(
            channels, image_size, num_classes, hint_channels, text_width, augment_width, two_times, variance_channels
        )
        if image_size % patch_size:
            raise ValueError(f"image_size is {image_size} and patch_size is {patch_size}: choose a patch_size that divides it")
        self.patch_size = patch_size
        _check(image_size // patch_size, width, multipliers, attention_levels, head_width, groups)
        emb_width = 4 * width
        self.hear(TimeEmbedding(width, emb_width, time_order, time_shift, two_times), emb_width)

        def residual_block(c_in: int, c_out: int, way: str = "") -> ResidualBlock:
            return ResidualBlock(c_in, c_out, emb_width, groups, norm_eps, dropout, time == "scale_shift", way)

        def downsample(width: int) -> Downsample | ResidualBlock:
            return Downsample(width, downsample_padding) if resize == "conv" else residual_block(width, width, "down")

        def upsample(width: int) -> Upsample | ResidualBlock:
            return Upsample(width) if resize == "conv" else residual_block(width, width, "up")

        def block(c_in: int, c_out: int, attend: bool) -> Block:
            residual = residual_block(c_in, c_out)
            heads = c_out // head_width if head_width else 1
            if not attend:
                return Block(residual, None)
            reading = TextAttention(c_out, heads, groups, norm_eps, text_width) if text_width else None
            return Block(residual, SelfAttention(c_out, heads, groups, norm_eps), reading)

        self.conv_in = nn.Conv2d((channels + hint_channels) * patch_size**2, width, 3, padding=1)
        here, skips = width, [width]  # channels now, and of every map that is kept for the way up
        last = len(multipliers) - 1
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            row = []
            for _ in range(blocks):
                row.append(block(here, width * multiplier, level in attention_levels))
                here = width * multiplier
                skips.append(here)
            self.down.append(Level(row, downsample(here) if level < last else None))
            if level < last:
                skips.append(here)

        self.mid = nn.ModuleList([block(here, here, True), block(here, here, False)])

        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            row = []
            for _ in range(blocks + 1):
                row.append(block(here + skips.pop(), width * multiplier, level in attention_levels))
                here = width * multiplier
            self.up.append(Level(row, upsample(here) if level > 0 else None))

        self.norm_out = nn.GroupNorm(groups, here, norm_eps)
        self.conv_out = nn.Conv2d(here, (channels + variance_channels) * patch_size**2, 3, padding=1)
        self._initialise()

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        emb, text = self.heard(x, time, cond, augment)  # [B, E]
        h = self.conv_in(nnf.pixel_unshuffle(x, self.patch_size))  # [B, width, H / p, W / p]
        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = block(h, emb, text)  # [B, c, h, w]
                skips.append(h)
            if level.resize is not None:
                h = level.resized(h, emb)  # [B, c, h/2, w/2]
                skips.append(h)
        for block in self.mid:
            h = block(h, emb, text)  # [B, c, h, w]
        for level in self.up:
            for block in level.blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, text)  # [B, c, h, w]
            h = level.resized(h, emb)  # [B, c, 2h, 2w]
        return nnf.pixel_shuffle(self.conv_out(nnf.silu(self.norm_out(h))), self.patch_size)  # [B, C, H, W]

    def _initialise(self) -> None:
        self.glorot()
        for part in self.modules():
            if isinstance(part, ResidualBlock):
                nn.init.zeros_(part.conv2.weight)
            if isinstance(part, SelfAttention | CrossAttention):
                nn.init.zeros_(part.out.weight)
        nn.init.zeros_(self.conv_out.weight)
        self.time_embedding.quieten()
        if self.text_embedding is not None:
            nn.init.zeros_(self.text_embedding.pooled.weight)


def _check(
    image_size: int,
    width: int,
    multipliers: tuple[int, ...],
    attention_levels: tuple[int, ...],
    head_width: int | None,
    groups: int,
) -> None:
    levels = len(multipliers)
    if levels == 0:
        raise ValueError("multipliers is empty: give one number for each level, such as [1,2,2]")
    check_halvings(image_size, levels - 1, f"multipliers has {levels} levels", "fewer multipliers")
    if width % groups != 0:
        raise ValueError(f"width is {width} and groups is {groups}: choose a width that is a multiple of groups")
    if width % 2 != 0 or width < 4:
        raise ValueError(f"width is {width}: the time embedding needs an even width of at least 4")
    for level in attention_levels:
        if level >= levels:
            raise ValueError(
                f"attention_levels has {level} and multipliers has {levels} levels: levels are counted from 0, the full "
                f"size, to {levels - 1}"
            )
    if head_width is not None:
        for level in {*attention_levels, levels - 1}:  # the last: attention in the middle
            if width * multipliers[level] % head_width != 0:
                raise ValueError(
                    f"head_width is {head_width} and level {level} has {width * multipliers[level]} channels: choose a "
                    "head_width that divides them, or null for a single head"
                )
