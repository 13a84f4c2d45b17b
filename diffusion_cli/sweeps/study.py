"""Searching with Optuna: it proposes, jobs run, each evaluation is reported to it, and what falls behind is pruned.

The study lies in the sweep's folder (study.log), so the same command goes on with it. A trial that was cut short stays open and
is taken up again with its run; one that failed counts as made. Akiba et al. 2019, "Optuna".
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_cli import storage
from diffusion_cli.cli import path_in_words
from diffusion_cli.errors import ConfigError
from diffusion_cli.settings import Trainer, frozen_changes
from diffusion_cli.signatures import did_you_mean
from diffusion_cli.status import status_of
from diffusion_cli.sweeps.jobs import Job, ends, figure, label
from diffusion_cli.sweeps.pool import Ended
from diffusion_cli.sweeps.settings import Optuna
from diffusion_cli.sweeps.space import Choice, Space, corners, grid
from diffusion_cli.sweeps.sweep import Sweep, say

if TYPE_CHECKING:
    import optuna


def search(sweep: Sweep) -> None:
    """The whole of a search, or what is left of it."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("hydra/sweeper=optuna needs pip install 'diffusion-cli[optuna]'; hydra/sweeper=random does without")
    words = sweep.words
    assert isinstance(words, Optuna)
    points = grid(sweep.space) if words.sampler == "grid" else []
    if words.trials is None and not points:
        raise ConfigError(f"hydra.sweeper.trials is null: sampler={words.sampler} has no end of its own, say how many")
    total = min(words.trials or len(points), len(points) or math.inf)
    checked = sweep.listed(corners(sweep.space))
    storage.make_folder(sweep.folder)
    study = _study(sweep.folder, words)
    _same_search(study, sweep, checked[0].node)
    if points and not study.trials:
        for point in points[: int(total)]:
            study.enqueue_trial(point)
    if sweep.processes is None and words.pruner != "none":
        say(f"  {type(sweep.launcher).__name__} runs its jobs to their ends: pruning needs hydra/launcher=processes")
    made = len({trial.user_attrs["run"] for trial in study.trials if "run" in trial.user_attrs and trial.state.is_finished()})
    say(f"{path_in_words(sweep.folder)}: {total} trials" + f", {made} made before" * bool(made))
    sweep.run(Trials(study, sweep, words, int(total)), int(total), words.batch)


class Trials:
    """What Optuna and the jobs tell each other (a Guide of sweep.py). total: trials in all, those of earlier launches too."""

    def __init__(self, study: "optuna.Study", sweep: Sweep, words: Optuna, total: int):
        self.study, self.sweep, self.words, self.total = study, sweep, words, total
        self.live: dict[str, optuna.Trial] = {}
        self.news: dict[str, News] = {}

    def jobs(self) -> Iterator[Job]:
        self._take_up()
        while self._waiting() or self._made() < self.total:
            trial = self.study.ask(_distributions(self.sweep.space))
            values = {key: repr(value) if isinstance(value, float) else str(value) for key, value in trial.params.items()}
            name = trial.user_attrs.get("run") or f"{self._made():03d}-{label(_short(trial.params))}"
            trial.set_user_attr("run", name)
            number = int(name.partition("-")[0])
            twin = self._twin(trial)
            if twin is not None:
                say(f"  [{number + 1}/{self.total}] as {twin.user_attrs['run']}, whose figure is taken")
                self.study.tell(trial, twin.value)
                continue
            try:
                job = self.sweep.job(number, values, name)
            except ConfigError as error:  # values that are right alone and impossible together
                say(f"  [{number + 1}/{self.total}] impossible: {error}")
                self.study.tell(trial, state=_state("FAIL"))
                continue
            self.live[name] = trial
            self.news[name] = News(job.folder / "metrics.jsonl", self.words.metric)
            self.sweep.enter([job])
            yield job

    def watch(self, job: Job) -> str:
        """Reports what is new of a job, and says why it should end, or ""."""
        trial, news = self.live[job.folder.name], self.news[job.folder.name]
        settled = not news.asked  # what a run wrote before it was taken up again
        last = Trainer(**job.node["trainer"]).end or math.inf
        for step, name, value in news.read():
            trial.report(value, step)
            if not settled and self.words.warmup <= step < last and trial.should_prune():
                return f"{name} {value:.4g} at step {step:,} falls behind the other runs ({self.words.pruner})"
        return ""

    def ended(self, end: Ended) -> None:
        trial = self.live.pop(end.job.folder.name)
        if end.state == "finished":
            figures = status_of(end.job.folder).get("figures", {})
            found = figure(figures, self.words.metric)
            if found is None:  # the trial stays open, and is made up for under the right name
                near = did_you_mean(str(self.words.metric), figures)
                raise ConfigError(f"hydra.sweeper.metric is {self.words.metric}: the runs do not report it; {near}")
            known = math.isfinite(found[1])
            self.study.tell(trial, found[1] if known else None, state=None if known else _state("FAIL"))
        elif end.state != "preempted":
            self.study.tell(trial, state=_state("PRUNED" if end.state == "pruned" else "FAIL"))

    # -- the trials that there are -------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Trials that an earlier launch left open are proposed again, under the name of their run."""
        for trial in self._in("RUNNING"):
            run = {"run": trial.user_attrs["run"]} if "run" in trial.user_attrs else {}
            self.study.tell(trial.number, state=_state("FAIL"))
            self.study.enqueue_trial(trial.params, user_attrs=run)

    def _in(self, *states: str) -> list["optuna.trial.FrozenTrial"]:
        return self.study.get_trials(deepcopy=False, states=tuple(map(_state, states)))

    def _waiting(self) -> bool:
        return bool(self._in("WAITING"))

    def _made(self) -> int:
        """Runs that were begun, or need not be."""
        return len({trial.user_attrs["run"] for trial in self.study.get_trials(deepcopy=False) if "run" in trial.user_attrs})

    def _twin(self, trial: "optuna.Trial") -> "optuna.trial.FrozenTrial | None":
        return next((other for other in self._in("COMPLETE") if other.params == trial.params), None)


