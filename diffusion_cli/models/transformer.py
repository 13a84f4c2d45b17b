"""A transformer over patches as they are built today: DiT (dit.py) with four parts renewed, for large patches of bare pixels.

    norm(x)    g x / rms(x)                                                           RMSNorm, Zhang and Sennrich 2019
    mlp(x)     linear(silu(a) b),  a, b = linear(x), two thirds as wide               SwiGLU, Shazeer 2020
    q . k      norm(q) turned by its place . norm(k) turned by its place              QK-norm, Henry et al. 2020;
               half of a head's channel pairs by their row, half by their column      RoPE, Su et al. 2021, in two dimensions
    patch in   linear(linear(patch)),  narrow in between                              bottleneck

Li and He 2025, "Back to basics: let denoising generative models denoise" (JiT): a network of few wide patches has room for a
picture but not for noise, so it is trained with prediction=x0. JiT-B/16 for 256 pixels is width 768, depth 12, 12 heads,
bottleneck 128, 32 class_tokens from class_start 4; L is 1024, 24, 16, 128, 32, 8. Tokens of a class have no place and are not
turned. Yao et al. 2025 ("LightningDiT") renewed DiT for latents alike.
"""

from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.dit import AdaptiveBlock, PatchTransformer, check_patches
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate


def angles(rows: int, head_width: int, device: torch.device) -> Tensor:
    """[rows * rows, head_width / 2]: how far each pair of channels is turned, the first half by the row, the second by the
    column, at frequencies 10000^(-4 i / head_width)."""
    pairs = head_width // 4
    frequency = 10000 ** (-torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
    turn = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequency  # [rows, pairs]
    row, column = turn[:, None, :].expand(rows, rows, -1), turn[None, :, :].expand(rows, rows, -1)
    return torch.cat([row, column], dim=2).flatten(0, 1)  # [N, head_width / 2]


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """x [..., N, d]: channel i of its first half and of its second are a point in the plane, which is turned."""
    cos, sin, (a, b) = angle.cos(), angle.sin(), x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)  # [..., N, d]


class RMSNorm(nn.RMSNorm):
    """In float32: bf16 has no kernel for its gains."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class PlacedAttention(nn.Module):
    """[B, N, D] to the same: every patch reads every other one, by what is in it and how far away it is. What stands before the
    rows * rows patches has no place."""

    def __init__(self, width: int, heads: int, rows: int):
        super().__init__()
        self.heads, self.rows = heads, rows
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # each [B, heads, N, d]
        angle = nnf.pad(angles(self.rows, v.shape[3], x.device), (0, 0, x.shape[1] - self.rows**2, 0))  # [N, d / 2]
        q, k = turned(self.norm_q(q), angle).to(v), turned(self.norm_k(k), angle).to(v)
        return self.out(nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # [B, N, D]


class SwiGLU(nn.Module):
    """[B, N, D] to the same."""

    def __init__(self, width: int, inner: int, dropout: float):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.linear1(x).chunk(2, dim=-1)  # each [B, N, inner]
        return self.linear2(self.dropout(nnf.silu(a) * b))


class Transformer(PatchTransformer):
    """bottleneck: width between the two maps of a patch, which pays where a patch has many more numbers; None: one map.
    mlp_ratio: what it would be of an MLP without gate, with as many weights. class_tokens: beside the patches, from block
    number class_start on. The other keys are DiT's.

    ValueError: patches that do not tile the picture, heads that do not divide the width, heads no multiple of 4 wide, tokens
    that no block reads, or of no class.
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
        width: PositiveInt = 384,
        depth: PositiveInt = 12,
        heads: PositiveInt = 6,
        mlp_ratio: PositiveFloat = 4.0,
        bottleneck: PositiveInt | None = None,
        dropout: Rate = 0.0,
        time_shift: Literal[0, 1] = 0,
        class_tokens: NonNegativeInt = 0,
        class_start: NonNegativeInt = 0,
    ):
        check_patches(image_size, patch_size, width, heads)
        if width // heads % 4:
            raise ValueError(f"width is {width} and heads is {heads}: places in two dimensions need heads a multiple of 4 wide")
        inner, numbers = round(width * mlp_ratio * 2 / 3), (channels + hint_channels) * patch_size**2

        def block() -> AdaptiveBlock:
            attention, mlp = PlacedAttention(width, heads, image_size // patch_size), SwiGLU(width, inner, dropout)
            return AdaptiveBlock(RMSNorm(width), attention, RMSNorm(width), mlp, width, heads, text_width)

        patches_in: nn.Module = nn.Linear(numbers, width)
        if bottleneck is not None:
            patches_in = nn.Sequential(nn.Linear(numbers, bottleneck, bias=False), nn.Linear(bottleneck, width))
        super().__init__(
            channels, image_size, num_classes, hint_channels, text_width, augment_width, two_times, variance_channels,
            patch_size, width, time_shift, depth, patches_in, block, RMSNorm(width), class_tokens, class_start,
        )  # fmt: skip
