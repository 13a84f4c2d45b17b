"""A training run from its checked plan: read the data, assemble, go on or start, train, leave pictures and the next command."""

import json
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from diffusion_cli import checkpoint, drawing, storage
from diffusion_cli.assembly import Facts, Stages, adapt, objective_of, reads_texts, rehearse
from diffusion_cli.best import Best
from diffusion_cli.build import build
from diffusion_cli.capture import recorder
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.conditioning.tokenizer import learned
from diffusion_cli.data import Batches, Dataset, Pictures
from diffusion_cli.data.pixels import to_uint8
from diffusion_cli.devices import choose
from diffusion_cli.ema import EMA
from diffusion_cli.errors import ConfigError, Stopped, StorageError
from diffusion_cli.evaluation.watch import watch_of
from diffusion_cli.finding import find
from diffusion_cli.group import Distributed, Group
from diffusion_cli.initial import begin
from diffusion_cli.objectives import Objective
from diffusion_cli.objectives.captions import captions
from diffusion_cli.objectives.denoising import spread
from diffusion_cli.optimizers import Optimizer
from diffusion_cli.pace import Pace
from diffusion_cli.pretrained.trained import Trained
from diffusion_cli.profiling import profiled
from diffusion_cli.randomness import Source
from diffusion_cli.recomputing import recompute
from diffusion_cli.runs import Onlooker, Run, say, status_of
from diffusion_cli.schedules import Schedule
from diffusion_cli.settings import Plan, Train, flat, frozen_changes
from diffusion_cli.stages import FOLDER, carry, opened
from diffusion_cli.stall import watching
from diffusion_cli.trainer import Trainer


def train(plan: Plan) -> dict[str, float]:
    """Trains, or goes on training, the run that the plan names, and returns its last figures. One of several processes joins
    the others."""
    with build(plan.node["distributed"], Distributed, "distributed", trust=plan.root.trust).joined() as group:
        return _train(plan, group)


