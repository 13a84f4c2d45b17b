"""What networks that read texts share: tokens [B, L, D] without their padding, attention to them, and their mean.

    read:    x <- out(softmax(q k^T / sqrt(d)) v),   q linear in x;  k, v linear in norm(token), without bias
    pooled:  linear(mean of norm(token) over all tokens that are no padding)

Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.3. Norms of the tokens and a
pooled text beside the time: Saharia et al. 2022, "Photorealistic text-to-image diffusion models", section 2.3. The norm has no
weights, so that a padding token, all zero, stays zero and has the value 0: a text of padding alone reads as exactly nothing.
"""

from typing import NamedTuple

import torch.nn.functional as nnf
from torch import Tensor, nn


def padding(tokens: Tensor) -> Tensor:
    """bool [B, L]: which tokens [B, L, D] are padding, as a network reads it."""
    return (tokens == 0).all(dim=-1)


class Text(NamedTuple):
    """tokens [B, L, D], of unit variance each or zero; real, seen, bool [B, 1, 1, L]: which are no padding, and which are read.

    They differ where a text is padding alone: all of it is seen then, for a softmax over nothing would be no number, and its
    values are zero. The masks are not expanded to all heads and pixels, where the flash kernel of a CPU takes twice as long.
    """

    tokens: Tensor
    real: Tensor
    seen: Tensor


class TextEmbedding(nn.Module):
    """Tokens [B, L, text_width] to the Text that attention reads, and its mean as a vector [B, width].

    ValueError: no tokens, or tokens of another width.
    """

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.pooled = nn.Linear(text_width, width)

    def forward(self, tokens: Tensor | None) -> tuple[Text, Tensor]:
        if tokens is None or tokens.shape[2:] != (self.pooled.in_features,):
            given = "none" if tokens is None else list(tokens.shape)
            raise ValueError(f"tokens [B, L, {self.pooled.in_features}] were expected, and given: {given}")
        real = ~padding(tokens)  # [B, L]
        tokens = nnf.layer_norm(tokens, tokens.shape[-1:])  # [B, L, D]
        mean = tokens.sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # [B, D]
        real = real[:, None, None, :]  # [B, 1, 1, L]
        return Text(tokens, real, real | ~real.any(-1, keepdim=True)), self.pooled(mean)


class CrossAttention(nn.Module):
    """What x [B, N, width] reads in a text: [B, N, width], to be added to x. `out` is for the network to start at zero."""

    def __init__(self, width: int, heads: int, text_width: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, d]
        k, v = self.kv(text.tokens).unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)  # each [B, heads, L, d]
        read = nnf.scaled_dot_product_attention(q, k, v, attn_mask=text.seen)  # [B, heads, N, d]
        return self.out(read.transpose(1, 2).flatten(2))  # [B, N, width]
