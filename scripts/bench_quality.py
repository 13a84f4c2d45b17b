#!/usr/bin/env python3
"""How soon a network is good, beside peers: python scripts/bench_quality.py DATA --judge CLASSIFIER_RUN [--out FILE.json]

MNIST at 28 x 28 without labels, each tool by its own recipe, all in one process in turns of some seconds:

    ours                    experiment=mnist_flow (and any --ours "WORDS" beside it), by our trainer
    diffusers               the training tutorial: DDPM's 1000 steps, noise as target, batches of 16, AdamW 1e-4, a cosine with
                            the tutorial's share of warm-up (16 %) over what the budget allows, clipping; EMAModel as the
                            example script has it; the course's UNet2DModel for MNIST (32, 64, 64)
    diffusers, small        the same with a network of 164,000 weights (16, 32), as model=unet_tiny is
    denoising-diffusion     GaussianDiffusion and Trainer's defaults: v, sigmoid schedule, batches of 16, Adam 1e-4 (0.9, 0.99),
                            EMA 0.995 every 10 steps, clipping; Unet(dim=32, dim_mults=(1, 2, 4))
    k-diffusion             configs/config_mnist_transformer.json: patches of 4, width 256, depth 8, EDM's preconditioning,
                            sigma by an interpolated cosine, soft-min-SNR, batches of 64, AdamW 5e-4 (0.9, 0.95), EMA by its
                            inverse power

Counted are the CPU seconds of this process in updates alone: peers get their batches from memory, without their loaders, and
k-diffusion without its augmentation. With OMP_NUM_THREADS=1 that holds on a busy machine too. A peer that cannot be imported is
left out. At each mark the averaged network is judged, which is not counted:

    error      held-out x0 error over eight log-SNR from 6 to -8 (evaluation/denoising.py), the same pictures and noise for all
    distance   Frechet distance of samples from held-out pictures in the features of CLASSIFIER_RUN; the same noise, the same
               walk (Heun's rule in 6 equal steps of the straight line, 11 calls) for all

Both ask x0 at an equal log-SNR, each network in its own scale of x and time. `difference` is how far such an answer is from the
tool's own decoding of the same network: proof that the judge reads it rightly.
"""

import argparse
import json
import math
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import hardware, say
from quality_peers import SIZE, Data, Learner, denoising_diffusion, diffusers, k_diffusion
from torch import Tensor

from diffusion_cli import config, drawing
from diffusion_cli.assembly import Facts, objective_of
from diffusion_cli.build import build
from diffusion_cli.codecs import Pixels
from diffusion_cli.data import Batches, Dataset, Pictures
from diffusion_cli.data.pixels import to_float, to_uint8
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.devices import choose
from diffusion_cli.ema import EMA
from diffusion_cli.evaluation.denoising import errors_by_level
from diffusion_cli.evaluation.distances import Cloud, frechet
from diffusion_cli.features import Classifier, Extractor
from diffusion_cli.optimizers import Optimizer
from diffusion_cli.randomness import Source
from diffusion_cli.samplers import Sampler, last
from diffusion_cli.schedules import Flow, over_pictures
from diffusion_cli.trainer import Trainer
from diffusion_cli.vision import mend_torchvision

HELD_OUT, SAMPLES, STEPS = 96, 200, 6
HOPELESS = 0.4  # an error from which no digits come, so that no samples are made; the mean of all has 0.3 where noise is most
REAL = 5000  # held-out pictures that samples are compared with
TITLES = {"error": "held-out x0 error", "distance": "feature distance of samples"}
LINE = Flow()  # where all are judged


# -- our side ----------------------------------------------------------------------------------------------------------


def composed(words: Sequence[str]) -> Any:
    import hydra

    with hydra.initialize_config_dir(str(config.CONFIGS), version_base="1.3"):
        return config.check_train(config.plain(hydra.compose("train", list(words))))


def ours(words: Sequence[str], pictures: Pictures) -> Learner:
    plan, compute = (
        composed(["experiment=mnist_flow", "dataset.labels=false", *words]),
        choose("cpu", "fp32", False, say, "auto"),
    )
    facts = Facts(channels=1, image_size=SIZE, classes=[], taught=[], fingerprint="")
    objective = objective_of(plan.node, facts)
    compute.prepare(objective.network)
    recipe, average = build(plan.node["optimizer"], Optimizer, "optimizer"), build(plan.node["ema"], EMA, "ema")
    batches = Batches(pictures, plan.trainer.pace, 0)
    # no folder of a run and no config to save: only its step is called
    trainer = Trainer(objective, batches, None, recipe, average, None, plan.trainer, compute, 0, {})  # type: ignore[arg-type]
    endless = batches.starting_at(0)

    def step() -> int:
        trainer.step(next(endless))
        return plan.trainer.batch

    return Learner(" ".join(["ours", *words]), step, lambda: trainer.shadow.denoiser)  # type: ignore[union-attr, return-value]


