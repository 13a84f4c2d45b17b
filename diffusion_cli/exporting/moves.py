"""A walk as numbers: what stands beside a bare network, so that whoever runs it needs nothing but arithmetic.

A network gives F; a sampler needs x0, and then a step. Both are linear in what is known (predictions.py, schedules.py), so a
walk of Euler's rule (DDIM's on a variance-preserving schedule) is four numbers a step:

    F  = network(c_in x, time, labels or tokens)
    x0 = x0_of_x x + x0_of_F F            x0_of_x = b / det,  x0_of_F = -sigma / det
    x  = x_of_x x + x_of_x0 x0            x_of_x = sigma_s / sigma_t,  x_of_x0 = alpha_s - alpha_t x_of_x
"""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from diffusion_cli.build import build
from diffusion_cli.denoiser import HINT_RANGE
from diffusion_cli.errors import ConfigError
from diffusion_cli.exporting.parcel import Model
from diffusion_cli.exporting.parts import Part
from diffusion_cli.samplers import Sampler

GUIDANCE = 4.0  # of texts in the loop of the card, where the run's previews have none


def walk_of(model: Model) -> dict[str, Any]:
    """The moves from noise to picture at the times of the run's own grid, in float64. Raises ConfigError."""
    prediction, schedule, settings = model.denoiser.prediction, model.denoiser.schedule, model.settings
    if not schedule.white:
        raise ConfigError(
            f"to={settings.written} writes a walk that starts from white noise, and this schedule's is coloured: to=folder"
        )
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
    clip = sampler.clip and "codec" not in model.facts  # latents have no bounds
    return {"noise": noise, "start": start, "clip": clip, "moves": moves}


def loop(model: Model, library: str, parts: Sequence[Part]) -> str:
    """The Python that walks with walk.json and ends in `pictures`; library: numpy or torch; parts: the graphs there are."""
    walk, n, told, network = walk_of(model), 16, model.facts["taught"], model.denoiser.network
    there = {part.name: part for part in parts}
    numpy = library == "numpy"
    shape = ", ".join(map(str, (n, *model.diffused)))
    noise = {
        ("numpy", True): f"np.random.default_rng(0).standard_normal(({shape}), dtype=np.float32)",
        ("numpy", False): f"np.random.default_rng(0).uniform(-1, 1, ({shape})).astype(np.float32)",
        ("torch", True): f"torch.randn({shape}, generator=torch.Generator().manual_seed(0))",
        ("torch", False): f"2 * torch.rand({shape}, generator=torch.Generator().manual_seed(0)) - 1",
    }[library, model.denoiser.schedule.gaussian]

    def asked(name: str, **named: str) -> str:
        """The call of a graph; named: what is given for an input where that is not a variable of its name."""
        given = {key: named.get(key, key) for key in there[name].inputs}
        if not numpy:
            return f"{name}({', '.join(given.values())})"
        return f"{name}.run(None, {{{', '.join(f'{chr(34)}{key}{chr(34)}: {value}' for key, value in given.items())}}})[0]"

    lines = [f'x = walk["start"] * {noise}']
    null = network.num_classes
    label = told[-1] if told else null
    empty = 'np.load("null.npy")' if numpy else 'torch.from_numpy(numpy.load("null.npy"))'
    if "texts" in there:
        one, mask = ("np.array", "astype(bool)") if numpy else ("torch.tensor", "bool()")
        lines += [
            f'found = Tokenizer.from_file("tokenizer.json").encode_batch(["a red square"] * {n})',
            f"ids = {one}([text.ids for text in found])",
            f"mask = {one}([text.attention_mask for text in found]).{mask}",
            f"tokens = {asked('texts')}",
        ]
    elif network.text_width:
        again = f"np.tile({empty}, ({n}, 1, 1))" if numpy else f"{empty}.repeat({n}, 1, 1)"
        lines.append(f"tokens = {again}  # of the empty text, in place of those of others")
    elif null:
        labels = f"np.full({n}, {label})" if numpy else f"torch.full(({n},), {label})"
        lines.append(f"labels = {labels}  # {_classes(model)}; {null}: no label")
    guided = "texts" in there and model.node["objective"].get("label_dropout", 0) > 0
    if guided:
        lines.append(f"null = {'np' if numpy else 'torch'}.broadcast_to({empty}, tokens.shape)")
    if network.hint_channels:
        lines.append("x0 = 0 * x")
    lines.append('for move in walk["moves"]:')
    time = f'np.full({n}, move["time"], np.float32)' if numpy else f'torch.full(({n},), move["time"])'
    lines.append(f"    time = {time}")
    if network.hint_channels:
        join = "np.concatenate" if numpy else "torch.cat"
        lines.append(
            f'    z = {join}([move["c_in"] * x, x0.clip({-HINT_RANGE:g}, {HINT_RANGE:g})], 1)  # and its answer before'
        )
    else:
        lines.append('    z = move["c_in"] * x')
    lines.append(f"    F = {asked('network', x='z')}")
    if guided:
        lines.append(f"    F0 = {asked('network', x='z', tokens='null')}")
        scale = model.node.get("guidance", {}).get("scale", GUIDANCE)
        lines.append(f"    F = F0 + {scale:g} * (F - F0)  # classifier-free guidance")
    lines.append('    x0 = move["x0_of_x"] * x + move["x0_of_F"] * F')
    if walk["clip"]:
        lines.append("    x0 = x0.clip(-1, 1)")
    lines.append('    x = move["x_of_x"] * x + move["x_of_x0"] * x0')
    lines.append(f"pictures = {asked('decoder') if 'decoder' in there else 'x'}")
    return "\n".join(lines)


def _classes(model: Model) -> str:
    names, told = model.facts["classes"], model.facts["taught"]
    shown = ", ".join(f"{k}: {names[k]}" if str(k) != names[k] else str(k) for k in told[:12])
    return shown + (" ..." if len(told) > 12 else "")
