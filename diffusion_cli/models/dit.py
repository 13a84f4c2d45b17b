"""DiT: a transformer over patches, told of time and class by shifts, scales and gates of its layer norms (adaLN-zero).

    c  = embedding(time) + table[label];   shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(silu(c))
    x <- x + gate_1 * attention(norm(x) * (1 + scale_1) + shift_1)
    x <- x + gate_2 *       mlp(norm(x) * (1 + scale_2) + shift_2)

    with texts: between the two, x <- x + read(norm(x), tokens); and c has + pooled(tokens) instead of the label's    (texts.py)

Peebles and Xie 2023, "Scalable Diffusion Models with Transformers", section 3.2: S is width 384, depth 12, 6 heads; B is
768, 12, 12; L is 1024, 24, 16; XL is 1152, 28, 16. The gates and the output start at zero, so a fresh network is the
identity inside and answers 0. Cost grows with the square of the number of patches: patch size 4 is many times faster than 2.
Texts are read as by Chen et al. 2023, "PixArt-alpha", section 2.3: attention to them starts at zero too, so that a network
without texts can be taught to read; the norm of what asks, which that paper leaves out, is that of all else here.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.texts import CrossAttention, Text
from diffusion_cli.models.time_embedding import TimeEmbedding, sinusoids
from diffusion_cli.models.told import Told
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate

TIME_WAVES = 256  # width of the sinusoids of time, the same for every size of the paper


def positions(rows: int, width: int, device: torch.device) -> Tensor:
    """[rows * rows, width] fixed 2-D sin-cos positions: half the channels say the column, half the row."""
    waves = sinusoids(torch.arange(rows, dtype=torch.float32, device=device), width // 2, "sin_cos")  # [rows, width / 2]
    column = waves[None, :, :].expand(rows, rows, -1)
    row = waves[:, None, :].expand(rows, rows, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)  # [N, width]


def cut(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] to its patches [B, N, C * patch * patch], row by row."""
    rows = x.shape[3] // patch
    h = x.unflatten(3, (rows, patch)).unflatten(2, (rows, patch))  # [B, C, rows, p, rows, p]
    return h.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C * p * p]


def joined(h: Tensor, rows: int, patch: int) -> Tensor:
    """Patches [B, N, C * patch * patch] to the picture [B, C, H, W]."""
    h = h.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, rows))  # [B, rows, rows, C, p, p]
    return h.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, H, W]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D]; shift, scale [B, D]."""
    return x * (1 + scale[:, None, :]) + shift[:, None, :]  # [B, N, D]


def check_patches(image_size: int, patch_size: int, width: int, heads: int) -> None:
    """ValueError for patches and heads that do not fit."""
    if image_size % patch_size != 0:
        raise ValueError(
            f"image_size is {image_size} and patch_size is {patch_size}: the size must be a multiple of the patch; "
            f"choose another model.patch_size or dataset.size={-(-image_size // patch_size) * patch_size}"
        )
    if width % heads != 0:
        raise ValueError(f"width is {width} and heads is {heads}: choose a width that is a multiple of heads")
    if width % 4 != 0:
        raise ValueError(f"width is {width}: positions in two dimensions need a multiple of 4")


class Attention(nn.Module):
    """[B, N, D] to the same: every patch reads every other one."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # Channels stay side by side in memory: a transposed view of q, k, v misses the flash kernel of a CPU.
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # each [B, heads, N, d]
        return self.out(nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # [B, N, D]


class AdaptiveBlock(nn.Module):
    """[B, N, D], silu(c) [B, D] and, with a text_width, a text, to [B, N, D]: what it is made of is for who makes it."""

    def __init__(
        self, norm1: nn.Module, attention: nn.Module, norm2: nn.Module, mlp: nn.Module, width: int, heads: int, text_width: int
    ):
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.reading = CrossAttention(width, heads, text_width) if text_width else None
        self.norm2 = norm2
        self.mlp = mlp
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, text: Text | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)  # each [B, D]
        x = x + gate1[:, None, :] * self.attention(modulate(self.norm1(x), shift1, scale1))  # [B, N, D]
        if self.reading is not None:
            x = x + self.reading(self.norm1(x), text)  # [B, N, D]
        return x + gate2[:, None, :] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # [B, N, D]


