#!/usr/bin/env python3
"""How long diffusion-report takes for many runs, and how large its page is: runs are made up, read and written, and forgotten.

    python scripts/bench_report.py 200

Each has what a real run has: a config of 80 settings, 1,000 reports of 15 figures with one spike, and 10 previews of
544 x 544 pixels in colour, the first of noise and the last smooth.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_cli.report.making import make
from diffusion_cli.settings import Report

SPIKE = 77.0  # of one run's loss


def make_run(folder: Path, seed: int, reports: int = 1000, previews: int = 10) -> None:
    """A run's folder as diffusion-train leaves it."""
    draws = np.random.default_rng(seed)
    (folder / "samples").mkdir(parents=True)
    loss = 0.1 + np.exp(-np.linspace(0, 5, reports)) + 0.02 * draws.standard_normal(reports)
    loss[reports // 3] = SPIKE
    rows = [
        {"step": 100 * (i + 1), "train/loss": float(loss[i]), "train/gradient_norm": float(2 * loss[i])}
        | {f"loss_by_noise/t_{k / 10}_to_{(k + 1) / 10}": float(loss[i] * (1 + k / 5)) for k in range(10)}
        | {"train/learning_rate": 1e-4, "speed/images_per_second": float(draws.uniform(900, 1100))}
        for i in range(reports)
    ]  # fmt: skip
    rows += [{"step": 100 * (i + 1), "evaluate/x0_mse": float(0.1 + loss[i] / 5)} for i in range(0, reports, 50)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {"train/loss": float(loss[-1]), "evaluate/x0_mse": float(draws.uniform(0.1, 0.3))}
    status = {"state": "finished", "step": 100 * reports, "total": 100 * reports, "figures": figures}
    (folder / "status.json").write_text(json.dumps(status))
    settings = "".join(f"  setting_{k}: {k}\n" for k in range(80))
    choice = ("Flow", "Betas", "Edm")[seed % 3]
    (folder / "config.yaml").write_text(
        f"name: run\nseed: {seed}\noptimizer:\n  lr: {10 ** draws.uniform(-5, -2):.3g}\n  warmup: {100 * (seed % 4)}\n"
        f"schedule:\n  _target_: diffusion_cli.schedules.{choice}\nmodel:\n{settings}"
    )
    noise = draws.uniform(0, 255, (8 * 34, 8 * 34, 3))
    smooth = np.asarray(Image.fromarray(noise.astype(np.uint8)).resize((34, 34)).resize((272, 272), Image.Resampling.BICUBIC))
    for i in range(previews):
        share = i / max(1, previews - 1)
        image = Image.fromarray((share * smooth + (1 - share) * noise).astype(np.uint8)).resize(
            (544, 544), Image.Resampling.NEAREST
        )
        image.save(folder / "samples" / f"samples_{100 * (i + 1) * reports // previews:08d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=200)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(runs):
            make_run(Path(folder) / f"run_{seed:03d}", seed)
        began, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            page = make(Report((folder,), None))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        print(f"{runs} runs: {page.stat().st_size / 1e6:.1f} MB in {seconds:.1f} s ({cpu:.1f} s of one core)")


if __name__ == "__main__":
    main()