@dataclass
class News:
    """Follows metrics.jsonl: the lines with the figure that were not there before."""

    path: Path
    metric: str | None
    offset: int = 0
    newest: int = -1  # step; a run that goes on from an earlier checkpoint writes some steps again
    asked: bool = False

    def read(self) -> Iterator[tuple[int, str, float]]:
        """(step, name, value)."""
        self.asked = True
        try:
            size = self.path.stat().st_size
            if size == self.offset:
                return
            with self.path.open("rb") as file:
                self.offset = self.offset if self.offset < size else 0
                file.seek(self.offset)
                lines = file.read().splitlines(keepends=True)
        except OSError:
            return
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self.offset += len(line)
            row = json.loads(line)
            found = figure(row, self.metric)
            if found and row["step"] > self.newest and math.isfinite(found[1]):
                self.newest = row["step"]
                yield row["step"], *found


# -- Optuna's objects --------------------------------------------------------------------------------------------------


def _study(folder: Path, words: Optuna) -> "optuna.Study":
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    store = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))
    study = optuna.create_study(storage=store, study_name="sweep", direction=words.direction, load_if_exists=True)
    seed = words.seed + len(study.trials)  # of what is left: the first draws again would be the first proposals again
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(n_startup_trials=words.startup, constant_liar=True, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed),
        "grid": lambda: optuna.samplers.RandomSampler(seed),  # every point is proposed from the start
    }
    pruners: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(words.startup, words.warmup),
        "halving": optuna.pruners.SuccessiveHalvingPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    study.sampler, study.pruner = samplers[words.sampler](), pruners[words.pruner]()
    return study


def _same_search(study: "optuna.Study", sweep: Sweep, node: Mapping[str, Any]) -> None:
    """Figures of one study are of one search: the same space, figure and settings. Raises ConfigError."""
    said = {
        "space": {key: asdict(choices) for key, choices in sweep.space.items()},
        "metric": sweep.words.metric,
        "direction": sweep.words.direction,
        "config": node,
    }
    now = json.loads(json.dumps(said))
    before = study.user_attrs.get("search")
    if before is None:
        study.set_user_attr("search", now)
        return
    changed = [f"hydra.sweeper.{key}" for key in ("metric", "direction") if before[key] != now[key]]
    changed += [key for key in {**before["space"], **now["space"]} if before["space"].get(key) != now["space"].get(key)]
    changed += [] if changed else frozen_changes(before["config"], now["config"])
    changed += ["the length of the runs"] if ends(before["config"]) != ends(now["config"]) else []
    if changed:
        raise ConfigError(
            f"{sweep.folder} is another search ({'; '.join(changed[:3])}): choose another name=, or go back to it"
        )


def _distributions(space: Space) -> dict[str, "optuna.distributions.BaseDistribution"]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for key, choices in space.items():
        if isinstance(choices, Choice):
            found[key] = CategoricalDistribution(choices.values)
        elif choices.whole:
            found[key] = IntDistribution(int(choices.low), int(choices.high), log=choices.log, step=int(choices.step or 1))
        else:
            found[key] = FloatDistribution(choices.low, choices.high, log=choices.log, step=choices.step)
    return found


def _state(name: str) -> "optuna.trial.TrialState":
    from optuna.trial import TrialState

    return TrialState[name]


def _short(params: Mapping[str, Any]) -> dict[str, str]:
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in params.items()}
