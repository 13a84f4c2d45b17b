#!/usr/bin/env python3
"""How long things take here, and the same work in diffusers: python scripts/bench.py [--quick] [--out FILE.json]

    start-up   seconds of `diffusion-train --help` and of a misspelt option, beside the imports of a diffusers script
    digits     seconds from `diffusion-train` to its first grid, its last grid and its end (left out by --quick)
    training   images/s of whole updates: forward, backward, clipping, AdamW, EMA; here with data and noise counted in
    sampling   images/s of 50 DDIM steps, measured in fewer (the cost is linear in them), with the same weights

Where ours has convolutions of its own (convolutions=winograd, on a CPU), both also beside ours with torch's.

diffusers is run as its unconditional example script runs it: UNet2DModel of the same shape, its DDPM noising, torch's
AdamW as it comes, EMAModel, and DDIMPipeline. Its data loader and accelerate are left out, in its favour.

Contestants take turns in one process, the order rotated in every round; figures are medians. `ratio` is how many times
faster this is by the medians, `paired` the median of the ratios round by round, which holds when the machine's speed
drifts, and `cpu` the same of the CPU seconds that this process and its children used: with OMP_NUM_THREADS=1 that holds on
a busy machine too (with more threads, waiting for each other counts as work; on a GPU it says nothing). A sample during
which other processes used more than 0.10 core is dropped, if enough clean ones are left.
"""

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import ENOUGH, Contestant, Sample, compare, figures, table, take_turns, timed, verdicts

DDIM_STEPS = 50
PEER_IMPORTS = "from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel; from diffusers.training_utils import EMAModel"
MENDED = "from diffusion_cli.vision import mend_torchvision; mend_torchvision(); "  # else diffusers may fail to import


# -- start-up and the first run ----------------------------------------------------------------------------------------


def command(name: str) -> str:
    """The installed command beside this Python, else the one that the shell would find."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"{name} is not installed: run this by scripts/run.py python scripts/bench.py")
    return found


def start_up(least: int, most: int) -> list[dict[str, Any]]:
    def process(name: str, *words: str) -> Contestant:
        return Contestant(name, lambda: subprocess.run(words, capture_output=True, check=False))

    train = command("diffusion-train")
    page, mistake = process("--help", train, "--help"), process("mistake", train, "schedule=cosin")
    torch = process("import torch", sys.executable, "-c", "import torch")
    peer = process("imports of a diffusers script", sys.executable, "-c", MENDED + PEER_IMPORTS)
    everyone = [page, mistake, torch, peer]
    for contestant in everyone:  # files into the page cache
        contestant.call()
    samples = take_turns(everyone, least, most)
    return [
        compare("diffusion-train --help", "s", page, peer, samples),
        compare("diffusion-train schedule=cosin (a mistake)", "s", mistake, peer, samples),
        compare("diffusion-train --help", "s", page, torch, samples),
    ]


def first_run() -> list[dict[str, Any]]:
    """Seconds from the start of the default run to its first grid, to its last one, and to its end; once."""
    with tempfile.TemporaryDirectory() as folder:
        grids: dict[str, float] = {}

        def run() -> None:
            began = time.perf_counter()
            words = [command("diffusion-train"), f"outputs={folder}", "name=bench"]
            with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
                while process.poll() is None:
                    for path in Path(folder, "bench", "samples").glob("samples_*.png"):
                        grids.setdefault(path.name, time.perf_counter() - began)
                    time.sleep(0.05)
                if process.returncode:
                    sys.exit(f"diffusion-train failed: {process.stderr.read() if process.stderr else ''}")

        whole = timed(run)
    moments = {"its first grid": min(grids.values()), "its last grid": max(grids.values()), "its end": whole.seconds}
    return [
        {"what": f"diffusion-train, digits, to {name}", "unit": "s", "ours": figures([Sample(seconds, whole.foreign)], 1, "s")}
        for name, seconds in moments.items()
    ]


# -- training and sampling ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A network at 32 x 32 x 3. train, sample: pictures in a batch; steps: of DDIM that are really made."""

    model: str
    train: int
    sample: int
    steps: int


WORKLOADS = {
    "cpu": (Workload("unet_small", 32, 16, 10), Workload("unet", 16, 16, 5)),
    "cuda": (Workload("unet_small", 512, 512, 50), Workload("unet", 128, 128, 50)),
}


def plan_of(work: Workload) -> Any:
    """The checked config of a training run with DDPM's choices: the table of betas, the noise as target, AdamW, EMA."""
    import hydra

    from diffusion_cli import config

    words = [f"model={work.model}", f"trainer.batch={work.train}", "dataset=cifar10", "schedule=ddpm", "prediction=eps"]
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        composed = hydra.compose("train", [*words, "loss=ddpm", "optimizer=adamw", "ema=decay", "sampler=ddim"])
    return config.check_train(config.plain(composed))