class PatchTransformer(Told):
    """Patches through blocks that are told of time and condition, and back. patches_in: of a patch's numbers to the width;
    block: makes one; class_tokens: so many beside the patches from block number class_start on, each the vector of the class
    and a learned one of its own. Gates and the output start at zero. ValueError: patches that do not tile the picture, tokens
    that no block reads, or of no class."""

    def __init__(
        self,
        channels: int,
        image_size: int,
        num_classes: int,
        hint_channels: int,
        text_width: int,
        augment_width: int,
        two_times: bool,
        variance_channels: int,
        patch_size: int,
        width: int,
        time_shift: Literal[0, 1],
        depth: int,
        patches_in: nn.Module,
        block: Callable[[], AdaptiveBlock],
        norm_out: nn.Module,
        class_tokens: int = 0,
        class_start: int = 0,
    ):
        super().__init__(
            channels, image_size, num_classes, hint_channels, text_width, augment_width, two_times, variance_channels
        )
        self.patch_size, self.width = patch_size, width
        self.rows = image_size // patch_size
        self.patches_in = patches_in
        self.hear(TimeEmbedding(TIME_WAVES, width, "cos_sin", time_shift, two_times), width)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        if class_tokens and (self.class_embedding is None or class_start >= depth):
            instead = "give dataset.labels=true" if self.class_embedding is None else f"choose a class_start below {depth}"
            raise ValueError(f"class_tokens is {class_tokens}, and no block would read them: {instead}, or class_tokens=0")
        self.class_start, self.class_places = class_start, None
        if class_tokens:
            self.class_places = nn.Parameter(torch.empty(class_tokens, width))
        self.norm_out = norm_out
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patches_out = nn.Linear(width, (channels + variance_channels) * patch_size**2)
        self._initialise()

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        c, text = self.heard(x, time, cond, augment)  # [B, D]
        # Computed, not stored: a fixed table is no weight, and a buffer would be lost on the meta device.
        place = positions(self.rows, self.width, x.device)  # [N, D]
        h = self.patches_in(cut(x, self.patch_size)) + place  # [B, N, D]
        for k, block in enumerate(self.blocks):
            if self.class_places is not None and k == self.class_start:
                tokens = self.class_embedding(self.labels(x, cond))[:, None, :] + self.class_places  # [B, class_tokens, D]
                h = torch.cat([tokens, h], dim=1)  # [B, class_tokens + N, D]
            h = block(h, c, text)  # [B, N, D], from there on with the tokens
        shift, scale = self.modulation_out(c).chunk(2, dim=1)  # each [B, D]
        h = self.patches_out(modulate(self.norm_out(h[:, -len(place) :]), shift, scale))  # [B, N, C * p * p]
        return joined(h, self.rows, self.patch_size)  # [B, C, H, W]

    def _initialise(self) -> None:
        """Glorot-uniform everywhere; 0.02 for the embeddings; zero for the modulations and the output."""
        self.glorot()
        nn.init.normal_(self.time_embedding.linear1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear2.weight, std=0.02)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        if self.class_places is not None:
            nn.init.normal_(self.class_places, std=0.02)
        zero = [*(block.modulation for block in self.blocks), self.modulation_out, self.patches_out]
        if self.text_embedding is not None:
            zero += [self.text_embedding.pooled, *(block.reading.out for block in self.blocks)]
        for linear in zero:
            nn.init.zeros_(linear.weight)
        self.time_embedding.quieten()


class DiT(PatchTransformer):
    """patch_size: pixels along a patch's side. mlp_ratio: hidden width of the MLP over the width. dropout: in the MLP.
    time_shift: see time_embedding.py; 0 is the paper's code, 1 that of diffusers, into which such a network can be exported.
    norm_eps: of the norms before the MLP: 1e-6 the paper's code, 1e-5 what diffusers made of its published weights.

    ValueError: patches that do not tile the picture, heads that do not divide the width, a width no multiple of 4.
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
        patch_size: PositiveInt = 4,
        width: PositiveInt = 128,
        depth: PositiveInt = 8,
        heads: PositiveInt = 4,
        mlp_ratio: PositiveFloat = 4.0,
        dropout: Rate = 0.0,
        time_shift: Literal[0, 1] = 0,
        norm_eps: PositiveFloat = 1e-6,
    ):
        check_patches(image_size, patch_size, width, heads)
        mlp_width = round(width * mlp_ratio)

        def block() -> AdaptiveBlock:
            mlp = [nn.Linear(width, mlp_width), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(mlp_width, width)]
            attention, norm1, norm2 = Attention(width, heads), _norm(width), _norm(width, norm_eps)
            return AdaptiveBlock(norm1, attention, norm2, nn.Sequential(*mlp), width, heads, text_width)

        patches_in = nn.Linear((channels + hint_channels) * patch_size**2, width)
        super().__init__(
            channels, image_size, num_classes, hint_channels, text_width, augment_width, two_times, variance_channels,
            patch_size, width, time_shift, depth, patches_in, block, _norm(width),
        )  # fmt: skip


def _norm(width: int, eps: float = 1e-6) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=eps, elementwise_affine=False)