# -- the judge ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """pictures: held-out uint8 [n, 1, 28, 28]; real: their features."""

    pictures: Tensor
    features: Extractor
    real: Cloud
    sampler: Sampler

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> tuple[dict[str, Any], Any]:
        """Figures, and some samples, uint8 [16, 1, 28, 28], or None where there would be no digits."""
        own = denoiser.schedule

        def ask(x: Tensor, t: Tensor) -> Tensor:
            s = own.t_of_log_snr(LINE.log_snr(t))
            return denoiser(over_pictures(own.sigma(s) / t, x) * x, s).clamp(-1, 1)

        denoiser.eval()
        found = errors_by_level(ask, LINE, self.pictures[:HELD_OUT], Source(0, torch.arange(HELD_OUT)), Pixels())
        means = {name: float(errors.mean()) for name, errors in found.items()}
        levels = {name.rpartition("/")[2]: value for name, value in means.items() if "/" in name}
        figures = {"error": means["x0_mse"], "distance": None, "by_log_snr": levels}
        if means["x0_mse"] > HOPELESS:
            return figures, None
        source = Source(1, torch.arange(SAMPLES))
        x, none = LINE.noise(source, "noise", (1, SIZE, SIZE)), lambda step, which=0: torch.zeros(1)
        samples = to_uint8(torch.cat([last(self.sampler.walk(ask, LINE, part, none)).x for part in x.split(64)]))
        return {**figures, "distance": frechet(Cloud(self.features(samples).features), self.real)}, samples[:16].numpy()


def judge_of(run: Path, held_out: Pictures) -> Judge:
    assert isinstance(held_out.images, Tensor) and held_out.labels is not None
    facts = Facts(channels=1, image_size=SIZE, classes=[], taught=[], fingerprint="")
    features, images = Classifier(ckpt=str(run)).open(facts, torch.device("cpu")), held_out.images[:REAL]
    seen = [features(part) for part in images.split(250)]
    logits = torch.cat([each.logits for each in seen if each.logits is not None])
    accuracy = (logits.argmax(1) == held_out.labels[:REAL]).float().mean()
    say(f"accuracy of the judge on {REAL:,} held-out pictures: {accuracy:.2%}")
    sampler = build(composed(["sampler=heun", f"sampler.steps={STEPS}"]).node["sampler"], Sampler, "sampler")
    return Judge(images, features, Cloud(torch.cat([each.features for each in seen])), sampler)


def beside(call: Callable[[], Any]) -> Callable[[], Any]:
    """Begins the call in a forked process, which has the networks as they are now and costs this one nothing; returns what
    waits for its result. (With OMP_NUM_THREADS=1, for threads do not survive a fork.)"""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: there.send(call()))
    process.start()
    there.close()

    def result() -> Any:
        found = here.recv()
        process.join()
        return found

    return result


# -- the contest -------------------------------------------------------------------------------------------------------


def contest(
    learners: Sequence[Learner], judge: Judge, marks: Sequence[float], turn: float, keep: Callable[[Any, Any], None]
) -> None:
    """Trains all by turns up to the last mark, in CPU seconds; keep: given all rows and the newest samples after each."""
    ends = sorted({*marks, *(turn * i for i in range(1, math.ceil(marks[-1] / turn)))})
    spent, seen, rows = dict.fromkeys(map(id, learners), 0.0), dict.fromkeys(map(id, learners), 0), list[dict[str, Any]]()
    drawn: dict[str, Tensor] = {}
    waiting: Callable[[], None] | None = None

    def judging(one: Learner) -> Callable[[], None]:
        row, result = (
            {"name": one.name, "seconds": spent[id(one)], "images": seen[id(one)]},
            beside(lambda: judge(one.average())),
        )

        def noted() -> None:
            figures, samples = result()
            if samples is not None:
                drawn[one.name] = torch.from_numpy(samples)
            rows.append({**row, **figures})
            said = f"error {figures['error']:.4f}, distance {figures['distance'] or math.nan:.3g}"
            say(f"{one.name}: {row['seconds']:.0f} s, {row['images']:,} pictures, {said}")
            keep(rows, drawn)

        return noted

    for number, end in enumerate(ends):
        first = number % len(learners)
        for one in [*learners[first:], *learners[:first]]:
            while spent[id(one)] < end:
                began = time.process_time()
                seen[id(one)] += one.step()
                spent[id(one)] += time.process_time() - began
            if end in marks:
                if waiting is not None:  # one judge at a time
                    waiting()
                waiting = judging(one)
    if waiting is not None:
        waiting()


