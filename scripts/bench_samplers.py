#!/usr/bin/env python3
"""What samplers cost over the network's calls, ours and the peers': python scripts/bench_samplers.py [--out FILE.json]

One network (unet_small at 32 x 32 x 3, predicting eps on DDPM's table) answers all of them. For each sampler, at the same
number of steps:

    calls      of the network for a picture, counted
    images/s   of a whole walk, uint8 pictures at its end for ours
    overhead   share of a walk's time that is not the network's: seconds of the same walk with a network that answers 0 at once,
               over those of the walk. Seconds are CPU seconds of this process where --cpu is given: with OMP_NUM_THREADS=1 they
               hold on a busy machine

Peers are diffusers' scheduler of that name in its pipelines' loop, and k-diffusion's function where it is installed. All take
turns, the order rotated in every round; figures are medians, samples that other processes disturbed are dropped.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import hardware, say
from sampler_table import presets
from timing import ENOUGH, Contestant, Sample, kept, take_turns
from torch import Tensor, nn

from diffusion_cli.assembly import Facts, denoiser_of
from diffusion_cli.data.pixels import to_uint8
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.devices import Compute, choose
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import last
from diffusion_cli.vision import mend_torchvision
from diffusion_cli.walking import walk

_ENDS = {"final_sigmas_type": "sigma_min"}  # where diffusers' solvers for the noise end
# preset -> (diffusers' scheduler and its options, k-diffusion's function); the steps are ours, moves of the walk
PEERS: dict[str, tuple[tuple[str, dict[str, Any]] | None, str | None, int]] = {
    "ddpm": (("DDPMScheduler", {}), None, 12),
    "ddim": (("DDIMScheduler", {}), None, 12),
    "euler": (("EulerDiscreteScheduler", {}), "sample_euler", 12),
    "euler_ancestral": (("EulerAncestralDiscreteScheduler", {}), "sample_euler_ancestral", 12),
    "heun": (("HeunDiscreteScheduler", {}), "sample_heun", 6),
    "dpm_2": (("KDPM2DiscreteScheduler", {}), "sample_dpm_2", 6),
    "dpm_2_ancestral": (("KDPM2AncestralDiscreteScheduler", {}), "sample_dpm_2_ancestral", 6),
    "lms": (("LMSDiscreteScheduler", {}), "sample_lms", 12),
    "pndm": (("PNDMScheduler", {}), None, 12),
    "ipndm": (("IPNDMScheduler", {}), None, 12),
    "deis": (("DEISMultistepScheduler", {}), None, 12),
    "unipc": (("UniPCMultistepScheduler", {}), None, 12),
    "dpm_solver": (
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
        None,
        12,
    ),
    "dpmpp_2m": (("DPMSolverMultistepScheduler", {}), "sample_dpmpp_2m", 12),
    "dpmpp_3m": (("DPMSolverMultistepScheduler", {"solver_order": 3}), None, 12),
    "dpmpp_2m_sde": (("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}), "sample_dpmpp_2m_sde", 12),
    "dpmpp_3m_sde": (None, "sample_dpmpp_3m_sde", 12),
    "dpmpp_2s_ancestral": (None, "sample_dpmpp_2s_ancestral", 6),
    "dpmpp_sde": (None, "sample_dpmpp_sde", 6),
    "dpmpp_singlestep": (("DPMSolverSinglestepScheduler", {}), None, 12),
    "sa_solver": (("SASolverScheduler", {}), None, 12),
    "lcm": (("LCMScheduler", {}), None, 4),
}

OFTEN = 10  # walks with the silent network in a sample: a clock of CPU seconds ticks every 10 ms


class Silent(nn.Module):
    """Answers 0 and costs nothing: what a walk takes with it is the sampler's own."""

    hint_channels = num_classes = 0

    def __init__(self, channels: int, image_size: int):
        super().__init__()
        self.channels, self.image_size = channels, image_size

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


