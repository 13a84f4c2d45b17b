"""Figures with their spread, and the words in which they are kept.

{"value": v, "error": e or null, "of": what e is, "values": of each draw, where there are several}
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.evaluation.distances import MEASURES, Cloud, Measure, kernel_of_pairs
from diffusion_cli.evaluation.words import ENOUGH, name_back, name_of

Figure = dict[str, Any]


def over_pictures(values: Tensor) -> Figure:
    """The mean of values [N], each of a picture, with its standard error."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": float(values.mean()), "error": error, "of": f"standard error over {len(values)} pictures"}


def over_draws(values: Sequence[float]) -> Figure:
    """The mean of values, each of a whole draw, with their spread."""
    if len(values) == 1:
        return {"value": values[0], "error": None, "of": "one draw"}
    spread = torch.tensor(values, dtype=torch.float64)
    found = {"value": float(spread.mean()), "error": float(spread.std())}
    return {**found, "of": f"standard deviation over {len(values)} draws", "values": list(values)}


def draws_of(table: Mapping[str, Tensor], n: int) -> list[Cloud]:
    """The rows of a table as clouds of n."""
    names = ("features", "logits", "labels", "projections", "texts")
    columns = {name: table[name].split(n) if name in table else None for name in names}
    count = len(next(iter(table.values()))) // n
    return [Cloud(*(None if columns[name] is None else columns[name][draw] for name in names)) for draw in range(count)]


def of_samples(
    metrics: Sequence[str],
    draws: Sequence[Cloud],
    real: Cloud,
    features: str | None,
    measures: Mapping[str, Measure] = MEASURES,
) -> dict[str, Figure]:
    """By name. Where a Frechet distance says little, KID comes first."""
    n = len(draws[0])
    order = sorted(metrics, key=lambda metric: metric != "kid") if n < ENOUGH else metrics
    return {name_of(metric, features, n): over_draws([measures[metric](draw, real) for draw in draws]) for metric in order}


def of_reconstructions(metrics: Sequence[str], table: Mapping[str, Tensor], n: int, features: str | None) -> dict[str, Figure]:
    """Of n reconstructions beside the n pictures themselves. Both clouds are of the same pictures: at best a distance is 0."""
    if not metrics:
        return {}
    real = Cloud(table.get("real_features"), projections=table.get("real_projections"))
    found = of_samples(metrics, draws_of(table, n), real, features, {**MEASURES, "kid": kernel_of_pairs})
    return {name_back(name): figure for name, figure in found.items()}


def shown(name: str, figure: Figure, width: int) -> str:
    """One line for the person at the terminal."""
    error = "" if figure["error"] is None else f" +- {figure['error']:.4g}"
    number = f"{figure['value']:.6g}{error}"
    return f"{name:<{width}}  {number:<11}  {figure['of']}"
