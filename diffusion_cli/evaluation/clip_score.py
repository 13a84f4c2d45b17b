"""CLIP score: how well a picture fits its text, the cosine of their embeddings, a mean over pictures.

    clip_score = mean_i u_i . v_i             clip_score_shuffled = mean_i u_i . v_j,  j the next picture with another text

Hessel et al. 2021, "CLIPScore", who multiply it by 2.5 and cut it at 0; here it is the cosine itself. A score alone says little
(embeddings of all pictures lie close together), so there is that of the same pictures with each other's texts.
"""

import torch
from torch import Tensor


def matched(u: Tensor, v: Tensor) -> float:
    """u, v [n, E] of length 1: pictures and their texts."""
    return float((u.double() * v.double()).sum(1).mean())


def shuffled(u: Tensor, v: Tensor) -> float:
    """The same with another's text; nan where all texts are equal."""
    others = _others(v)
    return float("nan") if others is None else matched(u, v[others])


def _others(v: Tensor) -> Tensor | None:
    """[n]: for each text the place of the next different one, around the end; None where all are equal."""
    number = torch.unique(v, dim=0, return_inverse=True)[1].tolist()
    n = len(number)
    if len(set(number)) < 2:
        return None
    return torch.tensor([next((i + d) % n for d in range(1, n) if number[(i + d) % n] != number[i]) for i in range(n)])
