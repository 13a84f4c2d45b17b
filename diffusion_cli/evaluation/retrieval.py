"""How well pictures and texts find each other among N held-out pairs: the share of questions whose answer is among the first k.

    text to image    a caption asks all N pictures; right is any picture that bears that caption
    image to text    a picture asks all U different captions; right is its own

Zero-shot retrieval, recall at k (Radford et al. 2021, section 3 and table 13). Chance is what a random order would reach:

    1 - C(N - m, k) / C(N, k), the mean over captions that m pictures bear;    k / U
"""

import math

import torch
from torch import Tensor

RANKS = (1, 5)


def cosines(one: Tensor, two: Tensor) -> Tensor:
    """[N, M] float32 of [N, E] and [M, E] of length 1, also under autocast: bfloat16 is too coarse for a softmax."""
    with torch.autocast(one.device.type, enabled=False):
        return one.float() @ two.float().T


def retrieval(images: Tensor, texts: Tensor, own: Tensor) -> dict[str, float]:
    """images [N, E] and texts [U, E] of length 1; own [N] int64: the caption of each picture, each of the U borne by some."""
    cosine = cosines(texts, images)  # [U, N]
    bears = own[None, :] == torch.arange(len(texts), device=own.device)[:, None]  # [U, N]
    best = cosine.masked_fill(~bears, -torch.inf).amax(1)  # [U]: of the right pictures, the nearest
    before = (cosine > best[:, None]).sum(1)  # [U]: pictures nearer than that
    ties = (~bears & (cosine == best[:, None])).sum(1)  # half of the wrong ones at the same place come first
    to_image = before + ties / 2
    mine = cosine.T.gather(1, own[:, None])  # [N, 1]
    to_text = (mine < cosine.T).sum(1) + ((mine == cosine.T).sum(1) - 1) / 2  # [N]
    found = {}
    for k in RANKS:
        found[f"text_to_image_{k}"] = float((to_image < k).double().mean())
        found[f"image_to_text_{k}"] = float((to_text < k).double().mean())
        found[f"text_to_image_{k}_chance"] = _chance(bears.sum(1).tolist(), len(images), k)
        found[f"image_to_text_{k}_chance"] = min(1.0, k / len(texts))
    return found


def _chance(bearers: list[int], count: int, k: int) -> float:
    k = min(k, count)
    return sum(1 - math.comb(count - m, k) / math.comb(count, k) for m in bearers) / len(bearers)