class Bench:
    """The network, and walks of each side that count its calls. silent: with a network that costs nothing."""

    def __init__(self, compute: Compute, batch: int, silent: bool):
        node = {
            "schedule": {"_target_": "diffusion_cli.schedules.Betas", "curve": "linear", "steps": 1000, "first": 1e-4,
                         "last": 0.02, "zero_terminal_snr": False},
            "prediction": {"_target_": "diffusion_cli.predictions.Eps"},
            "model": self._model(),
            "objective": {"self_conditioning": 0.0},
        }  # fmt: skip
        torch.manual_seed(0)
        facts = Facts(channels=3, image_size=32, classes=[], taught=[], fingerprint="")
        self.denoiser: Denoiser = denoiser_of(node, facts).to(compute.device).eval().requires_grad_(False)
        if compute.device.type == "cpu":
            self.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for parameter in self.denoiser.network.parameters():  # a fresh network answers 0: give it something to say
            torch.nn.init.normal_(parameter, std=0.02)
        if silent:
            self.denoiser.network = Silent(3, 32)  # type: ignore[assignment]
        self.compute, self.batch, self.calls = compute, batch, 0
        self.denoiser.network.register_forward_hook(self._count)
        self.sigmas = torch.exp(-self.denoiser.schedule.knots / 2).float().to(compute.device)  # type: ignore[attr-defined]

    @staticmethod
    def _model() -> dict[str, Any]:
        import hydra

        from diffusion_cli import config

        with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
            return dict(config.plain(hydra.compose("train", ["model=unet_small"]))["model"])

    def _count(self, *_: object) -> None:
        self.calls += 1

    def ours(self, name: str, steps: int) -> Callable[[], None]:
        sampler = replace(presets()[name], steps=steps)
        source = Source(0, torch.arange(self.batch, device=self.compute.device))

        def pictures() -> None:
            with torch.inference_mode(), self.compute.precision():
                to_uint8(last(walk(self.denoiser, sampler, source)).x).cpu()

        return pictures

    def diffusers(self, name: str, options: dict[str, Any], steps: int) -> Callable[[], None]:
        import diffusers

        def pictures() -> None:
            scheduler = getattr(diffusers, name)(**options)
            with torch.inference_mode(), self.compute.precision():
                scheduler.set_timesteps(steps, device=self.compute.device)
                x = torch.randn(self.batch, 3, 32, 32, device=self.compute.device) * scheduler.init_noise_sigma
                for t in scheduler.timesteps:
                    told = scheduler.scale_model_input(x, t)
                    eps = self.denoiser.network(told.float(), t.float().expand(self.batch).to(x.device))
                    x = scheduler.step(eps, t, x).prev_sample
                to_uint8(x).cpu()

        return pictures

    def k_diffusion(self, name: str, steps: int) -> Callable[[], None]:
        from k_diffusion import sampling

        sigmas = torch.cat([self.sigmas.flip(0)[torch.linspace(0, 999, steps).round().long()], self.sigmas.new_zeros(1)])

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            k = torch.searchsorted(self.sigmas, sigma).clamp(1, 999)
            low, high = self.sigmas[k - 1].log(), self.sigmas[k].log()
            time = k - 1 + ((sigma.log() - low) / (high - low)).clamp(0, 1)
            wide = sigma[:, None, None, None]
            return x - wide * self.denoiser.network(x / torch.sqrt(wide**2 + 1), time)

        def pictures() -> None:
            with torch.inference_mode(), self.compute.precision():
                x = torch.randn(self.batch, 3, 32, 32, device=self.compute.device) * sigmas[0]
                noise = {"noise_sampler": lambda *_: torch.randn_like(x)} if "sde" in name or "ancestral" in name else {}
                x = getattr(sampling, name)(model, x, sigmas, disable=True, **noise)
                to_uint8(x).cpu()

        return pictures


def seconds_of(samples: Sequence[Sample], cpu: bool) -> float:
    return statistics.median(s.own if cpu and s.own is not None else s.seconds for s in kept(samples))


