"""DDPM++ and NCSN++: the U-Nets of the score SDE paper that EDM trains for CIFAR-10, FFHQ and AFHQ.

    block:      h = conv1(resize(silu(norm1(x)))) + linear(emb);  x <- s (shortcut(resize(x)) + conv2(dropout(silu(norm2(h)))))
    attention:  x <- s (x + out(softmax(q k^T / sqrt(C)) v))                      s = 1 / sqrt(2)
    emb:        silu(linear(silu(linear(waves(time) + table[label]))))
    residual:   behind each halving  x <- s (x + halve(conv(y))),  y the picture at first and then the last such sum

Song et al. 2021, "Score-based generative modeling through stochastic differential equations", appendices G and H; its sizes
and where labels enter: Karras et al. 2022, appendix F.2, "DDPM++" and "NCSN++". Other than in DDPM's U-Net (unet.py), sums are
scaled, so that variances do not grow with depth; blocks change the resolution themselves; and on the way up attention stands
only behind the last block of its level. The two differ in three options: DDPM++ takes means and doublings of pixels, sines of
time, and the picture once; NCSN++ a binomial filter, random waves of time, and the picture at every level ("residual" above).
"""

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.network import Network, check_halvings
from diffusion_cli.models.resampling import Resample, doubled, halved
from diffusion_cli.models.time_embedding import Waves, sinusoids
from diffusion_cli.models.unet import SelfAttention
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate

_S = 0.5**0.5
_EPS = 1e-6


class ScaledBlock(nn.Module):
    """[B, c_in, H, W] and emb [B, E] to [B, c_out, H, W], or at twice or half the size. way: up, down or nothing."""

    def __init__(
        self, c_in: int, c_out: int, emb_width: int, groups: int, dropout: float, resample: Resample, way: str, attend: bool
    ):
        super().__init__()
        self.way, self.resample = way, resample
        self.norm1 = nn.GroupNorm(groups, c_in, _EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(emb_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, _EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or way else nn.Identity()
        self.attention = SelfAttention(c_out, 1, groups, _EPS) if attend else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resize(nnf.silu(self.norm1(x))))  # [B, c_out, H', W']
        h = nnf.silu(self.norm2(h + self.time(emb)[:, :, None, None]))  # [B, c_out, H', W']
        x = _S * (self.shortcut(self.resize(x)) + self.conv2(self.dropout(h)))  # [B, c_out, H', W']
        return x if self.attention is None else _S * self.attention(x)  # [B, c_out, H', W']

    def resize(self, x: Tensor) -> Tensor:
        if self.way == "down":
            return halved(x, self.resample)  # [B, C, H/2, W/2]
        return doubled(x, self.resample) if self.way else x  # [B, C, 2H, 2W]


class Reread(nn.Module):
    """[B, c_in, H, W] to [B, c_out, H/2, W/2]: a convolution at full size, then the halving, whose border is its border."""

    def __init__(self, c_in: int, c_out: int, resample: Resample):
        super().__init__()
        self.resample = resample
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=2 if resample == "fir" else 1)

    def forward(self, y: Tensor) -> Tensor:
        return halved(self.conv(y), self.resample, padding=0)  # [B, c_out, H/2, W/2]