def peers_network(node: Mapping[str, Any]) -> Any:
    """diffusers' UNet2DModel of the shape that a model's node describes, for 32 x 32 x 3, without classes."""
    from diffusers import UNet2DModel

    attend = [level in node["attention_levels"] for level in range(len(node["multipliers"]))]
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(node["width"] * m for m in node["multipliers"]),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attend),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)),
        layers_per_block=node["blocks"],
        attention_head_dim=node["head_width"],
        dropout=node["dropout"],
        norm_num_groups=node["groups"],
        norm_eps=node["norm_eps"],
        flip_sin_to_cos=node["time_order"] == "cos_sin",
        freq_shift=node["time_shift"],
        downsample_padding={"end": 0, "both": 1}[node["downsample_padding"]],
    )


class Pair:
    """Our objective and diffusers' network of the same shape, with the same weights; plain: ours with torch's convolutions."""

    def __init__(self, work: Workload, compute: Any, compile_peer: bool):
        import torch

        from diffusion_cli.assembly import Facts, objective_of
        from diffusion_cli.models.diffusers_names import renamed

        torch.manual_seed(0)
        self.work, self.compute, self.plan = work, compute, plan_of(work)
        self.theirs = peers_network(self.plan.node["model"]).to(compute.device)
        facts = Facts(channels=3, image_size=32, classes=[], taught=[], fingerprint="")
        self.objective, self.plain = (objective_of(self.plan.node, facts).to(compute.device) for _ in range(2))
        self.network = self.objective.network
        for objective in (self.objective, self.plain):
            objective.network.load_state_dict({renamed(key): value for key, value in self.theirs.state_dict().items()})
        self.weights = sum(p.numel() for p in self.network.parameters())
        compute.prepare(self.network)
        self.difference = self._difference()
        if compile_peer:
            self.theirs.compile()

    def _difference(self) -> float:
        """Largest difference of the two networks' answers, relative to the largest answer: proof that they are the same."""
        import torch

        x, time = torch.randn(2, 3, 32, 32, device=self.compute.device), torch.tensor([3.0, 700.0], device=self.compute.device)
        self.network.eval(), self.theirs.eval()
        with torch.no_grad():
            ours, theirs = self.network(x, time), self.theirs(x, time).sample
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def our_training(self, objective: Any) -> Callable[[], object]:
        import torch

        from diffusion_cli.build import build
        from diffusion_cli.capture import recorder
        from diffusion_cli.data import Batches, Pictures
        from diffusion_cli.ema import EMA
        from diffusion_cli.optimizers import Optimizer
        from diffusion_cli.pace import Pace
        from diffusion_cli.trainer import Trainer

        node, images = self.plan.node, torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
        batches = Batches(Pictures(images), Pace(self.work.train), 0, flip=True, device=self.compute.device)
        recipe, average = build(node["optimizer"], Optimizer, "optimizer"), build(node["ema"], EMA, "ema")
        # no folder of a run and no config to save: only its step is called
        parts = (objective, batches, None, recipe, average, None, self.plan.trainer, self.compute, 0, {})
        trainer = Trainer(*parts, record=recorder("auto", self.compute, alone=True))  # type: ignore[arg-type]
        endless = batches.starting_at(0)
        return lambda: trainer.step(next(endless))

    def peers_training(self) -> Callable[[], object]:
        import torch
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        network, device = self.theirs.train(), self.compute.device
        scheduler = DDPMScheduler()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        average = EMAModel(
            network.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            power=0.75,
            model_cls=UNet2DModel,
            model_config=network.config,
        )
        average.to(device)
        clean = torch.rand(self.work.train, 3, 32, 32, device=device) * 2 - 1

        def step() -> None:
            network.train()
            noise = torch.randn_like(clean)
            times = torch.randint(0, 1000, (len(clean),), device=device)
            noisy = scheduler.add_noise(clean, noise, times)
            with self.compute.precision():
                output = network(noisy, times).sample
            loss = torch.nn.functional.mse_loss(output.float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(network.parameters())
            loss.item()  # for its log, at every step

        return step

    def our_sampling(self, objective: Any) -> Callable[[], object]:
        """What diffusion-sample does with a batch, as far as the uint8 pictures."""
        from dataclasses import replace

        import torch

        from diffusion_cli.data.pixels import to_uint8
        from diffusion_cli.randomness import Source
        from diffusion_cli.samplers import last
        from diffusion_cli.walking import walk

        sampler, denoiser = replace(objective.sampler, steps=self.work.steps), objective.denoiser.eval()
        if self.compute.device.type == "cpu":
            denoiser.to(memory_format=torch.channels_last)
        source = Source(0, torch.arange(self.work.sample, device=self.compute.device))

        def pictures() -> None:
            with torch.inference_mode(), self.compute.precision():
                to_uint8(last(walk(denoiser, sampler, source)).x).cpu()

        return pictures

    def peers_sampling(self) -> Callable[[], object]:
        from diffusers import DDIMPipeline, DDIMScheduler

        pipeline = DDIMPipeline(unet=self.theirs.eval(), scheduler=DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)

        def pictures() -> None:
            with self.compute.precision():
                pipeline(batch_size=self.work.sample, num_inference_steps=self.work.steps, output_type="np")

        return pictures


def repeated(name: str, call: Callable[[], object], images: float, seconds: float, wait: Callable[[], object]) -> Contestant:
    """The call, warmed up, and then so often in a row that a sample takes about so many seconds; wait: for the device."""
    for _ in range(2):  # the second says how long it takes: the first allocates, and compiles where that is asked for
        began = time.perf_counter()
        call()
        wait()
        once = time.perf_counter() - began
    times = max(1, math.ceil(seconds / once - 0.5))

    def several() -> None:
        for _ in range(times):
            call()
        wait()

    return Contestant(name, several, images * times)


def contest(work: Workload, options: argparse.Namespace, compute: Any) -> list[dict[str, Any]]:
    import torch

    def wait() -> None:
        if compute.device.type == "cuda":
            torch.cuda.synchronize(compute.device)

    rows = []
    for kind, batch in (("training", work.train), ("sampling", work.sample)):
        pair = Pair(work, compute, options.compile_peer)
        part = batch * work.steps / DDIM_STEPS if kind == "sampling" else batch
        ours, peers = (
            (pair.our_training, pair.peers_training) if kind == "training" else (pair.our_sampling, pair.peers_sampling)
        )
        calls = {"ours": ours(pair.objective), "diffusers, compiled" if options.compile_peer else "diffusers": peers()}
        if compute.winograd:
            calls["ours, torch's convolutions"] = ours(pair.plain)
        what = f"{kind}, {work.model} ({pair.weights / 1e6:.1f}M), batch {batch}" + (", DDIM 50" if kind == "sampling" else "")
        say(f"{what}: largest relative difference of the two networks' answers {pair.difference:.1e}")
        first, *others = everyone = [repeated(name, call, part, options.seconds, wait) for name, call in calls.items()]
        samples = take_turns(everyone, options.rounds, 3 * options.rounds)
        rows += [compare(what, "images/s", first, other, samples) for other in others]
    return rows


# -- the whole ---------------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def hardware(compute: Any) -> dict[str, Any]:
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model, "cores": cores, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "computed_on": str(compute),
    }  # fmt: skip


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples, no default run: about two minutes")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="start-up, digits, or a model: leave out the rest")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of both sides (default: auto)"
    )
    parser.add_argument("--compile", default="auto", choices=("auto", "true", "false"), help="our network (auto: on a GPU)")
    parser.add_argument(
        "--convolutions", default="auto", choices=("auto", "torch", "winograd"), help="of our network (auto: winograd on a CPU)"
    )
    parser.add_argument("--compile-peer", action="store_true", help="compile diffusers' network too, which its script does not")
    options = parser.parse_args(words)
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    known = ("start-up", "digits", *(work.model for work in WORKLOADS["cpu"]))
    if options.only and options.only not in known:
        parser.error(f"--only {options.only}: there is {', '.join(known)}")
    options.rounds, options.seconds = (ENOUGH, 1.0) if options.quick else (7, 3.0)
    return options


def main() -> None:
    options = arguments()
    wanted = lambda part: options.only in ("", part)  # noqa: E731
    rows: list[dict[str, Any]] = []
    if wanted("start-up"):  # before torch's threads are there
        rows += start_up(options.rounds, 2 * options.rounds)
    if wanted("digits") and not options.quick:
        rows += first_run()

    from diffusion_cli.vision import mend_torchvision

    mend_torchvision()
    from diffusion_cli.devices import choose

    compile = {"true": True, "false": False}.get(options.compile, "auto")
    compute = choose(options.device, options.precision, compile, say, options.convolutions)
    for work in WORKLOADS["cuda" if compute.device.type == "cuda" else "cpu"]:
        if wanted(work.model):
            rows += contest(work, options, compute)
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(compute),
        "results": rows,
    }
    facts = {**found["hardware"], "date": found["date"], "command": found["command"]}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    print("", table(rows), "", *verdicts(rows), sep="\n")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
