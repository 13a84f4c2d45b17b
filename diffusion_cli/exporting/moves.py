"""A walk as numbers: what stands beside a bare network, so that whoever runs it needs nothing but arithmetic.

A network gives F; a sampler needs x0, and then a step. Both are linear in what is known (predictions.py, schedules.py), so a
walk of Euler's rule (DDIM's on a variance-preserving schedule) is four numbers a step:

    F  = network(c_in x, time, labels)
    x0 = x0_of_x x + x0_of_F F            x0_of_x = b / det,  x0_of_F = -sigma / det
    x  = x_of_x x + x_of_x0 x0            x_of_x = sigma_s / sigma_t,  x_of_x0 = alpha_s - alpha_t x_of_x
"""

import dataclasses
from itertools import pairwise
from typing import Any

import torch

from diffusion_cli.build import build
from diffusion_cli.denoiser import HINT_RANGE
from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting.parcel import Model
from diffusion_cli.samplers import Sampler


def walk_of(model: Model) -> dict[str, Any]:
    """The moves from noise to picture at the times of the run's own grid, in float64. Raises ConfigError."""
    prediction, schedule, settings = model.denoiser.prediction, model.denoiser.schedule, model.settings
    sampler = build(model.node["sampler"], Sampler, "sampler", trust=settings.trust)
    if settings.steps is not None:
        sampler = dataclasses.replace(sampler, steps=settings.steps)
    times = sampler.times(schedule)  # [n + 1] float64
    moves = []
    for t, s in pairwise(times):
        b = prediction.row(t)[1]
        det = prediction.determinant(t)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        ratio = schedule.sigma(s) / sigma
        numbers = {
            "t": t,
            "time": prediction.c_noise(t),
            "c_in": prediction.c_in(t),
            "x0_of_x": b / det,
            "x0_of_F": -sigma / det,
            "x_of_x": ratio,
            "x_of_x0": schedule.alpha(s) - alpha * ratio,
        }
        moves.append({name: float(value) for name, value in numbers.items()})
    noise = "normal" if schedule.gaussian else "uniform from -1 to 1"
    start = float(schedule.sigma(times[0]))
    return {"noise": noise, "start": start, "clip": sampler.clip, "moves": moves}


def loop(model: Model, asked: str, library: str) -> str:
    """The Python that walks with walk.json: `asked` gives F of z, time and labels; library: numpy or torch."""
    walk, n, told = walk_of(model), 16, model.facts["taught"]
    shape = ", ".join(map(str, (n, *model.shape)))
    noise = {
        ("numpy", True): f"np.random.default_rng(0).standard_normal(({shape}), dtype=np.float32)",
        ("numpy", False): f"np.random.default_rng(0).uniform(-1, 1, ({shape})).astype(np.float32)",
        ("torch", True): f"torch.randn({shape}, generator=torch.Generator().manual_seed(0))",
        ("torch", False): f"2 * torch.rand({shape}, generator=torch.Generator().manual_seed(0)) - 1",
    }[library, model.denoiser.schedule.gaussian]
    full = {"numpy": "np.full", "torch": "torch.full"}[library]
    lines = [f'x = walk["start"] * {noise}']
    null = model.denoiser.network.num_classes
    label = told[-1] if told else null
    if null:
        one = {"numpy": f"np.full({n}, {label})", "torch": f"torch.full(({n},), {label})"}[library]
        lines.append(f"labels = {one}  # {_classes(model)}; {null}: no label")
    if model.denoiser.network.hint_channels:
        lines.append("x0 = 0 * x")
    lines.append('for move in walk["moves"]:')
    of = {"numpy": f'{full}({n}, move["time"], np.float32)', "torch": f'{full}(({n},), move["time"])'}[library]
    lines.append(f"    time = {of}")
    if model.denoiser.network.hint_channels:
        join = {"numpy": "np.concatenate", "torch": "torch.cat"}[library]
        lines.append(
            f'    z = {join}([move["c_in"] * x, x0.clip({-HINT_RANGE:g}, {HINT_RANGE:g})], 1)  # and its answer before'
        )
    else:
        lines.append('    z = move["c_in"] * x')
    lines.append(f"    F = {asked}")
    lines.append('    x0 = move["x0_of_x"] * x + move["x0_of_F"] * F')
    if walk["clip"]:
        lines.append("    x0 = x0.clip(-1, 1)")
    lines.append('    x = move["x_of_x"] * x + move["x_of_x0"] * x0')
    return "\n".join(lines)


def _classes(model: Model) -> str:
    names, told = model.facts["classes"], model.facts["taught"]
    shown = ", ".join(f"{k}: {names[k]}" if str(k) != names[k] else str(k) for k in told[:12])
    return shown + (" ..." if len(told) > 12 else "")


def example(model: Model) -> tuple[torch.Tensor, ...]:
    """Arguments of the network for a batch of two: x [2, C, H, W], time [2], and labels [2] where it is told any.

    ConfigError: it reads texts, and a graph of the network alone would be without what turns them into tokens.
    """
    network = model.denoiser.network
    if network.text_width:
        raise ConfigError(f"a network that reads texts ({type(network).__name__}) is no graph so far: to=folder takes it")
    if network.two_times:
        raise ConfigError("a network of two times (objective=meanflow) is no graph so far: to=folder and safetensors take it")
    x = torch.zeros(2, network.channels + network.hint_channels, network.image_size, network.image_size)
    labels = (torch.zeros(2, dtype=torch.long),) if network.num_classes else ()
    return x, torch.ones(2), *labels