def sides_of(bench: Bench, name: str, with_k: bool) -> dict[str, Callable[[], None]]:
    scheduler, function, steps = PEERS[name]
    sides = {"ours": bench.ours(name, steps)}
    if scheduler is not None:
        sides["diffusers"] = bench.diffusers(*scheduler, steps)
    if function is not None and with_k:
        sides["k-diffusion"] = bench.k_diffusion(function, steps)
    return sides


def contest(bench: Bench, silent: Bench, name: str, rounds: int, cpu: bool, with_k: bool) -> list[dict[str, Any]]:
    """A row for each side of one sampler."""
    steps, sides, alone, calls = PEERS[name][2], sides_of(bench, name, with_k), sides_of(silent, name, with_k), {}
    for side, walk_of in list(sides.items()):
        bench.calls = 0
        try:
            walk_of()
        except Exception as error:  # a peer that its own dependencies break is left out, and named
            if side == "ours":
                raise
            say(f"{name}: {side} fails: {' '.join(str(error).split())[:100]}")
            del sides[side]
            continue
        calls[side] = bench.calls
    often = lambda walk_of: lambda: [walk_of() for _ in range(OFTEN)] and None  # noqa: E731
    samples = take_turns([Contestant(side, walk_of) for side, walk_of in sides.items()], rounds, 3 * rounds)
    own = take_turns([Contestant(side, often(alone[side])) for side in sides], rounds, 3 * rounds)
    rows = []
    for side in sides:
        took, bookkeeping = seconds_of(samples[side], cpu), seconds_of(own[side], cpu) / OFTEN
        rows.append({
            "sampler": name, "side": side, "steps": steps, "calls": calls[side], "images_per_s": bench.batch / took,
            "ms_per_call": 1e3 * took / calls[side], "own_ms_per_call": 1e3 * bookkeeping / calls[side],
            "overhead": bookkeeping / took, "samples": len(samples[side]), "disturbed": sum(not s.clean for s in samples[side]),
        })  # fmt: skip
    return rows


def page(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| sampler | side | steps | calls | images/s | ms a call | of it the sampler's | overhead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['sampler']}` | {row['side']} | {row['steps']} | {row['calls']} | {row['images_per_s']:.2f} "
            f"| {row['ms_per_call']:.1f} | {row['own_ms_per_call']:.2f} | {100 * row['overhead']:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), metavar="NAME", help="these samplers alone")
    parser.add_argument("--batch", type=int, default=8, help="pictures (default: 8)")
    parser.add_argument("--rounds", type=int, default=ENOUGH + 2, help="samples of each side (default: 5)")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds instead of seconds: use with OMP_NUM_THREADS=1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there as well")
    options = parser.parse_args()
    mend_torchvision()
    try:
        import k_diffusion.sampling  # noqa: F401

        with_k = True
    except ImportError as error:
        with_k = False
        say(f"k-diffusion is left out: {error}")
    compute = choose(options.device, "fp32", False, say)
    bench, silent = Bench(compute, options.batch, silent=False), Bench(compute, options.batch, silent=True)
    rows: list[dict[str, Any]] = []
    for name in options.only or PEERS:
        rows += contest(bench, silent, name, options.rounds, options.cpu, with_k)
        say(page(rows[-3:]).splitlines()[-1])
    found = {"date": time.strftime("%Y-%m-%d %H:%M %z"), "command": shlex.join(["python", *sys.argv]), "results": rows}
    found["hardware"] = hardware(compute)
    print("\n".join(f"{key}: {value}" for key, value in [*found["hardware"].items(), *list(found.items())[:2]]))
    print("", page(rows), sep="\n")
    mine = [row["overhead"] for row in rows if row["side"] == "ours"]
    print(f"\nours: overhead {100 * min(mine):.1f} to {100 * max(mine):.1f} %, median {100 * statistics.median(mine):.1f} %")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert all(math.isfinite(row["overhead"]) for row in rows)


if __name__ == "__main__":
    main()
