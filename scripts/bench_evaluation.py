#!/usr/bin/env python3
"""What an evaluation costs: python scripts/bench_evaluation.py outputs/digits --features outputs/classifier_digits [--n 10000]

1. diffusion-evaluate of n samples of a run, in a process of its own: samples a second, and the most memory it held, beside the
   same with 64 samples (what the program itself needs).
2. The statistics alone, of clouds of n vectors in as many dimensions as a classifier here (64) and Inception (2048) have: ours,
   and torch-fidelity's functions as its own command line calls them (features in float32, all distances at once).
3. Inception's features of some pictures with random weights: ours, and torch-fidelity's network alone.

Prints Markdown tables. The two sides of 2 and 3 alternate, and the figures are minimum and median; the machine may be shared.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.evaluation.distances import MEASURES, Cloud
from diffusion_cli.features.features import colour
from diffusion_cli.vision import mend_torchvision

METRICS = "[fid,kid,precision,recall,density,coverage]"


def command(run: Path, judge: Path, n: int, batch: int) -> tuple[float, float, float]:
    """Seconds, samples a second while they are made, and the most megabytes held."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        program = Path(sys.executable).with_name("diffusion-evaluate")
        words = [f"ckpt={run}", f"n={n}", f"batch={batch}", f"metrics={METRICS}", f"out={out}", "device=cpu"]
        words += ["features=classifier", f"features.ckpt={judge}"]
        code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.PIPE); "
        code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, str(program), *words], capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - began
        made = json.loads(out.read_text())["made_by"]["seconds"]
    return seconds, n / made, int(done.stdout.split()[-1]) / 1024


def theirs(samples: Tensor, real: Tensor) -> dict[str, Callable[[], object]]:
    mend_torchvision()
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    return {
        "fid": lambda: fid_statistics_to_metric(fid_features_to_statistics(samples), fid_features_to_statistics(real), False),
        "kid": lambda: kid_features_to_metric(samples, real, verbose=False),
        "precision": lambda: prc_features_to_metric(samples, real, verbose=False),
    }


def ours(samples: Tensor, real: Tensor) -> dict[str, Callable[[], object]]:
    return {
        word: lambda word=word: MEASURES[word](Cloud(samples), Cloud(real)) for word in ("fid", "kid", "precision", "coverage")
    }


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(title: str, one: Mapping[str, Callable[[], object]], two: Mapping[str, Callable[[], object]], rounds: int) -> None:
    print(f"\n| {title} | ours min / median | torch-fidelity min / median |\n|---|---|---|")
    for name, work in one.items():
        sides: list[list[float]] = [[], []]
        for _ in range(rounds):
            sides[0].append(seconds(work))
            sides[1] += [seconds(two[name])] if name in two else []
        said = [f"{min(side):.2f} / {statistics.median(side):.2f}" if side else "" for side in sides]
        print(f"| {name} | {said[0]} | {said[1]} |", flush=True)


def inception(count: int, rounds: int) -> None:
    """Pictures of 32 x 32 through the network with random weights: it costs what the published one costs."""
    mend_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3 as library

    library.FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None  # there is no other way past its download
    library.load_state_dict_from_url = lambda url, progress: {}
    network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    look = torch.no_grad()(lambda: network(colour(images)))
    table(
        f"seconds, Inception of {count} pictures",
        {"features": look},
        {"features": torch.no_grad()(lambda: network(images))},
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run (outputs/<name>)")
    parser.add_argument("--features", type=Path, required=True, help="a run of objective=classifying on the same pictures")
    parser.add_argument("--n", type=int, default=10_000, help="samples, and vectors (default: 10000)")
    parser.add_argument("--batch", type=int, default=500, help="samples at a time (default: 500)")
    parser.add_argument("--rounds", type=int, default=3, help="of parts 2 and 3 (default: 3)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("\n| samples | seconds | samples a second | memory, MB |\n|---|---|---|---|")
    for n in (64, options.n):
        took, speed, memory = command(options.run, options.features, n, options.batch)
        print(f"| {n:,} | {took:.1f} | {speed:.1f} | {memory:.0f} |", flush=True)
    for D in (64, 2048):
        generator = torch.Generator().manual_seed(0)
        clouds = [torch.randn(options.n, D, generator=generator).relu() for _ in range(2)]
        table(f"seconds, {options.n:,} vectors of {D}", ours(*clouds), theirs(*clouds), options.rounds)
    inception(32, options.rounds)
    print(f"\nmost memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
