"""What the tests of samplers share: making one, counted noise, its error against a closed form, and the presets of configs/."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from closed_form import FAMILIES, Gaussian, Mixture, close
from often import some
from omegaconf import OmegaConf
from torch import Tensor

from diffusion_cli.build import build
from diffusion_cli.config import CONFIGS
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Grid, Own, Sampler, last
from diffusion_cli.schedules import EDM, VP, Flow, Schedule

DATA = Mixture()
LINES = some(FAMILIES, [VP(), EDM(), Flow()])  # one of each geometry by default, for the slowest tests


def make(kind: type[Sampler] | str, steps: int, grid: Grid | None = None, clip: bool = False, **rest) -> Sampler:
    """A sampler of that class with its defaults, or the preset of that name; at least 1000 steps if they are a limit alone."""
    made = replace(preset(kind), **rest) if isinstance(kind, str) else kind(steps=steps, grid=Own(), clip=clip, **rest)
    return replace(made, steps=steps if made.length(VP()) is not None else max(steps, 1000), grid=grid or Own(), clip=clip)


def _read(path: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "sampler" / path))


def _node(option: str) -> dict[str, Any]:
    """A sampler's YAML with what it inherits, as Hydra composes it."""
    own = _read(f"{option}.yaml")
    node: dict[str, Any] = {}
    for entry in own.pop("defaults"):
        if isinstance(entry, dict):
            node["grid"] = _read(f"grid/{entry['grid']}.yaml")
        elif entry != "_self_":
            node |= _node(entry)
    return node | own


@cache
def preset(option: str) -> Sampler:
    return build(_node(option), Sampler, "sampler")


PRESETS = sorted(file.stem for file in (CONFIGS / "sampler").glob("*.yaml"))


def fresh(like: Tensor, seed: int = 0, first: int = 0) -> Callable[..., Tensor]:
    """Counted noise for a walk over pictures like these, in float64."""
    slots = torch.arange(first, first + len(like))
    return lambda step, which=0: Source(seed, slots, step).normal(f"sample {which}", like.shape[1:]).to(like)


def no_noise(step: int, which: int = 0) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def order_of(steps: list[int], errors: list[float]) -> float:
    """The slope of log(error) against log(1 / steps)."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def walk_error(sampler: Sampler, schedule: Schedule, data: Gaussian | Mixture) -> float:
    """Distance from the exact probability flow at the last time above 0 (the jump to 0 has a test of its own)."""
    times = sampler.times(schedule)
    start, end = times[0], times[-2]
    x = schedule.sigma(start) * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64) + 0.1
    state = list(sampler.walk(data.denoise(schedule), schedule, x, no_noise))[-2]
    assert state.t == end
    return float((state.x - data.carry(schedule, x, start, end)).abs().max())


def law(sampler: Sampler, schedule: Schedule, data: Gaussian) -> tuple[float, float]:
    """Mean and variance of the result, exactly: a walk with a linear denoiser is linear in its start and in each noise.

    Row 0 starts at the mean and has no noise, row 1 starts one deviation away, row 2 + i has noise 1 at step i alone.
    """
    start, n = sampler.times(schedule)[0], sampler.steps
    x = (schedule.alpha(start) * data.m).expand(n + 2, 1, 1, 1).clone()
    x[1] += data.spread(schedule, start)
    basis = torch.eye(n + 2, dtype=torch.float64)[:, 2:].view(n + 2, 1, 1, 1, n)
    end = last(sampler.walk(data.denoise(schedule), schedule, x, lambda step: basis[..., step])).x.flatten()
    return float(end[0]), float(((end[1:] - end[0]) ** 2).sum())


# ---------------------------------------------------------------------------- beside a peer


def told_by(schedule: Schedule, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps) that the closed form gives for x at t."""
    x0 = DATA.denoise(schedule)(x, t)
    return x0, (x - schedule.alpha(t) * x0) / schedule.sigma(t)


def ours(sampler: Sampler, schedule: Schedule, x: Tensor) -> list[Tensor]:
    return [s.x for s in sampler.walk(DATA.denoise(schedule), schedule, x, fresh(x))]


def same_states(got: list[Tensor], wanted: list[Tensor], atol: float) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        close(a, b.double(), atol)


def in_sigma(peer, schedule, times: torch.Tensor) -> None:
    """Gives a peer that counts in sigma / alpha our times: exactly, where its own are interpolated in float32."""
    ratio = torch.exp(-schedule.log_snr(times) / 2)
    peer.sigmas, peer.timesteps = ratio, times[:-1] * 1000
    peer.set_begin_index(0)
