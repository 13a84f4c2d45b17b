"""Are samples copies? Distances from samples to the training pictures, and what distance would be too small.

    d(a, b)      = sqrt(mean_j (a_j - b_j)^2)        pixels in [0, 1]; features: unit vectors, without the mean: 0 .. 2
    d_1 <= ...   the distances to the nearest, the second nearest ... training picture, mirrored too where training mirrored
    threshold    the 1 % quantile of d_1 over pictures that were not trained on (or, where none are held out, over training
                 pictures, each left out of the set): a sample within it is nearer to a training picture than 99 % of those
    close        the share of samples with d_1 <= threshold: about 1 % of samples that copy nothing, all of copies
    copied       the share of samples with d_1 < alpha mean(d_1 .. d_50), alpha = 1/2: much nearer to one training picture
                 than to others like it (Carlini et al. 2023, "Extracting training data from diffusion models", section 5.1);
                 for pixels alone: in few dimensions the distances to neighbours differ so much anyway

Squared distances are |a|^2 + |b|^2 - 2 a b, in float64: of whole numbers, as pixels are, that is exact, and a copy's is 0.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

QUANTILE = 0.01
ALPHA, AMONG = 0.5, 50  # of Carlini et al. 2023


class Near(NamedTuple):
    """For each query its nearest, rising: distance [Q, k] float64; number [Q, k] of the picture; mirrored [Q, k]."""

    distance: Tensor
    number: Tensor
    mirrored: Tensor


def nearest(queries: Tensor, chunks: Iterable[tuple[Tensor, Tensor, bool]], k: int, but: Tensor | None = None) -> Near:
    """The k nearest (fewer where there are fewer), by the root of the sum of squares.

    queries [Q, D]; chunks: (numbers [N], their vectors [N, D], whether mirrored), as many as there are; but [Q]: for each
    query the number of a picture that does not count, itself. Holds one chunk and Q (N + k) distances.
    """
    queries = queries.double()
    best = Near(*(torch.empty(len(queries), 0, dtype=kind, device=queries.device) for kind in _KINDS))
    for numbers, vectors, mirrored in chunks:
        numbers, vectors = numbers.to(queries.device), vectors.to(queries.device).double()
        squares = queries.square().sum(1)[:, None] + vectors.square().sum(1) - 2 * queries @ vectors.T  # [Q, N]
        if but is not None:
            squares[but.to(numbers)[:, None] == numbers] = torch.inf
        distance = torch.cat([best.distance, squares.clamp(min=0).sqrt()], dim=1)
        number = torch.cat([best.number, numbers.expand(len(queries), -1)], dim=1)
        flags = torch.cat([best.mirrored, torch.full_like(squares, mirrored, dtype=torch.bool)], dim=1)
        kept = distance.topk(min(k, distance.shape[1]), largest=False)
        best = Near(kept.values, number.gather(1, kept.indices), flags.gather(1, kept.indices))
    return best


_KINDS = (torch.float64, torch.int64, torch.bool)


def threshold(reference: Tensor) -> float:
    """The 1 % quantile of d_1 [R], one of its values: at least one of the reference is within it."""
    return float(torch.quantile(reference, QUANTILE, interpolation="lower"))


def close(distance: Tensor, limit: float) -> Tensor:
    """[Q] whether the nearest of distance [Q, k] is within the limit."""
    return distance[:, 0] <= limit


def copied(distance: Tensor) -> Tensor:
    """[Q] whether d_1 < alpha mean(d_1 .. d_50) (fewer where there are fewer), distance [Q, k] rising."""
    return distance[:, 0] < ALPHA * distance[:, :AMONG].mean(1)
