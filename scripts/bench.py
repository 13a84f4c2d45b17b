#!/usr/bin/env python3
"""How long things take here, and the same work in diffusers: python scripts/bench.py [--quick] [--out FILE.json]

    start-up   seconds of `diffusion-train --help` and of a misspelt option, beside the imports of a diffusers script
    digits     seconds from `diffusion-train` to its first grid, its last grid and its end (left out by --quick)
    training   images/s of whole updates: forward, backward, clipping, AdamW, EMA; here with data and noise counted in
    sampling   images/s of 50 DDIM steps, measured in fewer (the cost is linear in them), with the same weights

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
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOREIGN = 0.10  # of a core that others may use before a sample counts as disturbed
ENOUGH = 3  # clean samples of each contestant; with fewer, the disturbed ones are kept
DDIM_STEPS = 50
PEER_IMPORTS = "from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel; from diffusers.training_utils import EMAModel"
MENDED = "from diffusion_cli.vision import mend_torchvision; mend_torchvision(); "  # else diffusers may fail to import


# -- timing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One timed call. foreign: cores that other processes used meanwhile; own: CPU seconds of this one; None: not known."""

    seconds: float
    foreign: float | None = None
    own: float | None = None

    @property
    def clean(self) -> bool:
        return self.foreign is None or self.foreign <= FOREIGN


@dataclass(frozen=True)
class Contestant:
    """call: the work that is timed; amount: how many images one call makes, or 1 where seconds are what counts."""

    name: str
    call: Callable[[], object]
    amount: float = 1.0


def cpu_seconds() -> tuple[float, float] | None:
    """(of all processes, of this one and its ended children) since the start; None without /proc/stat."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    own = os.times()
    mine = own.user + own.system + own.children_user + own.children_system
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), mine


def timed(call: Callable[[], object]) -> Sample:
    before, began = cpu_seconds(), time.perf_counter()
    call()
    seconds, after = time.perf_counter() - began, cpu_seconds()
    if before is None or after is None:
        return Sample(seconds)
    own = after[1] - before[1]
    return Sample(seconds, max(0.0, after[0] - before[0] - own) / seconds, own)


def take_turns(contestants: Sequence[Contestant], least: int, most: int) -> dict[str, list[Sample]]:
    """Samples by name, one for each round: `least` rounds, and up to `most` until all have `least` clean samples."""
    samples: dict[str, list[Sample]] = {c.name: [] for c in contestants}
    for turn in range(most):
        first = turn % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            samples[contestant.name].append(timed(contestant.call))
        if turn + 1 >= least and all(sum(s.clean for s in found) >= least for found in samples.values()):
            break
    return samples


# -- the table ---------------------------------------------------------------------------------------------------------


def kept(samples: Sequence[Sample]) -> list[Sample]:
    """The clean samples, or all of them where fewer than ENOUGH are clean."""
    clean = [s for s in samples if s.clean]
    return clean if len(clean) >= ENOUGH else list(samples)


def figures(samples: Sequence[Sample], amount: float, unit: str) -> dict[str, Any]:
    """min, median and max in the unit (s, or images/s), how many samples were taken, and how many of them dropped."""
    values = [s.seconds if unit == "s" else amount / s.seconds for s in kept(samples)]
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "samples": len(samples),
        "disturbed": sum(not s.clean for s in samples),
        "dropped": len(samples) - len(values),
    }


def compare(
    what: str, unit: str, ours: Contestant, peer: Contestant, samples: Mapping[str, Sequence[Sample]]
) -> dict[str, Any]:
    """A row of the table. ratio and paired are how many times faster ours is: above 1 for the better, whatever the unit."""
    mine, theirs = samples[ours.name], samples[peer.name]
    both = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.clean and b.clean]
    pairs = both if len(both) >= ENOUGH else list(zip(mine, theirs, strict=True))
    here, there = figures(mine, ours.amount, unit), figures(theirs, peer.amount, unit)
    faster = there["median"] / here["median"] if unit == "s" else here["median"] / there["median"]
    paired = statistics.median((b.seconds / peer.amount) / (a.seconds / ours.amount) for a, b in pairs)
    used = [(a.own / ours.amount, b.own / peer.amount) for a, b in zip(mine, theirs, strict=True) if a.own and b.own]
    cpu = statistics.median(b / a for a, b in used) if len(used) == len(mine) else None
    return {
        "what": what, "unit": unit, "peer_is": peer.name, "ours": here, "peer": there, "ratio": faster, "paired": paired,
        "cpu": cpu, "pairs": len(pairs),
    }  # fmt: skip


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's texts in the order of HEAD; without a peer it has figures of ours alone."""
    sides = [row["ours"], row["peer"]] if row.get("peer") else [row["ours"]]
    shown = ["/".join(number(side[key]) for key in ("min", "median", "max")) for side in sides]
    kept = [" (kept)" if side["disturbed"] > side["dropped"] else "" for side in sides]
    count = " + ".join(f"{side['disturbed']} of {side['samples']}{word}" for side, word in zip(sides, kept))
    if len(sides) == 1:
        return [row["what"], row["unit"], shown[0], "", "", "", "", count, ""]
    ratios = [f"{row[key]:.2f}" if row[key] is not None else "" for key in ("ratio", "paired", "cpu")]
    return [row["what"], row["unit"], *shown, *ratios, count, row["peer_is"]]