def _train(plan: Plan, group: Group) -> dict[str, float]:
    began = time.perf_counter()
    node, root, settings = plan.node, plan.root, plan.trainer
    compute = choose(group.me.device(root.device), root.precision, root.compile, say, root.convolutions)
    record = recorder(root.cuda_graph, compute, group.me.world == 1 and not root.recompute)
    dataset = build(node["dataset"], Dataset, "dataset", trust=root.trust)
    folder = Path(root.outputs) / str(root.name)
    stages = opened(node, folder, root.trust)
    rehearsed = rehearse(node, root.trust, stages)
    if root.preview == "data":
        if group.me.first:
            _draw_data(node, dataset, folder, root.trust)
        return {}
    start = _start(folder, node, root.resume)
    ended = status_of(folder).get("state") == "finished"  # or interrupted after its last checkpoint: the rest is made up for
    given_up = start is not None and Best.of_state(settings.best, start.state).given_up(settings.patience)
    if start is not None and ended and (given_up or settings.reached(start.step, start.state["seconds"])):
        limit = "steps" if settings.steps is not None else "images" if settings.images is not None else "minutes"
        limit = "patience" if given_up else limit
        say(f"{folder} is finished at step {start.step:,}: a larger trainer.{limit}= goes on, another name= starts anew")
        _say_next(folder, rehearsed)
        return dict(status_of(folder).get("figures", {}))
    found = _initial(root, start)
    step = start.step if start else 0
    group.same("the checkpoint to go on from", step)  # and before that nobody begins to write
    run = Run(folder) if group.me.first else Onlooker(folder)
    try:
        group.folder = folder
        if group.me.first:
            checkpoint.sweep(run.checkpoints)  # first: it may be what fills the disk
            run.status("running", step, total=settings.end)
            carry(node, folder, root.trust)
        with group.in_turn():
            pictures, held_out = dataset.load("train"), dataset.load("test")
        assert pictures is not None
        facts = stages.facts(_facts(dataset, pictures))
        if reads_texts(node["objective"], root.trust):
            known = found or (start if root.init else None)  # a network that was taught one tokenizer keeps it
            tokenizer = known.config["facts"]["tokenizer"] if known else None
            facts["tokenizer"] = tokenizer or learned(captions(pictures), node["objective"]["vocabulary"])
        _same_data(start, facts)
        objective = objective_of(node, facts, root.trust, stages)
        if found is not None:
            say(f"begins from {found.said}, {found.digest[:12]}")
            begin(objective, found, root.init_weights, facts)
        adapt(objective, node, root.trust)
        if root.recompute:
            recompute(objective.network)
        if compute.compile:
            group.compile(objective.network)
        compute.convolve(objective.network)
        compute.convolve(stages.codec)
        weights = sum(p.numel() for p in objective.network.parameters())
        shape = f"{facts['channels']} x {facts['image_size']} x {facts['image_size']}"
        trained = sum(p.numel() for p in objective.network.parameters() if p.requires_grad)
        share = "" if trained == weights else f" ({trained:,} of them trained)"
        several = f", {group.me.world} processes" if group.me.world > 1 else ""
        say(f"{folder}: {len(pictures):,} pictures of {shape}, {weights:,} weights{share}, {compute}{several}")
        if pictures.skipped:
            say(f"{len(pictures.skipped)} pictures cannot be read and are skipped, the first: {' '.join(pictures.skipped[0])}")
            run.write("skipped.json", json.dumps([s._asdict() for s in pictures.skipped], indent=1).encode())
        if start is not None:
            say(f"going on from step {start.step:,}" + (f" of {settings.end:,}" if settings.end is not None else ""))
        sizes = {"train": len(pictures), "test": 0 if held_out is None else len(held_out)}
        saved = {"config": _plain(node), "facts": dict(facts), "pictures": sizes}
        watch = watch_of(plan, pictures, held_out, facts, compute) if group.me.first else None
        trainer = Trainer(
            objective,
            Batches(pictures, settings.pace, root.seed, dataset.flip, compute.device, group.me.rank, group.me.world),
            held_out,
            build(node["optimizer"], Optimizer, "optimizer", trust=root.trust),
            build(node["ema"], EMA, "ema", trust=root.trust),
            run,
            settings,
            compute,
            root.seed,
            saved,
            watch,
            group,
            record,
        )
        trainer.check_best([] if watch is None else watch.names)
        run.write("config.yaml", yaml.safe_dump(saved["config"], sort_keys=False).encode())
        run.open_figures(step)
        if start is None:
            run.text("config", "```yaml\n" + yaml.safe_dump(saved["config"], sort_keys=False) + "```")
        with (
            profiled(run, objective.network, settings.pace.size(step), compute) if root.profile else nullcontext() as tick,
            watching(settings.stall, group.hangs) as group.watch,
        ):
            figures = trainer.fit(start, tick)
        if not group.me.first:
            return figures
        figures = figures or run.last_figures()
        step = trainer.progress.step
        run.hyperparameters(step, flat(saved["config"]), figures)
        _draw_history(run, objective)
        reason = _early(trainer)
        run.status("finished", step, total=settings.end, figures=figures, **({} if reason is None else {"reason": reason}))
        if reason is not None:
            say(reason)
        say(
            f"done in {time.perf_counter() - began:.0f} s: "
            + ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        )
        _say_next(folder, objective)
        return figures
    except BaseException as error:
        with group.speaking, suppress(StorageError):  # the disk that is full is so for this too: the first error is said
            run.status(
                "preempted" if isinstance(error, Stopped | KeyboardInterrupt) else "failed",
                status_of(folder).get("step", step),
                reason=str(error) or type(error).__name__,
                code=getattr(error, "code", 1),
            )
        raise
    finally:
        run.close()


def _initial(root: Train, start: Checkpoint | None) -> Trained | None:
    """The model that a new run begins from, which is still the one that the config was checked with."""
    if root.init is None or start is not None:
        return None
    found = find(root.init, "init")
    if found.digest != root.init_digest:
        raise ConfigError(f"init={root.init} has changed since it was looked up: the same command once more")
    return found


