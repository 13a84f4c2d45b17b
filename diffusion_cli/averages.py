"""Averages of any length after training, from snapshots of two (Karras et al. 2024, EDM2, section 3.2 and appendix C).

An average of exponent g after T pictures weighs what was trained at tau <= T by p(tau) = (g + 1) tau^g / T^(g + 1). A sum of
snapshots sum_i x_i theta_i has the weights sum_i x_i p_i, and x is that of the least squares to the p that is wanted:

    A x = b        A_ij = int p_i p_j        b_i = int p_i p

    int p_a p_b = (g_a + 1) (g_b + 1) / (g_a + g_b + 1)  min(T_a, T_b)^(g_a + g_b + 1) / (T_a^(g_a + 1) T_b^(g_b + 1))

A snapshot is a checkpoint of averages alone, in half precision: <run>/averages/step_00001000/.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_cli import checkpoint
from diffusion_cli.build import build
from diffusion_cli.checkpoint import Checkpoint, Damaged
from diffusion_cli.ema import EMA, LONGEST, Power, exponent
from diffusion_cli.errors import ConfigError
from diffusion_cli.pace import Pace
from diffusion_cli.pretrained.trained import GROUPS, Trained
from diffusion_cli.runs import say

FOLDER = "averages"
SHORTEST = 0.001
FAR = 0.1  # largest distance of the weights that are found from those that are wanted, as a share of the norm of these


def snapshot(run: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]) -> None:
    """Writes that of step `step`; one of an earlier attempt goes. Raises StorageError."""
    checkpoint.sweep(run / FOLDER)
    halves = {name: _half(tensors) for name, tensors in averages.items()}
    checkpoint.save(run / FOLDER, step, halves, config, {"step": step})


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}


def weights_of(found: Trained, weights: str | float, quiet: bool = False) -> dict[str, Tensor]:
    """ema, raw, or an average of that length. Raises Damaged, or ConfigError for a length that cannot be made."""
    if isinstance(weights, str):
        return found.tensors(GROUPS[weights])
    node = found.config["config"].get("ema")
    rule = None if node is None else build(node, EMA, "ema")
    if not isinstance(found, Checkpoint) or not isinstance(rule, Power):
        raise ConfigError(f"weights={weights}: averages of other lengths are made from a run that was trained with ema=power")
    if not SHORTEST <= weights < LONGEST:
        raise ConfigError(
            f"weights={weights}: the length of an average is from {SHORTEST} to below {LONGEST:.4f}, a share of the run"
        )
    lengths = {"average": rule.length, "second": rule.beside}
    for group, length in lengths.items():
        if weights == length:
            return found.tensors(group)
    kept = [path for path in checkpoint.folders(found.run / FOLDER) if int(path.name.removeprefix("step_")) < found.step]
    snapshots = [found, *(checkpoint.load(path) for path in kept)]
    of = [(one, group) for one in snapshots for group in lengths]
    pace = Pace.of(found.config["config"]["trainer"])
    known, seen = [(pace.seen(one.step), lengths[group]) for one, group in of], pace.seen(found.step)
    x, far = combination(known, seen, weights)
    if far > FAR:
        fits = [s for s in np.arange(0.01, LONGEST, 0.005).tolist() if combination(known, seen, s)[1] <= FAR]
        raise ConfigError(
            f"weights={weights} is out of reach of {len(snapshots)} snapshots of {lengths['average']} and {lengths['second']}: "
            f"lengths from {min(fits):.3f} to {max(fits):.3f} are within; more snapshots (ema.every) reach farther"
        )
    if not quiet:
        say(f"an average of length {weights} from {len(snapshots)} snapshots, its weights within {100 * far:.2g} % of it")
    return _sum(of, x, found.tensors("average"))


def combination(known: list[tuple[int, float]], seen: int, length: float) -> tuple[Tensor, float]:
    """x [n], of sum 1, for averages known by (pictures seen, length), to make one of that length after `seen` of them; and how
    far the weights are from what is wanted, as a share of their norm."""
    T, g = np.array([k[0] for k in known], float), np.array([exponent(k[1]) for k in known])
    wanted = exponent(length)
    A, b = _inner(T[:, None], g[:, None], T, g), _inner(T, g, seen, wanted)
    x = np.linalg.lstsq(A, b, rcond=1e-13)[0]
    x /= x.sum()  # weights that stand still come out as they are
    square = 1 - (2 * b @ x - x @ A @ x) / _inner(seen, wanted, seen, wanted)
    return torch.from_numpy(x), float(np.sqrt(max(square, 0.0)))


def _inner(Ta: Any, ga: Any, Tb: Any, gb: Any) -> Any:
    T = np.minimum(Ta, Tb)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (T / Ta) ** ga * (T / Tb) ** gb * T / (Ta * Tb)


def _sum(of: list[tuple[Checkpoint, str]], x: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float64, one snapshot at a time; what is no number with a point is of the newest."""
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items() if value.is_floating_point()}
    for (one, group), share in zip(of, x, strict=True):
        tensors = one.tensors(group)
        if missing := total.keys() - tensors.keys():
            raise Damaged(f"{one.folder} lacks {min(missing)}")
        for name, value in total.items():
            value.add_(tensors[name].double(), alpha=float(share))
    return {name: total[name].to(value.dtype) if name in total else value for name, value in like.items()}
