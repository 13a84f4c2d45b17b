"""CLIP score: how well a picture fits its text, the cosine of their embeddings.

    score_i = u_i . v_i

Hessel et al. 2021, "CLIPScore", who multiply it by 2.5 and cut it at 0; here it is the cosine itself. A score alone says little
(embeddings of all pictures lie close together), so it is told beside that of the same pictures with each other's texts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from diffusion_cli.conditioning.tokenizer import Tokenizer
from diffusion_cli.data.pixels import to_float
from diffusion_cli.models import Clip


class Scores(NamedTuple):
    """matched: [N], of each picture and its own text; shuffled: [N], of each and the text of another, if there is one."""

    matched: Tensor
    shuffled: Tensor


@torch.no_grad()
def scores(clip: Clip, tokenizer: Tokenizer, images: Tensor, texts: Sequence[str], batch: int = 256) -> Scores:
    """images uint8 [N, C, H, W], brought to the encoder's size; texts: N of them. ValueError: another number of either.

    shuffled goes to the next different text in the order given, so it is the same at every call; nan where all are equal.
    """
    if len(images) != len(texts) or not len(texts):
        raise ValueError(f"there are {len(images)} pictures and {len(texts)} texts: each picture needs one")
    device = clip.logit_scale.device
    seen, read = [], []
    for first in range(0, len(images), batch):
        x = to_float(images[first : first + batch].to(device))  # [B, C, H, W]
        if x.shape[-1] != clip.image_size:
            x = nnf.interpolate(x, (clip.image_size,) * 2, mode="bicubic", antialias=True).clamp(-1, 1)
        ids = tokenizer.encode(texts[first : first + batch], clip.length).ids
        u, v = clip(x, ids.to(device))
        seen.append(u)
        read.append(v)
    u, v = torch.cat(seen), torch.cat(read)  # [N, E]
    others = _others(texts)
    shuffled = torch.full((len(u),), torch.nan, device=device) if others is None else (u * v[others]).sum(1)
    return Scores((u * v).sum(1), shuffled)


def _others(texts: Sequence[str]) -> list[int] | None:
    """For each text the place of the next different one, around the end; None where all are equal."""
    if len(set(texts)) < 2:
        return None
    n = len(texts)
    return [next((i + d) % n for d in range(1, n) if texts[(i + d) % n] != texts[i]) for i in range(n)]
