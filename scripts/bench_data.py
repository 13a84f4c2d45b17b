#!/usr/bin/env python3
"""The input pipeline alone: python scripts/bench_data.py DATA [--rate 5000] [--batch 128] [--rounds 5]

CIFAR-10 from parquet files in the folder DATA, batches of uint8 to float32 in [-1, 1], half of the pictures mirrored:

    memory      ours as it is for sets that fit: gathered, mirrored and scaled whole batches at a time
    streamed    ours with dataset.memory=0: decoded by worker processes
    diffusers   its example script's: a set of `datasets` with set_transform (PIL to tensor, flip, normalise), torch's
                DataLoader, its default of 0 workers

cpu      microseconds of CPU for a picture, worker processes included
idle     share of its time in which a network waits for its next batch that takes 1/rate of a second for a picture and no CPU,
         as on a GPU: the loop goes on while it works, up to two batches ahead. Batches of a warm-up are left out; least,
         median and most of the samples. Where other work disturbs it is an upper bound
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from torch import Tensor

WARM = 5  # batches: workers start, files come into the page cache


def ours(data: str, batch: int, memory: float, workers: int) -> Iterator[Tensor]:
    import hydra

    from diffusion_cli import config
    from diffusion_cli.build import build
    from diffusion_cli.data import Batches, Dataset
    from diffusion_cli.pace import Pace

    words = ["dataset=cifar10", f"dataset.path={data}", f"dataset.memory={memory}", f"dataset.workers={workers}"]
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        node = config.plain(hydra.compose("train", words))["dataset"]
    pictures = build(node, Dataset, "dataset").load("train")
    assert pictures is not None
    for each in Batches(pictures, Pace(batch), 0, flip=True).starting_at(0):
        yield each.x


def diffusers(data: str, batch: int) -> Iterator[Tensor]:
    from datasets import load_dataset
    from torch.utils.data import DataLoader
    from torchvision import transforms

    files = sorted(str(path) for path in Path(data).rglob("*train*.parquet"))
    pictures = load_dataset("parquet", data_files=files, split="train")
    column = next(name for name, kind in pictures.features.items() if type(kind).__name__ == "Image")
    change = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    pictures.set_transform(lambda rows: {"input": [change(image.convert("RGB")) for image in rows[column]]})
    while True:
        for each in DataLoader(pictures, batch_size=batch, shuffle=True):
            yield each["input"]


def cpu_seconds() -> float:
    """Of this process and of those that work for it now. (Children count in os.times() only once they have ended.)"""
    fields = [Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split() for child in active_children()]
    return time.process_time() + sum(int(words[11]) + int(words[12]) for words in fields) / os.sysconf("SC_CLK_TCK")


def measured(batches: Iterator[Tensor], count: int, seconds: float) -> tuple[float, float]:
    """(seconds of CPU, share of idle time) of so many batches, each of which keeps the network busy for so many seconds."""
    before, began, idle = cpu_seconds(), time.perf_counter(), 0.0
    free = began  # when the network will have worked off what it has
    for _ in range(count):
        next(batches)
        now = time.perf_counter()
        idle += max(0.0, now - free)
        free = max(now, free) + seconds
        time.sleep(max(0.0, free - now - 2 * seconds))
    return cpu_seconds() - before, idle / (free - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10: a folder with parquet files")
    parser.add_argument("--rate", type=float, default=5000, help="pictures a second of the network (5000)")
    parser.add_argument("--batch", type=int, default=128, help="pictures in a batch (128)")
    parser.add_argument("--count", type=int, default=40, help="batches in a sample (40)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each (5)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (2)")
    options = parser.parse_args()

    from diffusion_cli.vision import mend_torchvision

    mend_torchvision()
    sides: dict[str, Any] = {
        "memory": ours(options.data, options.batch, 2.0, options.workers),
        "streamed": ours(options.data, options.batch, 0.0, options.workers),
        "diffusers": diffusers(options.data, options.batch),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for batches in sides.values():
        measured(batches, WARM, 0)
    for _ in range(options.rounds):
        for name, batches in sides.items():
            found[name].append(measured(batches, options.count, options.batch / options.rate))
    pictures = options.count * options.batch
    for name, samples in found.items():
        cpu = statistics.median(own for own, _ in samples) / pictures * 1e6
        shares = sorted(idle for _, idle in samples)
        print(
            f"{name:10} {cpu:6.1f} us of CPU a picture, idle",
            " / ".join(f"{share:.1%}" for share in (shares[0], statistics.median(shares), shares[-1])),
        )


if __name__ == "__main__":
    main()