def _start(folder: Path, node: dict[str, Any], resume: str) -> Checkpoint | None:
    """The newest good checkpoint of the run, if it has one, after making sure that it is the same run."""
    found = None
    for candidate in checkpoint.good(folder / "checkpoints"):
        if isinstance(candidate, Checkpoint):
            found = candidate
            break
        say(f"passed over a damaged checkpoint: {candidate}")
    if found is None:
        if resume == "always":
            raise ConfigError(f"resume=always, but {folder} has no checkpoint to go on from")
        if checkpoint.folders(folder / "checkpoints"):
            raise StorageError(f"no checkpoint of {folder} is whole: choose another name=, or remove {folder / 'checkpoints'}")
        return None
    if resume == "never":
        raise ConfigError(f"resume=never, but {folder} exists (step {found.step:,}): choose another name=")
    changes = frozen_changes(found.config["config"], _plain(node))
    if changes:
        more = [f"  ... and {len(changes) - 4} more"] if len(changes) > 4 else []
        lines = [f"  {change}" for change in changes[:4]] + more
        raise ConfigError(
            f"{folder} is a run with other settings:\n"
            + "\n".join(lines)
            + "\n  choose another name=, or go back to its settings"
        )
    return found


def _plain(node: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return dict(json.loads(json.dumps(node)))


def _facts(dataset: Dataset, pictures: Pictures) -> Facts:
    return Facts(
        channels=dataset.channels,
        image_size=dataset.size,
        classes=list(pictures.classes),
        taught=pictures.labels.unique().tolist() if dataset.labels and pictures.labels is not None else [],
        fingerprint=pictures.fingerprint,
    )


def _same_data(start: Checkpoint | None, facts: Facts) -> None:
    if start is None or start.config["facts"] == dict(facts):
        return
    if start.config["facts"].get("teacher") != facts.get("teacher"):
        raise ConfigError(
            "objective.method.teacher is not the one that the run began with: name that very checkpoint of it "
            "(RUN/checkpoints/step_...), or choose another name="
        )
    if other := [name for name in Stages.NAMES if start.config["facts"].get(name) != facts.get(name)]:
        here = start.run / FOLDER / other[0]
        raise ConfigError(f"{other[0]} is not what the run began with: put back what lay at {here}, or choose another name=")
    raise ConfigError(
        "the pictures are not those that the run began with (dataset.path): choose another name=, or point to the same"
    )


def _draw_data(node: dict[str, Any], dataset: Dataset, folder: Path, trust: tuple[str, ...]) -> None:
    """What the network will see: eight pictures as they are in a batch, and noised to eight levels."""
    pictures = dataset.load("train")
    assert pictures is not None
    schedule = build(node["schedule"], Schedule, "schedule", trust=trust)
    batches = Batches(pictures, Pace(node["trainer"]["batch"]), node["seed"], dataset.flip)
    x0 = next(batches.starting_at(0)).x[:8]
    noise = schedule.noise(Source(node["seed"], torch.arange(len(x0))), "preview", x0.shape[1:])
    named = {"clean": to_uint8(x0)}
    for t in torch.linspace(0.125, 1, 8):
        x = schedule.mix(x0, noise, t)
        named[f"t = {float(t):.3f}"] = to_uint8(x / float(spread(schedule, t)))
    storage.make_folder(folder)
    path = folder / "data.png"
    storage.write(path, drawing.png(drawing.rows(named)))
    say(f"{len(pictures):,} pictures; what the network will see, clean and at eight levels of noise: {path}")


def _draw_history(run: Run, objective: Objective, frames: int = 10) -> None:
    """The loss as a curve, and how the first pictures of each preview grew over training."""
    image = drawing.curve(run.history("train/loss"), "training loss")
    run.write("loss.png", drawing.png(image))
    previews = sorted(run.samples.glob(f"{objective.shown}_*.png"))
    wanted = [previews[i] for i in drawing.evenly(frames, len(previews))]
    sheets = [Image.open(path).convert("RGB") for path in wanted]
    if len(sheets) > 1 and len({sheet.size for sheet in sheets}) == 1:
        run.write("growth.gif", drawing.gif([sheet.convert("P", palette=Image.Palette.ADAPTIVE) for sheet in sheets], 500))


def _early(trainer: Trainer) -> str | None:
    """Why a run ended before its last step, if it did."""
    best, settings = trainer.best, trainer.settings
    if not best.given_up(settings.patience) or trainer.done():
        return None
    where = "" if best.step is None else f" than {best.value:.6g} of step {best.step:,}"
    return f"stopped at step {trainer.progress.step:,}: {best.figure} was no better{where} in {best.worse} evaluations"


def _say_next(folder: Path, objective: Objective) -> None:
    newest = max((folder / "samples").glob(f"{objective.shown}_*.png"), default=None)
    if newest is not None:
        say(f"look at   {newest}")
    say(f"and try   {objective.example.format(run=folder)}")