def seconds_to(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """CPU seconds until a falling figure first reaches the level, log-log between marks; None: never."""
    for (t0, y0), (t1, y1) in zip([(points[0][0], math.inf), *points], points, strict=False):
        if y1 <= level:
            share = 1.0 if math.isinf(y0) else math.log(y0 / level) / math.log(y0 / y1)
            return math.exp(math.log(t0) + share * (math.log(t1) - math.log(t0)))
    return None


def curves_of(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    names = dict.fromkeys(row["name"] for row in rows)
    figure = lambda row: math.inf if row[key] is None else row[key]  # noqa: E731
    return {name: [(row["seconds"], figure(row)) for row in rows if row["name"] == name] for name in names}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Until a level that the best peer reaches at half and at the end of its budget: seconds of each, and of the soonest peer
    over the soonest of ours."""
    lines = []
    for key in TITLES:
        curves = curves_of(rows, key)
        peers = [name for name in curves if not name.startswith("ours")]
        for place, when in ((-2, "half of the budget"), (-1, "the budget")):
            level = min(points[max(place, -len(points))][1] for name, points in curves.items() if name in peers or not peers)
            found = {name: seconds_to(points, level) for name, points in curves.items()}
            mine, theirs = (
                min((s for n, s in found.items() if s and (n in peers) == side), default=None) for side in (False, True)
            )
            ratio = f"{theirs / mine:.1f}" if mine and theirs else "-"
            said = ", ".join(f"{name} {'never' if s is None else f'{s:.0f} s'}" for name, s in found.items())
            lines.append(f"{TITLES[key]} {level:.4g} (the best peer after {when}): {said}; ratio {ratio}")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]]) -> drawing.Image.Image:
    parts = [drawing.curves(curves_of(rows, key), title, "CPU seconds", 560, log_x=True) for key, title in TITLES.items()]
    sheet = drawing.Image.new("RGB", (sum(p.width for p in parts), parts[0].height), "white")
    for i, part in enumerate(parts):
        sheet.paste(part, (i * parts[0].width, 0))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="MNIST: a folder with parquet files, as dataset.path= takes it")
    parser.add_argument("--judge", type=Path, required=True, help="a run of experiment=classifier_mnist")
    parser.add_argument("--ours", action="append", metavar="WORDS", help="words beside experiment=mnist_flow (may be repeated)")
    parser.add_argument("--alone", action="store_true", help="without peers")
    parser.add_argument("--budget", type=float, default=480.0, help="CPU seconds of each (480)")
    parser.add_argument("--turn", type=float, default=20.0, help="CPU seconds of a turn (20)")
    parser.add_argument(
        "--marks", type=int, default=6, help="how often each is judged: at the budget, its half, its quarter ... (6)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there, after every mark")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument("--samples", type=Path, metavar="FILE.png", help="draw the newest samples of each")
    options = parser.parse_args()
    mend_torchvision()
    torch.manual_seed(0)
    dataset = build(composed(["experiment=mnist_flow", f"dataset.path={options.data}"]).node["dataset"], Dataset, "dataset")
    pictures, held_out = dataset.load("train"), dataset.load("test")
    assert pictures is not None and held_out is not None and isinstance(pictures.images, Tensor)
    images = pictures.images
    data: Data = lambda count: to_float(images[torch.randint(0, len(images), (count,))])  # noqa: E731
    learners = [ours(shlex.split(words), pictures) for words in options.ours or [""]]
    makers: dict[str, Callable[[str], Learner]] = {
        "diffusers": lambda name: diffusers(name, (32, 64, 64), True, 2, 32, data, options.budget),
        "diffusers, small": lambda name: diffusers(name, (16, 32), False, 1, 8, data, options.budget),
        "denoising-diffusion": lambda name: denoising_diffusion(name, 32, data),
        "k-diffusion": lambda name: k_diffusion(name, data),
    }
    for name, make in {} if options.alone else makers.items():
        try:
            learners.append(make(name))
        except ImportError as error:
            say(f"{name} is left out: {error}")
    for one in learners:
        weights = sum(p.numel() for p in one.average().network.parameters())
        said = ""
        if one.own is not None:
            with torch.no_grad():
                theirs, judged = one.own(torch.randn(2, 1, SIZE, SIZE))
            said = f", difference {float((theirs - judged).abs().max() / theirs.abs().max()):.1e}"
        say(f"{one.name}: {weights / 1e6:.2f}M weights{said}")
    judge = judge_of(options.judge, held_out)

    def keep(rows: Sequence[Mapping[str, Any]], drawn: Mapping[str, Tensor]) -> None:
        found = {
            "date": time.strftime("%Y-%m-%d %H:%M %z"), "command": shlex.join(["python", *sys.argv]),
            "hardware": hardware(choose("cpu", "fp32", False, say)), "rows": rows,
        }  # fmt: skip
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if options.samples is not None and drawn:
            options.samples.write_bytes(drawing.png(drawing.rows(drawn)))
        if options.plot is not None:
            options.plot.write_bytes(drawing.png(plot(rows)))
        found["table"] = table(rows)
        if len(rows) == len(learners) * options.marks:
            print(found["table"])

    contest(learners, judge, [options.budget / 2**i for i in reversed(range(options.marks))], options.turn, keep)


if __name__ == "__main__":
    main()
