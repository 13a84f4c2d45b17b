"""Our schedule and prediction as a scheduler of diffusers, where one says exactly the same; else the reason why none does.

    schedule                      prediction     scheduler                        what agrees: alpha, sigma and the time told
    table of betas, shifted too   eps, v, x0     DDIM                             index k, told as k
      with learned variances                     DDPM                             and the variance of a step
    other variance-preserving     eps, v, x0     DDIM on 1001 tabulated times     index j = 1000 t, told as 1000 t
    straight line                 flow           FlowMatchEulerDiscrete           sigma = t, told as 1000 t
    any with Gaussian noise       edm            EDMEuler                         in y = x / alpha and rho = sigma / alpha

The last holds everywhere because EDM's network (Karras et al. 2022, table 1) sees x / S = y / sqrt(rho^2 + sigma_data^2) and is
told log(rho) / 4: alpha falls out. A schedule of another scale of time, or another prediction, is nobody's there.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_cli.errors import ConfigError
from diffusion_cli.predictions import X0, Eps, NextStep, Preconditioned, Prediction, Score, V, Velocity
from diffusion_cli.pretrained.words import CURVES, TYPES
from diffusion_cli.schedules import EDM, Betas, Flow, Knots, Schedule, Shifted, Tabulated, VariancePreserving

_NAMES = {Eps: "eps", V: "v", X0: "x0", Velocity: "flow", Preconditioned: "edm", NextStep: "next_step", Score: "score"}
LARGEST = 80.0  # sigma / alpha where a walk begins on a schedule that ends in pure noise, as EDM's own does
TIMES = 1000  # of a tabulated schedule: also the scale on which a network is told t


@dataclass(frozen=True)
class Peer:
    """name: the class in diffusers; config: its arguments. scales: whether it scales the network's input and the first noise.

    steps: a good number of them; note: what is to be known, in a sentence, if anything.
    """

    name: str
    config: dict[str, Any]
    scales: bool = False
    note: str | None = None


def peer_of(prediction: Prediction, clip: bool, varied: bool = False) -> Peer:
    """clip: whether each foreseen x0 is kept within [-1, 1] where the scheduler can do that; varied: whether the network's
    learned variances are walked by, where it can. Raises ConfigError."""
    schedule = prediction.schedule
    base = schedule.base if isinstance(schedule, Shifted) else schedule
    kind = type(prediction)
    if not schedule.gaussian:
        raise _refusal("the noise of schedule=mix is uniform, and the pipelines of diffusers draw Gaussian noise")
    if not schedule.white:
        raise _refusal("the noise of schedule=offset and pyramid is coloured, and the pipelines of diffusers draw white noise")
    if kind is Preconditioned:
        assert isinstance(prediction, Preconditioned)
        return _edm(schedule, prediction.sigma_data)
    if kind is Velocity and type(schedule) is Flow:
        return Peer("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": TIMES, "shift": 1.0})
    if kind in TYPES and isinstance(base, VariancePreserving):
        by_index = isinstance(base, Betas) or (isinstance(base, Tabulated) and base.told_first == 0)
        table = _table(schedule) if by_index else _tabulated(schedule)
        fixed = {"prediction_type": TYPES[kind], "clip_sample": clip, "clip_sample_range": 1.0}
        if varied and by_index:
            return Peer("DDPMScheduler", {**table, **fixed, "variance_type": "learned_range"})
        return Peer("DDIMScheduler", {**table, **fixed, "set_alpha_to_one": True})
    raise _refusal(_reason(prediction))


def _table(schedule: Schedule) -> dict[str, Any]:
    """A table of betas: by its name where they have one, else as trained_betas."""
    if isinstance(schedule, Betas) and schedule.curve in CURVES:
        ends = {"beta_start": schedule.first, "beta_end": schedule.last}
        named = {"num_train_timesteps": schedule.steps, "beta_schedule": CURVES[schedule.curve], **ends}
        return {**named, "rescale_betas_zero_snr": schedule.zero_terminal_snr, "timestep_spacing": "trailing"}
    base = schedule.base if isinstance(schedule, Shifted) else schedule
    assert isinstance(base, Knots)
    n = len(base.knots)
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    return {"num_train_timesteps": n, "trained_betas": _betas(schedule, t), "timestep_spacing": "trailing"}


def _tabulated(schedule: Schedule) -> dict[str, Any]:
    """A continuous schedule at t = 0, 1/1000 ... 1. Index 0 is clean data, where a walk never asks: it ends at index 1."""
    t = torch.linspace(0, 1, TIMES + 1, dtype=torch.float64)
    spaced = {"timestep_spacing": "leading", "steps_offset": 1}
    return {"num_train_timesteps": TIMES + 1, "trained_betas": _betas(schedule, t), **spaced}


def _betas(schedule: Schedule, t: torch.Tensor) -> list[float]:
    """beta_k = 1 - alpha_bar_k / alpha_bar_(k-1) at these times."""
    alpha_bar = schedule.alpha(t) ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return [float(beta) for beta in 1 - alpha_bar / before]


def _edm(schedule: Schedule, sigma_data: float) -> Peer:
    edm = schedule if isinstance(schedule, EDM) else None
    ends = torch.tensor([schedule.earliest, 1.0], dtype=torch.float64)
    low, high = (math.exp(-l / 2) for l in schedule.log_snr(ends).tolist())
    sigma_max = LARGEST if schedule.reaches_zero else high
    config = {
        "sigma_min": edm.sigma_min if edm else low,
        "sigma_max": sigma_max,
        "sigma_data": sigma_data,
        "rho": edm.rho if edm else 7.0,
        "prediction_type": "epsilon",
    }
    note = f"Its walk begins at sigma / alpha = {LARGEST:g}; training went on to pure noise." if schedule.reaches_zero else None
    return Peer("EDMEulerScheduler", config, scales=True, note=note)


def _reason(prediction: Prediction) -> str:
    name = _NAMES.get(type(prediction), type(prediction).__name__)
    schedule = type(prediction.schedule).__name__
    if type(prediction) in TYPES:
        return f"diffusers reads prediction={name} on variance-preserving schedules alone, not on {schedule}"
    if type(prediction) is Velocity:
        return f"diffusers reads prediction=flow on schedule=flow alone, not on {schedule}"
    return f"no scheduler of diffusers reads prediction={name}"


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"to=diffusers: {reason}. What maps: eps, v and x0 on ddpm, cosine, vp and their kind, flow on flow, edm on every "
        "schedule with Gaussian noise; to=folder, onnx and torch_export take any"
    )
