"""U-ViT: a transformer that reads time, label and patches alike as tokens, with the long skips of a U-Net.

    tokens   embedding(time), table[label], linear(patch) ...,  each + a learned place
    block    x <- x + attention(norm(x));  x <- x + mlp(norm(x))
    way up   x <- linear([x, x of the block on the way down]) before the block
    out      conv(patches put together)                                              3 x 3

Bao et al. 2023, "All are worth words: a ViT backbone for diffusion models", section 3: long skips, joined and mapped, gave the
most; time as a token was better than as a shift and scale of norms. U-ViT-S/2 for CIFAR-10 is width 512, depth 13, 8 heads,
patches of 2: 44M. The last linear map starts at zero here, so that a fresh network answers 0.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.dit import check_patches, cut, joined
from diffusion_cli.models.network import Network
from diffusion_cli.models.time_embedding import sinusoids
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate


class TokenBlock(nn.Module):
    """[B, L, D] to the same; with `long`, of what it was on the way down too."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, long: bool):
        super().__init__()
        self.heads = heads
        self.long = nn.Linear(2 * width, width) if long else nn.Identity()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        if before is not None:
            x = self.long(torch.cat([x, before], dim=2))  # [B, L, D]
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # each [B, heads, L, d]
        x = x + self.out(nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # [B, L, D]
        return x + self.mlp(self.norm2(x))  # [B, L, D]


class UViT(Network):
    """depth: of all blocks, an odd number: as many down as up, and one between. The other keys are DiT's.

    ValueError: patches that do not tile the picture, heads that do not divide the width, an even depth.
    """

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        hint_channels: NonNegativeInt = 0,
        patch_size: PositiveInt = 2,
        width: PositiveInt = 512,
        depth: PositiveInt = 13,
        heads: PositiveInt = 8,
        mlp_ratio: PositiveFloat = 4.0,
        dropout: Rate = 0.0,
    ):
        super().__init__(channels, image_size, num_classes, hint_channels)
        check_patches(image_size, patch_size, width, heads)
        if depth % 2 == 0:
            raise ValueError(f"depth is {depth}: choose an odd one, as many blocks down as up and one between")
        self.patch_size, self.rows, self.width = patch_size, image_size // patch_size, width

        def block(long: bool) -> TokenBlock:
            return TokenBlock(width, heads, round(width * mlp_ratio), dropout, long)

        self.patches_in = nn.Linear((channels + hint_channels) * patch_size**2, width)
        self.class_embedding = self.class_table(width)
        self.told_tokens = 2 if num_classes else 1
        self.places = nn.Parameter(torch.empty(self.told_tokens + self.rows**2, width))
        self.down = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.mid = block(False)
        self.up = nn.ModuleList(block(True) for _ in range(depth // 2))
        self.norm_out = nn.LayerNorm(width)
        self.patches_out = nn.Linear(width, channels * patch_size**2)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self._initialise()

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.patches_in(cut(x, self.patch_size))  # [B, N, D]
        told = [sinusoids(time.float(), self.width).to(h)]  # [B, D] each
        labels = self.labels(x, cond)
        if labels is not None:
            told.append(self.class_embedding(labels).to(h))
        h = torch.cat([torch.stack(told, dim=1), h], dim=1) + self.places  # [B, L, D]
        skips = []
        for block in self.down:
            h = block(h)  # [B, L, D]
            skips.append(h)
        h = self.mid(h)  # [B, L, D]
        for block in self.up:
            h = block(h, skips.pop())  # [B, L, D]
        h = self.patches_out(self.norm_out(h)[:, self.told_tokens :])  # [B, N, C * p * p]
        return self.conv_out(joined(h, self.rows, self.patch_size))  # [B, C, H, W]

    def _initialise(self) -> None:
        """The paper's Gaussians of 0.02, cut at 2; zero for biases and the last linear map."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.places, std=0.02)
        nn.init.zeros_(self.patches_out.weight)
        nn.init.zeros_(self.conv_out.bias)
