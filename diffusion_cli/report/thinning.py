"""Fewer points of a curve that look the same: of each bucket of neighbours its lowest and its highest stay.

So a spike stays, however narrow, and its height is exact. The first and the last point stay too, and so does a bucket's first
point that is not finite: it is where a run went wrong.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[tuple[float, float]]  # (step, value), by step


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` points (and as many more as have values that are not finite, one in a bucket). most >= 4."""
    if len(points) <= most:
        return list(points)
    buckets = (most - 2) // 2
    edges = [1 + round(k * (len(points) - 2) / buckets) for k in range(buckets + 1)]
    kept = [0]
    for first, stop in pairwise(edges):
        bucket = [value for _, value in points[first:stop]]
        lost = [i for i, value in enumerate(bucket) if not math.isfinite(value)][:1]
        finite = [value for value in bucket if math.isfinite(value)] if lost else bucket
        extremes = {bucket.index(min(finite)), bucket.index(max(finite))} if finite else set()
        kept += [first + i for i in sorted(extremes.union(lost))]
    return [points[i] for i in [*kept, len(points) - 1]]


def evenly(count: int, most: int) -> list[int]:
    """At most `most` places of 0 .. count - 1, both ends among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)}) if most > 1 else [count - 1]
