#!/usr/bin/env python3
"""What a run waits for its checkpoints: python scripts/saving.py model=unet dataset=cifar10 trainer.batch=16

The words are those of diffusion-train. Four steps are trained with a checkpoint after each; medians of the last three, for
the first step is slow, and the first save has no old checkpoint to remove.

    share = seconds of a save / (seconds of training a picture x pictures between two saves)
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_cli import checkpoint, config
from diffusion_cli.trainer import Trainer

Clock = tuple[float, float]  # seconds on the wall, and of the CPU


def timed(name: str, into: list[Clock]) -> None:
    """Notes how long each call of that method of the trainer takes."""
    method: Callable[..., Any] = getattr(Trainer, name)

    def measured(*words: Any) -> Any:
        began = time.perf_counter(), time.process_time()
        found = method(*words)
        into.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        return found

    setattr(Trainer, name, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of diffusion-train")
    parser.add_argument("--pictures", type=int, default=300 * 128, help="between two saves (default: of configs/train.yaml)")
    options = parser.parse_args()
    saves, steps = list[Clock](), list[Clock]()
    timed("save", saves)
    timed("step", steps)
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:  # a disk, which /tmp need not be
        never = [f"trainer.{what}_every=0" for what in ("preview", "evaluate")]
        few = ["trainer.steps=4", "trainer.save_every=1", "trainer.preview=1", "sampler.steps=1", "trainer.evaluate=1"]
        words = [*options.words, *few, *never, f"outputs={folder}", "name=saving"]
        import hydra

        with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
            plan = config.planned(config.plain(hydra.compose("train", words)), words)
        from diffusion_cli.training import train

        train(plan)
        newest = checkpoint.folders(Path(folder) / "saving" / "checkpoints")[0]
        size = sum(path.stat().st_size for path in newest.iterdir())
    batch = plan.trainer.batch
    for number, clock in enumerate(("on the wall", "of the CPU")):
        save, step = (statistics.median(one[number] for one in times[1:]) for times in (saves, steps))
        share = save / (step / batch * options.pictures)
        print(f"{clock}: a checkpoint of {size / 1e6:,.0f} MB {save:.2f} s, a step of {batch} pictures {step:.2f} s", end=": ")
        print(f"{share:.2%} with a checkpoint after {options.pictures:,} pictures")


if __name__ == "__main__":
    main()
