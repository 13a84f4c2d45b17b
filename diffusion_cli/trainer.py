"""The training loop: one order for the first, the last and an interrupted step.

    done? -> report -> evaluate -> preview -> save -> stop -> step

The trainer knows no diffusion. All randomness is counted (randomness.py), so the state of a run is its tensors and the number
of steps: a resumed run equals the uninterrupted one to the bit, on the same machine with the same number of threads.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_cli import averages, checkpoint, ema, storage
from diffusion_cli.best import Best
from diffusion_cli.capture import Lessons, Record
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.collectives import gathered, local
from diffusion_cli.data import Batch, Batches, Pictures
from diffusion_cli.devices import Compute
from diffusion_cli.errors import ConfigError, NumericError, Stopped, StorageError, advising_on_memory
from diffusion_cli.gradients import Gradients
from diffusion_cli.group import Group
from diffusion_cli.guard import Diverged, Guard
from diffusion_cli.objectives import Objective, Tally
from diffusion_cli.optimizers import Optimizer, state_of
from diffusion_cli.parts import Parts
from diffusion_cli.progress import Progress
from diffusion_cli.randomness import Source, word_of
from diffusion_cli.runs import Run, say
from diffusion_cli.settings import Trainer as Settings
from diffusion_cli.signals import StopRequest, listening

# the averaged weights -> figures of what they make, or None where a signal came first
Measure = Callable[[Any, StopRequest], Mapping[str, float] | None]


class Trainer:
    """Trains an objective on batches. config: what the checkpoints carry (the resolved config and the data's facts)."""

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        held_out: Pictures | None,
        optimizer: Optimizer,
        average: ema.EMA,
        run: Run,
        settings: Settings,
        compute: Compute,
        seed: int,
        config: Mapping[str, Any],
        measure: Measure | None = None,
        group: Group | None = None,
        record: Record[Lessons] | None = None,
    ):
        self.group = group or Group()
        self.objective = objective
        self.shadow = copy.deepcopy(self.objective).eval().requires_grad_(False)  # the average: never swapped into the other
        self.second = None if average.second is None else copy.deepcopy(self.shadow)
        self.group.share(self.objective, list(self.averages().values()), compute.device)
        # after the copies, which are asked about pictures that they are given
        self.objective.meet(batches.pictures, compute.device, batches.flip)
        self.batches, self.held_out, self.run, self.settings = batches, held_out, run, settings
        self.compute, self.seed, self.config = compute, seed, config
        self.recipe, self.average, self.measure = optimizer, average, measure
        self.best = Best(settings.best)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = optimizer.make(self.objective)
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.scales_loss)
        self.pace = settings.pace
        own = settings.batch // self.group.me.world  # pictures of a batch that this process works off
        self.parts = Parts(self.objective, settings.accumulate, own, self.objective.coupled, self.group.lacking)
        self.guard = Guard(self.parameters, self.scaler, self.parts.undo, self.group.norm)
        self.progress = Progress()
        self.gradients = Gradients(self.objective, self.group, compute, self.scaler, seed, record)
        self.reported: tuple[int, float] = (0, 0.0)  # step and seconds at the last report
        self.fallen_back: str | None = None  # the digest of the checkpoint that the weights were last taken back to

    # -- the loop ------------------------------------------------------------------------------------------------------

    @advising_on_memory("a smaller trainer.batch", "a smaller trainer.preview", "a smaller model")
    def fit(self, start: Checkpoint | None = None, tick: Callable[[], None] | None = None) -> dict[str, float]:
        """Trains to the end of the settings and returns the last figures. tick: called after every step. Raises Stopped after a
        signal, having saved."""
        if start is not None:
            self.restore(start)
        run, settings, progress = self.run, self.settings, self.progress
        run.status("running", progress.step, total=settings.end)
        self.group.same("the step to begin from", progress.step)
        first, figures = progress.step, {}
        batches = self.batches.starting_at(first)
        nothing_new = lambda: progress.step == first  # noqa: E731 (then a signal need not wait)
        with (
            listening(nothing_new) as stop,
            tqdm(
                total=settings.end, initial=first, unit="step", disable=None if self.group.me.first else True, leave=False
            ) as bar,
        ):
            while True:
                began = time.perf_counter()
                try:
                    step, done = progress.step, self.done()
                    if settings.minutes is not None:  # by the clock of the first process
                        done = bool(self.group.decide(0, done)[1])
                    self.group.step = step
                    fresh = step > first  # what stands at `first` was done before the interruption, but for what is owed
                    if fresh and (done or step % settings.report_every == 0):
                        figures |= self.report(bar, quiet=not done and bar.disable is False)
                    if fresh:
                        due = {"evaluate": settings.evaluate_every, "watch": settings.metrics_every}
                        progress.owed += [name for name, every in due.items() if done or _due(step, every)]
                    drawn = fresh and (done or _due(step, settings.preview_every))
                    with self.group.judged(self.shadow, drawn or bool(progress.owed)) as average:
                        found = self.make_up(stop, average)
                        figures |= found
                        better = self.best.hear(step, found)
                        given_up = self.best.given_up(settings.patience)
                        done = done or given_up
                        if drawn or (fresh and given_up):
                            progress.owed.append("preview")
                        self.make_up(stop, average)
                    words = self.group.decide(stop.number, done, better, bool(progress.owed))
                    stop.number, (done, better, left) = words[0], map(bool, words[1:])
                    calm = not self.guard.suspects  # a checkpoint to go back to is none of a row of skipped steps
                    if fresh and _due(step, self.average.snapshots):
                        wholes = {name: self.group.whole(module.state_dict()) for name, module in self.averages().items()}
                        if self.group.me.first:
                            averages.snapshot(run.folder, step, wholes, self.config)
                    if fresh and (done or stop.number or better or (calm and _due(step, settings.save_every))):
                        self.save()
                    elif better and self.group.me.first:  # what was owed at `first`, whose checkpoint is there
                        checkpoint.point(run.checkpoints, self.best.state())
                    if done or stop.number:
                        break
                    paused = time.perf_counter() - began
                    with self.group.watch:
                        self.step(next(batches))
                    progress.seconds += time.perf_counter() - began - paused
                    if tick is not None:
                        tick()
                    bar.update()
                except Diverged as trouble:
                    self.fall_back(trouble)
                    first = bar.n = progress.step
                    batches = self.batches.starting_at(first)
        self.group.part()
        if stop.number and (not done or left):
            saved = ", saved" if progress.step > first else ", nothing new to save"
            raise Stopped(f"stopped by {stop.name} at step {progress.step}{saved}: the same command goes on", stop.number)
        return figures

    def check_best(self, measured: list[str]) -> None:
        """ConfigError, before any step, where the best figure is none that this run has. measured: those of samples."""
        wanted = self.settings.best
        with self.group.judged(self.shadow, wanted is not None) as average:
            if wanted is None or not self.group.me.first or wanted.removeprefix("evaluate/") in measured:
                return
            pictures, where = self._judges()
            source = Source(0, torch.arange(1, device=self.compute.device))
            with self.compute.precision():
                names = [f"{where}/{name}" for name in average.evaluate(pictures, source, 1)]
        there = [name for name in names if name.count("/") == 1] + [f"evaluate/{name}" for name in measured]
        if wanted not in there:
            raise ConfigError(f"trainer.best is {wanted}: this run has {', '.join(there)}")

    def done(self) -> bool:
        return self.settings.reached(self.progress.step, self.progress.seconds)

    def step(self, batch: Batch) -> None:
        """One update of the weights: forward and backward by parts, clip, optimizer, average; none of it by a bad gradient."""
        step = self.progress.step
        self.objective.train()
        rate = self.recipe.rate(step, self.settings.total, self.pace)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, tallies = self.parts.work(lambda parts: self.gradients.of(batch, step, parts), self.pace.times(step))
        self.group.average(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = self.group.clip(self.parameters, self.recipe.clip or math.inf)
        if self.guard.accepts(step, gathered(batch.ids), gathered(losses), norm):
            for name, tally in [*tallies, ("gradient_norm", Tally(norm.detach(), torch.ones_like(norm)))]:
                self.progress.add(name, tally)
            self.scaler.step(self.optimizer)
            for rule, shadow in ((self.average, self.shadow), (self.average.second, self.second)):
                if rule is not None and shadow is not None:
                    ema.update(shadow, self.objective, rule.beta(step, self.pace))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step = step + 1

    def fall_back(self, trouble: Diverged) -> None:
        """A good checkpoint instead of these weights, the newest from before the steps that were skipped just now.

        Raises NumericError where that was tried before, in vain.
        """
        good = (one for one in checkpoint.good(self.run.checkpoints) if isinstance(one, Checkpoint))
        start = next((one for one in good if not one.state.get("guard", {}).get("suspects")), None)
        self.group.same("the checkpoint to go back to", -1 if start is None else start.step)
        if start is None or start.digest == self.fallen_back:
            tried = "before the first checkpoint" if start is None else f"also after going back to step {start.step:,}"
            listed = ""
            if self.guard.suspects:
                facts = {"seed": self.seed, "steps": self.guard.suspects}
                listed = f", the pictures are listed in {self.run.write('diverged.json', json.dumps(facts, indent=1).encode())}"
            raise NumericError(
                f"{trouble}, {tried}: what was saved is good{listed}; try a smaller optimizer.lr, optimizer.clip=1, or "
                "precision=fp32"
            )
        say(f"{trouble}: going back to step {start.step:,}")
        snapshots = self.run.folder / averages.FOLDER
        for path in [*checkpoint.folders(self.run.checkpoints), *checkpoint.folders(snapshots)]:
            if path.name > start.folder.name and self.group.me.first:  # of the way that is not gone
                storage.remove(path)
        self.restore(start)
        self.run.open_figures(start.step)
        self.fallen_back = start.digest

    # -- what happens between steps ------------------------------------------------------------------------------------

    def report(self, bar: Any, quiet: bool) -> dict[str, float]:
        """Reads the sums since the last report, and only now waits for the device."""
        progress = self.progress
        values: dict[str, float] = {}
        self.progress.merge(self.group.total)
        for name, tally in progress.tallies.items():
            means = (tally.sums / tally.counts).tolist()
            if isinstance(means, list):
                names = self.objective.figure_names(name)
                values |= {f"{name}/{k}": mean for k, mean in zip(names, means, strict=True) if math.isfinite(mean)}
            else:
                values[f"train/{name}"] = means
        step_before, seconds_before = self.reported
        speed = (self.pace.seen(progress.step) - self.pace.seen(step_before)) / max(progress.seconds - seconds_before, 1e-9)
        values |= {
            "train/learning_rate": self.recipe.rate(progress.step - 1, self.settings.total, self.pace),
            "train/images": self.pace.seen(progress.step),
            "speed/images_per_second": speed,
        }
        if self.pace.doublings:
            values["train/batch"] = self.pace.size(progress.step - 1)
        if self.guard.skipped:
            values["train/skipped"] = self.guard.skipped
        self.run.figures(progress.step, values)
        progress.tallies.clear()
        self.reported = (progress.step, progress.seconds)
        line = f"loss {values.get('train/loss', math.nan):.4f}  {speed:,.0f} images/s"
        bar.set_postfix_str(line)
        if not quiet:
            say(f"step {progress.step:>7,}  {line}")
        return {name: values[name] for name in ("train/loss", "speed/images_per_second") if name in values}

    def make_up(self, stop: StopRequest, average: Objective) -> dict[str, float]:
        """Makes what is owed and returns its figures. A signal breaks it off, and what is left is owed to the next attempt.
        Of several processes the first one does."""
        if not self.group.me.first:
            self.progress.owed.clear()
        makers = {
            "evaluate": lambda: self.evaluate(average),
            "watch": lambda: self.watch(average, stop),
            "preview": lambda: self.preview(average),
        }
        owed, found = self.progress.owed, dict[str, float]()
        while owed and not stop.number:
            values: dict[str, float] = {}
            with stop.breaking_off():
                values = makers[owed[0]]()
            if not stop.number:
                if values:
                    self.run.figures(self.progress.step, values)
                found |= {name: value for name, value in values.items() if name.count("/") == 1}
                owed.pop(0)
        return found

    def preview(self, average: Objective) -> dict[str, float]:
        source = Source(word_of(self.seed, "preview"), torch.arange(self.settings.preview, device=self.compute.device))
        with self.compute.precision():
            for name, image in average.preview(self.held_out or self.batches.pictures, source).items():
                self.run.picture(self.progress.step, name, image)
        return {}

    def evaluate(self, average: Objective) -> dict[str, float]:
        """Figures of the averaged weights on held-out pictures, or on the trained ones where none are held out."""
        pictures, where = self._judges()
        count = min(self.settings.evaluate, len(pictures))
        source = Source(word_of(self.seed, "evaluate"), torch.arange(count, device=self.compute.device))
        with self.compute.precision():
            found = average.evaluate(pictures, source, self.parts.size)
        return {f"{where}/{name}": value for name, value in found.items()}

    def watch(self, average: Objective, stop: StopRequest) -> dict[str, float]:
        """Figures of what the averaged weights make."""
        found = None if self.measure is None else self.measure(average, stop)
        return {f"evaluate/{name}": value for name, value in (found or {}).items()}

    def _judges(self) -> tuple[Pictures, str]:
        """The pictures of an evaluation, and the place of its figures."""
        return (self.batches.pictures, "evaluate_on_train") if self.held_out is None else (self.held_out, "evaluate")

    def settle(self) -> None:
        """What the objective measures of the training pictures, of the newest weights and of the average."""
        with torch.no_grad(), self.compute.precision():
            for model in (self.objective.eval(), self.shadow):
                model.settle(self.batches.pictures, self.parts.size)

    # -- state ---------------------------------------------------------------------------------------------------------

    def averages(self) -> dict[str, Objective]:
        return {"average": self.shadow} if self.second is None else {"average": self.shadow, "second": self.second}

    def save(self) -> None:
        """The whole state as checkpoint number `step`; older ones go only after it has been verified."""
        self.progress.merge(self.group.total)
        self.settle()
        groups = {name: module.state_dict() for name, module in {"weights": self.objective, **self.averages()}.items()}
        groups |= {"optimizer": state_of(self.optimizer, self.objective), "trainer": self.progress.tensors()}
        held = {name: local(group.values()) for name, group in groups.items()}
        if broken := [name for name, parts in held.items() if self.group.decide(not all(map(_finite, parts)))[0]]:
            raise Diverged(f"{' and '.join(broken)} are not finite at step {self.progress.step:,}, and not saved")
        groups = {name: self.group.whole(group) for name, group in groups.items()}
        if not self.group.me.first:
            self.progress.leave()
            return
        checkpoint.save(
            self.run.checkpoints,
            self.progress.step,
            groups,
            self.config,
            {
                "step": self.progress.step,
                "images": self.pace.seen(self.progress.step),
                "seconds": self.progress.seconds,
                "reported": list(self.reported),
                "scaler": self.scaler.state_dict(),
                "best": self.best.state(),
                "owed": self.progress.owed,
                "guard": self.guard.state(),
                "parts": self.parts.count,
            },
        )
        if self.best.step is not None:
            checkpoint.point(self.run.checkpoints, self.best.state())
        checkpoint.tidy(self.run.checkpoints, self.settings.keep, self.best.step)
        self.run.status("running", self.progress.step, total=self.settings.end)

    def restore(self, start: Checkpoint) -> None:
        """Goes on from a checkpoint. Raises StorageError where it is of another network."""
        try:
            for group, module in {"weights": self.objective, **self.averages()}.items():
                held = module.state_dict()
                module.load_state_dict({k: self.group.own(v, held.get(k)) for k, v in start.tensors(group).items()})
        except RuntimeError as error:
            raise StorageError(f"{start.folder} does not fit this network: {str(error).splitlines()[-1].strip()}") from None
        self.optimizer.zero_grad(set_to_none=True)
        saved = start.tensors("optimizer")
        for name, parameter in self.objective.named_parameters():
            state = {key.rpartition("/")[2]: value for key, value in saved.items() if key.rpartition("/")[0] == name}
            if state:
                here = {key: self.group.own(value.to(self.compute.device), parameter) for key, value in state.items()}
                self.optimizer.state[parameter] = here
        self.progress.load(start.tensors("trainer"), self.compute.device)
        if not self.group.me.first:
            self.progress.leave()
        self.scaler.load_state_dict(start.state["scaler"])
        self.progress.step, self.progress.seconds = start.state["step"], start.state["seconds"]
        self.best = Best.of_state(self.settings.best, start.state)
        self.guard.load(start.state.get("guard", {}))
        self.progress.owed = list(start.state.get("owed", []))
        count = start.state.get("parts", self.settings.accumulate)  # of another number of processes, perhaps
        self.parts.count = self.settings.accumulate if self.parts.batch % count else count
        if self.group.me.first:
            checkpoint.point(self.run.checkpoints, None if self.best.step is None else self.best.state())
            if checkpoint.folders(self.run.checkpoints)[:1] == [start.folder]:  # a kill may have come before the old ones went
                checkpoint.tidy(self.run.checkpoints, self.settings.keep, self.best.step)
        self.reported = (start.state["reported"][0], start.state["reported"][1])


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