class DDPMpp(Network):
    """Levels of width * multipliers[i] channels, each of half the size of the one before; blocks of each on the way down, one
    more on the way up. attention_levels: 0 is the full size; the middle always has it. groups: of the norms at most, and at
    least 4 channels in each. resample: means of pixels, or the filter [1, 3, 3, 1]. embedding: of time, sines as in DDPM, or
    twice as many random waves of that bandwidth. encoder: residual reads the picture again at every level.
    ValueError: a size that cannot be halved so often, a width that groups do not divide.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        hint_channels: NonNegativeInt = 0,
        augment_width: NonNegativeInt = 0,
        two_times: bool = False,
        width: PositiveInt = 128,
        multipliers: tuple[PositiveInt, ...] = (2, 2, 2),
        blocks: PositiveInt = 4,
        attention_levels: tuple[NonNegativeInt, ...] = (1,),
        dropout: Rate = 0.13,
        groups: PositiveInt = 32,
        resample: Literal["mean", "fir"] = "mean",
        embedding: Literal["sines", "fourier"] = "sines",
        encoder: Literal["plain", "residual"] = "plain",
        bandwidth: PositiveFloat = 16.0,
    ):
        super().__init__(channels, image_size, num_classes, hint_channels, augment_width=augment_width, two_times=two_times)
        last, emb = len(multipliers) - 1, 4 * width
        if not multipliers or width % 4 or width % groups:
            raise ValueError(
                f"width is {width}: with groups {groups} it must be a multiple of that and of 4, on one level at least"
            )
        check_halvings(image_size, last, f"multipliers has {last + 1} levels", "fewer multipliers")

        def block(c_in: int, c_out: int, way: str = "", attend: bool = False) -> ScaledBlock:
            return ScaledBlock(c_in, c_out, emb, groups, dropout, resample, way, attend)

        waves = 2 * width if embedding == "fourier" else width
        self.linear1, self.linear2 = nn.Linear(waves, emb), nn.Linear(emb, emb)
        self.span = nn.Linear(waves, waves) if two_times else None
        self.class_embedding = self.class_table(waves)
        self.augment_embedding = self.augment_table(waves)
        self.conv_in = nn.Conv2d(channels + hint_channels, width, 3, padding=1)
        here, skips, down, up = width, [width], list[ScaledBlock](), list[ScaledBlock]()
        read, rereads = channels + hint_channels, list[Reread]()
        for level, multiplier in enumerate(multipliers):
            if level:
                down.append(block(here, here, "down"))
                skips.append(here)
                rereads.append(Reread(read, read := here, resample))
            for _ in range(blocks):
                down.append(block(here, width * multiplier, "", level in attention_levels))
                here = width * multiplier
                skips.append(here)
        self.mid = nn.ModuleList([block(here, here, "", True), block(here, here)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            if level < last:
                up.append(block(here, here, "up"))
            for i in range(blocks + 1):
                up.append(block(here + skips.pop(), width * multiplier, "", level in attention_levels and i == blocks))
                here = width * multiplier
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm_out = nn.GroupNorm(groups, here, _EPS)
        self.conv_out = nn.Conv2d(here, channels, 3, padding=1)
        self.bandwidth = bandwidth if embedding == "fourier" else None
        self.waves = Waves(waves, bandwidth) if embedding == "fourier" else None
        self.rereads = nn.ModuleList(rereads) if encoder == "residual" else None
        self._initialise()

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        t, width = time if self.span is None else time[:, 0], self.linear1.in_features
        emb = self.waves(t) if self.waves is not None else sinusoids(t.float(), width, "sin_cos", 1)  # [B, width] or twice that
        if self.span is not None:
            emb = emb + self.span(sinusoids(time[:, 1].float(), width, "sin_cos", 1))  # as wide
        labels = self.labels(x, cond)
        if labels is not None:
            emb = emb + self.class_embedding(labels)  # as wide
        if augment is not None:
            emb = emb + self.augment_embedding(augment)  # as wide
        emb = nnf.silu(self.linear2(nnf.silu(self.linear1(emb))))  # [B, E]
        h, y, rereads = self.conv_in(x), x, iter(self.rereads or ())  # h [B, width, H, W]
        skips = [h]
        for block in self.down:
            h = block(h, emb)  # [B, c, h, w]
            if self.rereads is not None and block.way:
                h = y = _S * (h + next(rereads)(y))  # [B, c, h, w]
            skips.append(h)
        for block in self.mid:
            h = block(h, emb)  # [B, c, h, w]
        for block in self.up:
            h = block(h if block.way else torch.cat([h, skips.pop()], dim=1), emb)  # [B, c, h, w]
        return self.conv_out(nnf.silu(self.norm_out(h)))  # [B, C, H, W]

    def _initialise(self) -> None:
        """Glorot-uniform weights, zero biases, and zero for the last convolution of every branch and of the network."""
        self.glorot()
        for part in self.modules():
            if isinstance(part, ScaledBlock):
                nn.init.zeros_(part.conv2.weight)
            if isinstance(part, SelfAttention):
                nn.init.zeros_(part.out.weight)
        nn.init.zeros_(self.conv_out.weight)
        if self.span is not None:
            nn.init.zeros_(self.span.weight)
