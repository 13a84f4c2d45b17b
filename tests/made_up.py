"""Runs made up for the tests of reports: folders as diffusion-train leaves them, in a few milliseconds each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

STEPS = (100, 200, 300)


def make_run(folder: Path, seed: int = 0, lr: float = 0.001, error: float = 0.1, schedule: str = "Flow", **status: Any) -> Path:
    """Pictures of a run are plain: their grey says seed and step, so that a test can tell which one is shown."""
    (folder / "samples").mkdir(parents=True)
    config = {
        "name": folder.name,
        "seed": 0,
        "trainer": {"preview": 4},
        "dataset": {"_target_": "diffusion_cli.data.Digits", "size": 8, "channels": 1},
        "schedule": {"_target_": f"diffusion_cli.schedules.{schedule}"},
        "optimizer": {"lr": lr},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = [
        {"step": step, "train/loss": 100 / step, "loss_by_noise/t_0.0_to_0.5": 0.1, "loss_by_noise/t_0.5_to_1.0": 0.2}
        for step in STEPS
    ]
    rows.append({"step": 300, "evaluate/x0_mse": error})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {
        "state": "finished",
        "step": 300,
        "total": 300,
        "figures": {"train/loss": 1 / 3, "evaluate/x0_mse": error},
        **status,
    }
    (folder / "status.json").write_text(json.dumps(said))
    for kind in ("samples", "steps"):
        for step in STEPS:
            Image.new("L", (40, 40), 40 * seed + step // 10).save(folder / "samples" / f"{kind}_{step:08d}.png")
    return folder


def make_generated(folder: Path) -> None:
    """What diffusion-sample and diffusion-evaluate add to a run."""
    place = folder / "generated" / "heun-18"
    place.mkdir(parents=True)
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(place / "grid.png")
    (place / "metadata.json").write_text(json.dumps({"seed": 7, "n": 4}))
    (folder / "evaluated").mkdir()
    figures = {
        "fid": {"value": 12.5, "error": None, "of": ""},
        "bits": {"value": 3.25, "error": 0.01, "of": "standard error over 8 pictures"},
    }
    (folder / "evaluated" / "step_300.json").write_text(json.dumps({"figures": figures, "made_by": {"n": 8, "split": "test"}}))
