#!/usr/bin/env python3
"""Every sampler at the same number of calls of the network: python scripts/sampler_table.py RUN [--out docs/samplers.md]

    mixture   Wasserstein-1 distance of 20,000 samples from the data, two Gaussians in one dimension, whose denoiser is known
              exactly: what is left is the sampler's own error. In thousandths of the range of a picture, lower is better.
    digits    share of samples of a trained run that a classifier accepts (scripts/check_digits.py), in percent; and, for
              samplers that add no noise, the root mean squared difference to where the probability flow ends (Heun, 512 steps).

A budget is calls of the network for each picture; a sampler makes as many steps as fit. One that finds its steps itself is
given tolerances, and stands where its calls are nearest below the budget. RUN is the default run: diffusion-train.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from check_digits import Data, data_of, judged, share, train
from PIL import Image
from torch import Tensor, nn

from diffusion_cli import config, drawing
from diffusion_cli.build import build
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.errors import UserError
from diffusion_cli.finding import find, load_denoiser
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Denoise, Sampler, State, last
from diffusion_cli.schedules import EDM, Betas, Flow, Schedule
from diffusion_cli.walking import walk

BUDGETS = (5, 10, 20, 50)  # calls of the network
SCHEDULES: dict[str, Schedule] = {"ddpm": Betas(), "edm": EDM(), "flow": Flow()}
TOLERANCES = (1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
WEIGHTS, MEANS, SCALES = ((0.35, 0.65), (-0.6, 0.5), (0.2, 0.25))  # of the mixture
POINTS, SIDE, SAMPLES = 20_000, 10, 250  # the points are pixels of pictures of 10 x 10, as rules with norms want it


# -- samplers and what they ask ----------------------------------------------------------------------------------------


def presets() -> dict[str, Sampler]:
    """Every option of the group `sampler`, as its file says it."""
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        names = sorted(path.stem for path in (config.CONFIGS / "sampler").glob("*.yaml"))
        nodes = {name: config.plain(hydra.compose("train", [f"sampler={name}"]))["sampler"] for name in names}
    return {name: build(node, Sampler, "sampler") for name, node in nodes.items()}


def calls_of(sampler: Sampler, schedule: Schedule, denoise: Denoise, x: Tensor) -> int:
    """Questions of one walk from x [B, C, H, W], as the slowest picture asks them."""
    asked = 0

    def ask(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return denoise(x, t)

    fresh = Source(0, torch.arange(len(x)))
    last(sampler.walk(ask, schedule, x, lambda i, which=0: fresh.at(i).normal(f"{which}", x.shape[1:]).to(x)))
    return asked


def calls_a_step(sampler: Sampler) -> int:
    """Rounded; of rules that find their steps, many."""
    x = torch.randn(1, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return round(calls_of(sampler, Flow(), mixture(Flow()), sampler.start(Flow(), x)) / (sampler.length(Flow()) or 1))


def within(sampler: Sampler, budget: int, schedule: Schedule, denoise: Denoise, x: Tensor) -> tuple[Sampler, int] | None:
    """The sampler with as many steps, or as fine a tolerance, as the budget of calls allows, and its calls."""
    if sampler.length(schedule) is None or hasattr(sampler, "rtol"):
        told = {"atol": 0.1} if hasattr(sampler, "atol") else {}
        finest_first = [replace(sampler, rtol=r, **{k: v * r for k, v in told.items()}) for r in TOLERANCES]  # type: ignore[call-arg]
    else:
        finest_first = [replace(sampler, steps=n) for n in range(budget + 1, 0, -1)]
    for candidate in finest_first:
        calls = calls_of(candidate, schedule, denoise, x)
        if calls <= budget:
            return candidate, calls
    return None


# -- the mixture -------------------------------------------------------------------------------------------------------


def mixture(schedule: Schedule) -> Denoise:
    """E[x0 | x_t] of the mixture in every pixel, for x [N, 1, H, W] and t [] or [N]."""
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (WEIGHTS, MEANS, SCALES))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v.to(x).reshape(-1, 1, 1, 1, 1) for v in (schedule.alpha(t), schedule.sigma(t)))  # [1 or N, 1, 1, 1, 1]
        spread = torch.sqrt((alpha * s) ** 2 + sigma**2)  # [.., 2]
        away = (x[..., None] - alpha * m) / spread  # [N, 1, H, W, 2]
        part = torch.softmax(torch.log(w) - torch.log(spread) - away**2 / 2, -1)
        return (part * (m + alpha * s**2 / spread * away)).sum(-1)

    return denoise


def quantiles(count: int) -> Tensor:
    """[count] float64: of the mixture, at (i + 1/2) / count, by bisection."""
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    low, high = torch.full_like(wanted, -5), torch.full_like(wanted, 5)
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(w * torch.erfc((m - middle) / s / math.sqrt(2)) / 2 for w, m, s in zip(WEIGHTS, MEANS, SCALES)) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def mixture_error(sampler: Sampler, schedule: Schedule) -> float:
    """Wasserstein-1 distance in thousandths of the range of a picture, 2: starts are the quantiles of the noise, mixed up."""
    n = torch.special.ndtri((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS)
    x = sampler.start(schedule, n[torch.randperm(POINTS, generator=torch.Generator().manual_seed(0))].view(-1, 1, SIDE, SIDE))
    fresh = Source(0, torch.arange(len(x)))
    noise = lambda i, which=0: fresh.at(i).normal(f"{which}", x.shape[1:]).to(x)  # noqa: E731
    end = last(sampler.walk(mixture(schedule), schedule, x, noise)).x.flatten().sort().values
    return 500 * float((end - quantiles(POINTS)).abs().mean())


# -- digits ------------------------------------------------------------------------------------------------------------


class Digits:
    """A trained run, a judge of its samples, and where its probability flow ends."""

    def __init__(self, run: Path):
        found = find(run)
        self.data: Data = data_of(found, None)
        self.denoiser: Denoiser = load_denoiser(found, "ema").to(memory_format=torch.channels_last)
        taught = torch.tensor(found.config["facts"]["taught"])
        self.labels: Tensor | None = taught[torch.arange(SAMPLES) % len(taught)] if len(taught) else None
        self.judge: nn.Module = train(self.data.train.images, self.data.train.labels, len(self.data.train.classes))
        self.end = self.walk(replace(presets()["heun"], steps=512)).x

    def walk(self, sampler: Sampler) -> State:
        return last(walk(self.denoiser, sampler, Source(1, torch.arange(SAMPLES)), self.labels))

    @torch.inference_mode()
    def figures(self, sampler: Sampler) -> tuple[float, float]:
        """(percent accepted, distance from the end of the flow)."""
        x = self.walk(sampler).x
        accepted = 100 * share(judged(self.judge, to_float(to_uint8(x)))[1])
        return accepted, float((x - self.end).square().mean().sqrt())


def adds_noise(sampler: Sampler, schedule: Schedule) -> bool:
    drawn = 0

    def noise(step: int, which: int = 0) -> Tensor:
        nonlocal drawn
        drawn += 1
        return torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    x = sampler.start(schedule, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    last(sampler.walk(mixture(schedule), schedule, x, noise))
    return drawn > 0


# -- the page ----------------------------------------------------------------------------------------------------------


def measure(run: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    digits = Digits(run)
    rows = []
    x = torch.randn(8, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, sampler in presets().items():
        if names and name not in names:
            continue
        began = time.perf_counter()
        row: dict[str, Any] = {
            "sampler": name,
            "noise": adds_noise(sampler, Flow()),
            "calls": calls_a_step(sampler),
            "cells": [],
        }
        for budget in BUDGETS:
            cell: dict[str, Any] = {"budget": budget}
            for schedule_name, schedule in SCHEDULES.items():
                start = sampler.start(schedule, x)
                fitting = within(sampler, budget, schedule, mixture(schedule), start)
                cell[schedule_name] = mixture_error(fitting[0], schedule) if fitting else None
            schedule = digits.denoiser.schedule
            fitting = within(sampler, budget, schedule, mixture(schedule), sampler.start(schedule, x))
            if fitting:
                cell["accepted"], cell["distance"] = digits.figures(fitting[0])
            row["cells"].append(cell)
        rows.append(row)
        print(f"{name}: {time.perf_counter() - began:.0f} s", json.dumps(row), file=sys.stderr, flush=True)
    return rows


def shown(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown tables: the mixture on three schedules, then digits."""
    budgets = " | ".join(map(str, BUDGETS))
    rule = "|---" * (len(BUDGETS) + 1) + "|"
    lines = []
    for schedule in SCHEDULES:
        lines += [f"### Mixture, schedule `{schedule}`: error in thousandths, by calls of the network", ""]
        lines += [f"| sampler | {budgets} |", rule]
        for row in rows:
            cells = " | ".join(shown(cell[schedule]) for cell in row["cells"])
            lines.append(f"| `{row['sampler']}`{' *' if row['noise'] else ''} | {cells} |")
        lines.append("")
    lines += ["### Digits: percent accepted (distance from the end of the flow), by calls of the network", ""]
    lines += [f"| sampler | {budgets} |", rule]
    for row in rows:
        cells = []
        for cell in row["cells"]:
            distance = "" if row["noise"] or "distance" not in cell else f" ({cell['distance']:.3f})"
            cells.append(shown(cell.get("accepted"), 0) + distance)
        lines.append(f"| `{row['sampler']}`{' *' if row['noise'] else ''} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "\\* adds noise on its way.", ""])


def plot(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """Three panels, one below the other: a question a step, several, and noise on the way."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        kind = "with noise" if row["noise"] else "several calls a move" if row["calls"] > 1 else "one call a step"
        cells = [(cell["budget"], cell["flow"]) for cell in row["cells"] if cell["flow"]]
        panels.setdefault(kind, {})[row["sampler"]] = cells
    drawn = [
        drawing.curves(lines, f"error on the mixture, schedule flow: {kind}", "calls of the network", log_x=True)
        for kind, lines in sorted(panels.items())
    ]
    sheet = Image.new("RGB", (max(one.width for one in drawn), sum(one.height for one in drawn)), "white")
    for k, one in enumerate(drawn):
        sheet.paste(one, (0, sum(other.height for other in drawn[:k])))
    return sheet


BEGIN, END = "<!-- table: made by scripts/sampler_table.py -->", "<!-- end of the table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the default run of diffusion-train (outputs/digits)")
    parser.add_argument("--only", nargs="*", default=(), metavar="NAME", help="these samplers alone")
    parser.add_argument("--out", type=Path, metavar="PAGE.md", help="write the tables between the two marks of this page")
    parser.add_argument("--plot", type=Path, metavar="PLOT.png", help="draw the mixture's errors")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="write the figures there as well")
    options = parser.parse_args()
    try:
        rows = measure(options.run, options.only)
    except UserError as error:
        sys.exit(f"sampler_table: {error}")
    print(page(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.out is not None:
        before, _, rest = options.out.read_text().partition(BEGIN)
        options.out.write_text(f"{before}{BEGIN}\n\n{page(rows)}\n{END}{rest.partition(END)[2]}")
    if options.plot is not None:
        options.plot.write_bytes(drawing.png(plot(rows)))


if __name__ == "__main__":
    main()
