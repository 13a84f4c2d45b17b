#!/usr/bin/env python3
"""What a recipe costs on cards that are not here: python scripts/scaling.py [--share 0.4] [--peak 790] [--out docs/scaling.md]

    compute       3 F B / (u P)                  F: FLOPs of a question about one picture, counted; B: pictures on a card in a
                                                 step; u: the share of the matrix peak P that is reached; the backward pass
                                                 takes twice the forward one
    communication 2 (W - 1) / W  4 N / bandwidth N: weights, whose gradients (float32) W cards exchange in a ring
    step          compute + max(0, communication - 2/3 compute)     the exchange runs beside the backward pass
    memory        20 N + a B  with DDP           weights, gradient, Adam's two moments and the average, float32; a: bytes of
                  20 N / W + a B  with FSDP      activations that are kept for the backward pass of a picture

Nothing here is measured but F and N. --check compares the formula of a step with two processes of this machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from diffusion_cli.models import EDM2, DDPMpp, DiT, Network, UNet
from diffusion_cli.profiling import flops

NVLINK, NETWORK = 350e9, 40e9  # bytes a second and card, within a machine and between machines: estimates
BEGIN, END = "<!-- model: made by scripts/scaling.py -->", "<!-- end of model -->"


@dataclass(frozen=True)
class Recipe:
    """images: that the paper trained on, in millions; batch: of all cards together."""

    name: str
    source: str
    make: Callable[[], Network]
    images: float
    batch: int


RECIPES = (
    Recipe("CIFAR-10, DDPM's U-Net", "Ho et al. 2020", lambda: UNet(3, 32, 0), 102.4, 128),
    Recipe("CIFAR-10, EDM's DDPM++", "Karras et al. 2022", lambda: DDPMpp(3, 32, 10), 200, 512),
    Recipe("ImageNet 64, ADM trained as EDM", "Karras et al. 2022", lambda: adm(64), 2500, 4096),
    Recipe("ImageNet 64, EDM2-S", "Karras et al. 2024", lambda: EDM2(3, 64, 1000, width=192), 1073.7, 2048),
    Recipe("ImageNet 256 in latents, DiT-XL/2", "Peebles and Xie 2023, 7M steps", lambda: dit(32, 1152, 28, 16), 1792, 256),
    Recipe("ImageNet 512 in latents, DiT-XL/2", "Peebles and Xie 2023, 3M steps", lambda: dit(64, 1152, 28, 16), 768, 256),
)


def adm(size: int) -> Network:
    """configs/model/adm.yaml"""
    return UNet(
        3, size, 1000, width=192, multipliers=(1, 2, 3, 4), blocks=3, attention_levels=(1, 2, 3), head_width=64,
        time="scale_shift", resize="block",
    )  # fmt: skip


def dit(size: int, width: int, depth: int, heads: int) -> Network:
    return DiT(4, size, 1000, patch_size=2, width=width, depth=depth, heads=heads)


def on_meta(make: Callable[[], Network]) -> tuple[int, int]:
    """(weights, FLOPs of a question about a picture) of a network that takes no memory."""
    with torch.device("meta"):
        network = make().eval()
    return sum(parameter.numel() for parameter in network.parameters()), flops(network)


def step(compute: float, weights: int, cards: int, bandwidth: float) -> float:
    """Seconds of a step."""
    exchange = 2 * (cards - 1) / cards * 4 * weights / bandwidth
    return compute + max(0.0, exchange - 2 / 3 * compute)


def costs(share: float, peak: float) -> str:
    lines = [
        "| recipe | weights | GFLOPs a picture | pictures, millions | one card, hours | 8 cards | 64 cards (8 machines) |",
        "|---" * 7 + "|",
    ]
    for recipe in RECIPES:
        weights, work = on_meta(recipe.make)
        cells = []
        for cards, bandwidth in ((1, NVLINK), (8, NVLINK), (64, NETWORK)):
            own = recipe.batch / cards
            seconds = step(3 * work * own / (share * peak), weights, cards, bandwidth)
            hours = recipe.images * 1e6 / recipe.batch * seconds / 3600
            ideal = recipe.images * 1e6 * 3 * work / (share * peak) / cards / 3600
            cells.append(f"{hours:,.2g}" if cards == 1 else f"{hours:,.2g} ({ideal / hours:.0%})")
        lines.append(
            f"| {recipe.name} ({recipe.source}) | {weights / 1e6:,.1f}M | {work / 1e9:,.1f} | {recipe.images:,.0f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def memory() -> str:
    """Of a DiT of a billion weights, ImageNet 512 in latents."""
    weights, _ = on_meta(lambda: dit(64, 1408, 28, 16))
    lines = [
        f"A DiT of {weights / 1e9:.2f} billion weights (width 1408, depth 28), GB a card without activations:\n",
        "| | 1 card | 8 cards | 64 cards |",
        "|---|---|---|---|",
        "| DDP | " + " | ".join([f"{20 * weights / 1e9:.1f}"] * 3) + " |",
        "| FSDP | " + " | ".join(f"{20 * weights / cards / 1e9:.1f}" for cards in (1, 8, 64)) + " |",
    ]
    return "\n".join(lines)


# -- the check: two processes of this machine --------------------------------------------------------------------------


def one_of_two(rank: int, port: str, rounds: int = 9) -> None:
    """One process: the time of a step alone, of the exchange alone, and of a step of DDP; medians."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = UNet(3, 32, 0, width=64)
    shared = nn.parallel.DistributedDataParallel(network)
    weights = sum(parameter.numel() for parameter in network.parameters())
    x, t, flat = torch.randn(4, 3, 32, 32), torch.rand(4), torch.zeros(weights)

    def timed(work: Callable[[], object]) -> float:
        torch.distributed.barrier()
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def trained(model: nn.Module) -> None:
        model(x, t).square().mean().backward()

    works = {
        "alone": lambda: trained(network),
        "exchange": lambda: torch.distributed.all_reduce(flat),
        "together": lambda: trained(shared),
    }
    found = {name: sorted(timed(work) for _ in range(rounds))[rounds // 2] for name, work in works.items()}
    if rank == 0:
        print(json.dumps(found | {"weights": weights}))
    torch.distributed.destroy_process_group()


def check() -> str:
    command = [sys.executable, __file__, "--rank"]
    port = str(20000 + os.getpid() % 20000)
    ranks = [subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [process.communicate()[0] for process in ranks]
    found = json.loads(said[0])
    alone, exchange, together = found["alone"], found["exchange"], found["together"]
    return (
        f"Two processes of one thread each, gloo, a U-Net of {found['weights'] / 1e6:.1f}M weights, 4 pictures each: a step "
        f"alone {alone:.3f} s, the exchange alone {exchange:.3f} s, a step of DDP {together:.3f} s. The formula says "
        f"{alone + max(0.0, exchange - 2 / 3 * alone):.3f} s where the exchange costs the cores nothing; "
        f"{alone + exchange:.3f} s would be one after the other."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.4, help="u, of the matrix peak (default 0.4: an aim, not measured)")
    parser.add_argument("--peak", type=float, default=790, help="P, TFLOP/s (default 790: dense bf16 of an H200)")
    parser.add_argument("--check", action="store_true", help="measure two processes here")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="PAGE.md", help="write the tables between the two marks of this page")
    options = parser.parse_args()
    if options.rank:
        return one_of_two(int(options.rank[0]), options.rank[1])
    text = costs(options.share, options.peak * 1e12) + "\n\n" + memory() + ("\n\n" + check() if options.check else "")
    print(text)
    if options.out is not None:
        before, _, rest = options.out.read_text().partition(BEGIN)
        options.out.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