HEAD = ["", "unit", "ours min/median/max", "peer min/median/max", "ratio", "paired", "cpu", "disturbed", "peer"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where ours is behind, in words. By less than 5 % in either ratio is called level: clean samples swing more than that."""
    behind, level = [], []
    for row in rows:
        if not row.get("peer"):
            continue
        low, high = sorted((row["ratio"], row["paired"]))
        says = f"{row['what']}: {row['ratio']:.2f} by the medians, {row['paired']:.2f} by pairs"
        if any(side["disturbed"] > side["dropped"] for side in (row["ours"], row["peer"])):
            says += ", from disturbed samples: run it again on a quiet machine"
        if high < 0.95:
            behind.append(f"BEHIND {row['peer_is']} in {says}")
        elif low < 1.05:
            level.append(f"level with {row['peer_is']} in {says}")
    return [*behind, *level] or ["ahead in every row that has a peer"]


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

RENAMES = [  # the names of diffusers' UNet2DModel to ours, in this order
    (r"^time_embedding\.linear_(\d)", r"time_embedding.linear\1"),
    (r"^conv_norm_out", "norm_out"),
    (r"^(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.blocks.\3.residual"),
    (r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)", r"\1.\2.blocks.\3.attention"),
    (r"^(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0", r"\1.\2.resize"),
    (r"^mid_block\.resnets\.(\d)", r"mid.\1.residual"),
    (r"^mid_block\.attentions\.0", "mid.0.attention"),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.time_emb_proj\.", ".time."),
    (r"\.attention\.group_norm\.", ".attention.norm."),
    (r"\.attention\.to_([qkv])\.", r".attention.\1."),
    (r"\.attention\.to_out\.0\.", ".attention.out."),
]


def renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Workload:
    """A network at 32 x 32 x 3. train, sample: pictures in a batch; steps: of DDIM that are really made."""

    model: str
    train: int
    sample: int
    steps: int


WORKLOADS = {
    "cpu": (Workload("unet_small", 32, 16, 10), Workload("unet", 8, 4, 5)),
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
    """Our objective and diffusers' network of the same shape, with the same weights."""

    def __init__(self, work: Workload, compute: Any, compile_peer: bool):
        import torch

        from diffusion_cli.assembly import Facts, denoising_of

        torch.manual_seed(0)
        self.work, self.compute, self.plan = work, compute, plan_of(work)
        self.theirs = peers_network(self.plan.node["model"]).to(compute.device)
        facts = Facts(channels=3, image_size=32, classes=[], labelled=False, fingerprint="")
        self.objective = denoising_of(self.plan.node, facts).to(compute.device)
        self.network = self.objective.denoiser.network
        self.network.load_state_dict({renamed(key): value for key, value in self.theirs.state_dict().items()})
        self.difference = self._difference()
        self.weights = sum(p.numel() for p in self.network.parameters())
        if compute.compile:
            self.network.compile()
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

    def our_training(self) -> Callable[[], object]:
        import torch

        from diffusion_cli.build import build
        from diffusion_cli.data import Batches, Pictures
        from diffusion_cli.ema import EMA
        from diffusion_cli.optimizers import Optimizer
        from diffusion_cli.trainer import Trainer

        node, images = self.plan.node, torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
        batches = Batches(Pictures(images), self.work.train, 0, flip=True, device=self.compute.device)
        recipe, average = build(node["optimizer"], Optimizer, "optimizer"), build(node["ema"], EMA, "ema")
        # no folder of a run and no config to save: only its step is called
        trainer = Trainer(self.objective, batches, None, recipe, average, None, self.plan.trainer, self.compute, 0, {})  # type: ignore[arg-type]
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

    def our_sampling(self) -> Callable[[], object]:
        """What diffusion-sample does with a batch, as far as the uint8 pictures."""
        from dataclasses import replace

        import torch

        from diffusion_cli.data.pixels import to_uint8
        from diffusion_cli.objectives.denoising import walk
        from diffusion_cli.randomness import Source
        from diffusion_cli.samplers import last

        sampler, denoiser = replace(self.objective.sampler, steps=self.work.steps), self.objective.denoiser.eval()
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
        calls = (
            (pair.our_training(), pair.peers_training()) if kind == "training" else (pair.our_sampling(), pair.peers_sampling())
        )
        what = f"{kind}, {work.model} ({pair.weights / 1e6:.1f}M), batch {batch}" + (", DDIM 50" if kind == "sampling" else "")
        say(f"{what}: largest relative difference of the two networks' answers {pair.difference:.1e}")
        name = "diffusers, compiled" if options.compile_peer else "diffusers"
        ours, peer = (repeated(n, c, part, options.seconds, wait) for n, c in zip(("ours", name), calls))
        rows.append(compare(what, "images/s", ours, peer, take_turns([ours, peer], options.rounds, 3 * options.rounds)))
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
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter samples, without the default run: about two minutes"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="start-up, digits, or a model: leave out the rest")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="of both sides (default: auto)"
    )
    parser.add_argument("--compile", default="auto", choices=("auto", "true", "false"), help="our network (auto: on a GPU)")
    parser.add_argument(
        "--compile-peer", action="store_true", help="compile diffusers' network as well, which its script does not"
    )
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

    compute = choose(options.device, options.precision, {"true": True, "false": False}.get(options.compile, "auto"), say)
    for work in WORKLOADS["cuda" if compute.device.type == "cuda" else "cpu"]:
        if wanted(work.model):
            rows += contest(work, options, compute)
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(compute),
        "results": rows,
    }
    print("\n".join(f"{key}: {value}" for key, value in [*found["hardware"].items(), *list(found.items())[:2]]))
    print("", table(rows), "", *verdicts(rows), sep="\n")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
