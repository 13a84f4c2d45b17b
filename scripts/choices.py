#!/usr/bin/env python3
"""What each case of a sweep gains, over its seeds: python scripts/choices.py outputs/choices [--out docs/recipes.md]

    diffusion-train sweep=choices features.ckpt=outputs/classifier

The case `plain` is the measure: of every figure, the mean over the seeds, their spread (standard deviation), and by how many
percent a case is lower than plain with the same seed, which begins from the same weights, sees the same pictures and is sampled
from the same noise: the geometric mean over the seeds and its spread, in bold where a paired t-test of the logarithms gives
p < 0.05. The last column says how many network FLOPs the training of a case takes, beside that of plain.
"""

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import yaml
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import ttest_1samp

from diffusion_cli import checkpoint, drawing
from diffusion_cli.errors import UserError
from diffusion_cli.finding import load_denoiser
from diffusion_cli.profiling import flops
from diffusion_cli.status import status_of
from diffusion_cli.sweeps.table import record

PLAIN = "plain"
BEGIN, END = "<!-- {name}: made by scripts/choices.py -->", "<!-- end of {name} -->"
TITLES = {"x0_mse": "held-out error", "fd": "feature distance", "kid": "KID"}


@dataclass(frozen=True)
class Case:
    """figures: of each seed, by name; cost: network FLOPs of its training."""

    name: str
    figures: Mapping[str, Mapping[str, float]]
    cost: float

    def gain(self, plain: "Case", name: str) -> tuple[float, float, bool]:
        """(share by which it is lower than plain's of the same seed, the spread of that, whether p < 0.05)."""
        mine, theirs = self.figures[name], plain.figures[name]
        logs = [math.log(mine[seed] / theirs[seed]) for seed in mine if seed in theirs]
        if len(logs) < 2:
            return 1 - math.exp(mean(logs)) if logs else math.nan, math.nan, False
        return 1 - math.exp(mean(logs)), stdev(logs), float(ttest_1samp(logs, 0.0).pvalue) < 0.05


def cases_of(sweep: Path) -> list[Case]:
    """In the order of the sweep, those of which a run has ended. UserError where there is none, or no `plain`."""
    said = record(sweep)
    named: dict[str, dict[str, Path]] = {}
    for run in said.runs:
        if status_of(sweep / run).get("state") == "finished":
            words = (said.values or {})[run]
            named.setdefault(words.get("case", ""), {})[words.get("seed", "")] = sweep / run
    if PLAIN not in named:
        raise UserError(f"{sweep} has no finished run of case={PLAIN}, which the others are compared with")
    return [Case(name, figures_of(runs), cost_of(next(iter(runs.values())))) for name, runs in named.items()]


def figures_of(runs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Those of TITLES, of each seed."""
    found: dict[str, dict[str, float]] = {}
    for seed, run in runs.items():
        for name, value in status_of(run)["figures"].items():
            known = re.fullmatch(r"evaluate/(?:\w+_)?(x0_mse|fd|kid)(?:_\d+)?", name)
            if known:
                found.setdefault(known[1], {})[seed] = value
    return found


def cost_of(run: Path) -> float:
    """FLOPs of all its pictures: of each three times a question's (forward, and backward by inputs and by weights)."""
    found, node = checkpoint.load(checkpoint.folders(run / "checkpoints")[0]), yaml.safe_load((run / "config.yaml").read_text())
    question = flops(load_denoiser(found, "raw").network)
    return float((3 + node["objective"].get("self_conditioning", 0.0)) * question * found.state["images"])


def page(cases: Sequence[Case]) -> str:
    plain = next(case for case in cases if case.name == PLAIN)
    names = [name for name in TITLES if name in plain.figures]
    lines = [
        "| case | seeds | " + " | ".join(f"{TITLES[name]} | better by" for name in names) + " | FLOPs |",
        "|---" * (3 + 2 * len(names)) + "|",
    ]
    for case in cases:
        cells = [f"`{case.name}`", str(len(case.figures[names[0]]))]
        for name in names:
            values = case.figures[name].values()
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
            gain, around, sure = case.gain(plain, name)
            about = "" if math.isnan(around) else f" ± {100 * around:.1f}"
            better = "" if case is plain or math.isnan(gain) else f"{100 * gain:+.1f}{about} %"
            cells += [f"{mean(values):.4g}{spread}", f"**{better}**" if sure and better else better]
        lines.append("| " + " | ".join([*cells, f"{case.cost / plain.cost:.2f}"]) + " |")
    return "\n".join(lines)


def plot(cases: Sequence[Case]) -> Image.Image:
    """A row for each case, a panel for each figure: a dot for each seed, a bar at the mean, a line where plain is."""
    plain = next(case for case in cases if case.name == PLAIN)
    names = [name for name in TITLES if name in plain.figures]
    row, left, wide, top, font = 22, 150, 300, 34, ImageFont.load_default(13)
    sheet = Image.new("RGB", (left + (wide + 20) * len(names), top + row * len(cases) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for i, case in enumerate(cases):
        draw.text((8, top + row * i + 3), case.name, fill="black", font=font)
    for k, name in enumerate(names):
        values = [value for case in cases for value in case.figures[name].values()]
        low, high = min(values), min(max(values), 3 * mean(plain.figures[name].values()))
        x0 = left + k * (wide + 20)
        place = lambda value, x0=x0, low=low, high=high: x0 + 10 + (wide - 20) * (min(value, high) - low) / (high - low or 1)  # noqa: E731
        draw.text((x0 + 10, 8), f"{TITLES[name]}  ({low:.3g} to {high:.3g}, left is better)", fill="black", font=font)
        at = place(mean(plain.figures[name].values()))
        draw.line((at, top, at, top + row * len(cases)), fill=(205, 205, 205), width=2)
        for i, case in enumerate(cases):
            y = top + row * i + row / 2
            draw.line((x0, top + row * (i + 1), x0 + wide, top + row * (i + 1)), fill=(240, 240, 240))
            at = place(mean(case.figures[name].values()))
            draw.line((at, y - 8, at, y + 8), fill=(0, 90, 170), width=3)
            for value in case.figures[name].values():
                draw.ellipse((place(value) - 3, y - 3, place(value) + 3, y + 3), outline=(213, 94, 0), width=2)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the folder of a sweep with cases")
    parser.add_argument("--out", type=Path, metavar="PAGE.md", help="write the table between its two marks of this page")
    parser.add_argument("--plot", type=Path, metavar="PLOT.png", help="draw it")
    options = parser.parse_args()
    try:
        cases = cases_of(options.sweep)
    except UserError as error:
        sys.exit(f"choices: {error}")
    print(page(cases))
    begin, end = BEGIN.format(name=options.sweep.name), END.format(name=options.sweep.name)
    if options.out is not None:
        before, mark, rest = options.out.read_text().partition(begin)
        if not mark:
            sys.exit(f"choices: {options.out} has no line {begin}")
        options.out.write_text(f"{before}{begin}\n\n{page(cases)}\n{end}{rest.partition(end)[2]}")
    if options.plot is not None:
        options.plot.write_bytes(drawing.png(plot(cases)))


if __name__ == "__main__":
    main()
