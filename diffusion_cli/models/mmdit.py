"""MM-DiT: patches of a picture and tokens of a text in one attention, each with weights of its own.

    c    = embedding(time) + pooled(tokens);   shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(silu(c)), for each
    x, y <- (x, y) + gate_1 * attention(norm(.) * (1 + scale_1) + shift_1)         one softmax over patches x and tokens y
    x, y <- (x, y) + gate_2 *       mlp(norm(.) * (1 + scale_2) + shift_2)

Esser et al. 2024, "Scaling rectified flow transformers for high-resolution image synthesis", section 4 and figure 2; queries
and keys are RMS-normalised (section 5.3.2), as in Stable Diffusion 3.5. Gates and output start at zero, as in DiT. Nothing
asks for the text behind the last block, which therefore only reads it: its text has weights of keys and values alone.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from diffusion_cli.models.dit import TIME_WAVES, check_patches, cut, joined, modulate, positions
from diffusion_cli.models.network import Network
from diffusion_cli.models.texts import TextEmbedding
from diffusion_cli.models.time_embedding import TimeEmbedding
from diffusion_cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Rate


class Stream(nn.Module):
    """The weights of one of the two in a block. read_only: keys and values alone."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, read_only: bool = False):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.kvq = nn.Linear(width, (2 if read_only else 3) * width)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.modulation = nn.Linear(width, (2 if read_only else 6) * width)
        if not read_only:
            self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
            self.out = nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, mlp_width), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(mlp_width, width)
            )

    def ask(self, h: Tensor, c: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[k, v, q] or [k, v], each [B, heads, N, d], of h [B, N, D]; and what of the modulation, [B, D] each, `take` needs."""
        shift, scale, *rest = self.modulation(c).chunk(self.modulation.out_features // h.shape[2], dim=1)
        kvq = self.kvq(modulate(self.norm(h), shift, scale)).unflatten(2, (-1, self.heads, h.shape[2] // self.heads))
        k, v, *q = kvq.transpose(1, 3).unbind(2)
        return [self.norm_k(k.float()), v, *(self.norm_q(one.float()) for one in q)], rest  # bf16 has no kernel for their gains

    def take(self, h: Tensor, read: Tensor, rest: list[Tensor]) -> Tensor:
        """h [B, N, D] with what it read, then its MLP."""
        gate1, shift, scale, gate2 = rest
        h = h + gate1[:, None, :] * self.out(read)  # [B, N, D]
        return h + gate2[:, None, :] * self.mlp(modulate(self.norm(h), shift, scale))  # [B, N, D]


class JointBlock(nn.Module):
    """Patches x [B, N, D], tokens y [B, L, D], silu(c) [B, D], what is seen, bool [B, 1, 1, N + L], to the next x and y."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, last: bool):
        super().__init__()
        self.picture = Stream(width, heads, mlp_width, dropout)
        self.text = Stream(width, heads, mlp_width, dropout, read_only=last)

    def forward(self, x: Tensor, y: Tensor, c: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        (k_x, v_x, q_x), rest_x = self.picture.ask(x, c)
        (k_y, v_y, *q_y), rest_y = self.text.ask(y, c)
        q, k, v = torch.cat([q_x, *q_y], dim=2), torch.cat([k_x, k_y], dim=2), torch.cat([v_x, v_y], dim=2)
        read = nnf.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # [B, heads, N + L, d], of the last block N
        of_x, of_y = read.transpose(1, 2).flatten(2).tensor_split([x.shape[1]], dim=1)  # [B, N, D], [B, L, D]
        return self.picture.take(x, of_x, rest_x), self.text.take(y, of_y, rest_y) if q_y else y


class MMDiT(Network):
    """The keys are DiT's. It is for texts alone. ValueError: there are none, and as DiT."""

    def __init__(
        self,
        channels: PositiveInt,
        image_size: PositiveInt,
        num_classes: NonNegativeInt,
        hint_channels: NonNegativeInt = 0,
        text_width: NonNegativeInt = 0,
        patch_size: PositiveInt = 4,
        width: PositiveInt = 128,
        depth: PositiveInt = 6,
        heads: PositiveInt = 4,
        mlp_ratio: PositiveFloat = 4.0,
        dropout: Rate = 0.0,
    ):
        super().__init__(channels, image_size, num_classes, hint_channels, text_width)
        if text_width == 0:
            raise ValueError("MMDiT reads texts, and none were chosen: give an option of the group texts, or choose model=dit")
        check_patches(image_size, patch_size, width, heads)
        self.patch_size = patch_size
        self.rows = image_size // patch_size
        self.patches_in = nn.Linear((channels + hint_channels) * patch_size**2, width)
        self.tokens_in = nn.Linear(text_width, width)
        self.time_embedding = TimeEmbedding(TIME_WAVES, width)
        self.text_embedding = TextEmbedding(text_width, width)
        mlp_width = round(width * mlp_ratio)
        self.blocks = nn.ModuleList(JointBlock(width, heads, mlp_width, dropout, i == depth - 1) for i in range(depth))
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patches_out = nn.Linear(width, channels * patch_size**2)
        self._initialise()

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        text, pooled = self.text_embedding(cond)
        c = nnf.silu(self.time_embedding(time) + pooled)  # [B, D]
        h = self.patches_in(cut(x, self.patch_size))  # [B, N, D]
        h = h + positions(self.rows, h.shape[2], x.device)  # [B, N, D]
        y = self.tokens_in(text.tokens)  # [B, L, D]: the encoder said already where in its text each stands
        seen = nnf.pad(text.real, (h.shape[1], 0), value=True)  # [B, 1, 1, N + L]
        for block in self.blocks:
            h, y = block(h, y, c, seen)  # [B, N, D], [B, L, D]
        shift, scale = self.modulation_out(c).chunk(2, dim=1)  # each [B, D]
        h = self.patches_out(modulate(self.norm_out(h), shift, scale))  # [B, N, C * p * p]
        return joined(h, self.rows, self.patch_size)  # [B, C, H, W]

    def _initialise(self) -> None:
        """As DiT: Glorot-uniform everywhere; 0.02 for the embedding of time; zero for the modulations and the output."""
        self.glorot()
        nn.init.normal_(self.time_embedding.linear1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear2.weight, std=0.02)
        zero = [*(stream.modulation for block in self.blocks for stream in (block.picture, block.text))]
        for linear in [*zero, self.modulation_out, self.patches_out, self.text_embedding.pooled]:
            nn.init.zeros_(linear.weight)
