#!/usr/bin/env python3
"""What a sweep adds to its jobs: python scripts/bench_sweep.py --rounds 5

The same tiny run of two steps four times by itself and four times as a sweep, one at a time, one thread each, in turns. What
the sweep takes longer, divided by its jobs, is the overhead per job; in seconds, and in seconds of CPU, which a busy machine
disturbs less. A job alone is `diffusion-train`: Python, Hydra, torch, the data, two steps, its pictures and a checkpoint.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import Contestant, Sample, take_turns

JOBS = 4
TINY = [
    "device=cpu", "dataset.limit=40", "trainer.steps=2", "trainer.batch=8", "trainer.preview=4", "sampler.steps=2",
    "model.width=8", "model.groups=4", "model.multipliers=[1]",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ["OMP_NUM_THREADS"] = "1"
    program = str(Path(sys.executable).parent / "diffusion-train")
    with tempfile.TemporaryDirectory() as folder:

        def call(*words: str) -> None:
            subprocess.run([program, *TINY, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)

        def alone() -> None:
            shutil.rmtree(Path(folder) / "outputs", ignore_errors=True)
            for seed in range(JOBS):
                call(f"seed={seed}", f"name=run{seed}")

        def swept() -> None:
            shutil.rmtree(Path(folder) / "outputs", ignore_errors=True)
            call("-m", f"seed={','.join(map(str, range(JOBS)))}", "hydra.launcher.jobs=1")

        def again() -> None:
            """All are finished: what is left of a sweep is itself."""
            call("-m", f"seed={','.join(map(str, range(JOBS)))}", "hydra.launcher.jobs=1")

        alone()  # warms the file cache
        samples = take_turns([Contestant("alone", alone), Contestant("sweep", swept)], rounds, rounds)
        swept()
        finished = take_turns([Contestant("finished", again)], rounds, rounds)["finished"]
    for unit, of in (("s", lambda sample: sample.seconds), ("s of CPU", lambda sample: sample.own)):
        a, b, c = (statistics.median(map(of, found)) / JOBS for found in (samples["alone"], samples["sweep"], finished))
        extra = statistics.median((of(y) - of(x)) / JOBS for x, y in zip(samples["alone"], samples["sweep"], strict=True))
        print(f"{unit}: a job alone {a:.2f}, in a sweep {b:.2f}, overhead by pairs {extra:+.2f}; finished before {c:.2f} a job")
    print(f"disturbed: {_disturbed(samples['alone'])} alone, {_disturbed(samples['sweep'])} in a sweep, of {rounds} each")


def _disturbed(samples: list[Sample]) -> int:
    return sum(not sample.clean for sample in samples)


if __name__ == "__main__":
    main()
