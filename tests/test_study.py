"""What a study and its jobs tell each other, with jobs that only write figures."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import compose

pytest.importorskip("optuna")

from diffusion_cli.errors import ConfigError
from diffusion_cli.status import write_status
from diffusion_cli.sweeps.jobs import Job
from diffusion_cli.sweeps.pool import Ended
from diffusion_cli.sweeps.settings import Optuna
from diffusion_cli.sweeps.space import Choice, Interval, Space
from diffusion_cli.sweeps.study import News, Trials, _same_search, _study

LR: Space = {"lr": Interval(1e-5, 1e-1, log=True)}
TRAINER = compose("trainer.steps=100", "trainer.evaluate_every=10")["trainer"]


class FakeSweep:
    """The part of a Sweep that trials ask."""

    def __init__(self, folder: Path, space: Space, words: Optuna):
        self.folder, self.space, self.words, self.entered = folder, space, words, list[str]()

    def job(self, number: int, values: dict[str, str], label: str) -> Job:
        if values.get("model") == "impossible":
            raise ConfigError(f"{label}: no such pair")
        node = {"outputs": str(self.folder), "name": label, "trainer": TRAINER}
        return Job(number, values, tuple(values), node)

    def enter(self, jobs: list[Job]) -> None:
        self.entered += [job.folder.name for job in jobs]


def trials(folder: Path, space: Space = LR, total: int = 6, **changed: Any) -> Trials:
    """As a fresh launch opens them."""
    said = {
        "params": {}, "cases": {},
        "metric": None, "direction": "minimize", "trials": total, "seed": 0, "sampler": "tpe", "pruner": "median",
        "startup": 2, "warmup": 0, "batch": 1,
    }  # fmt: skip
    words = Optuna(**{**said, **changed})
    return Trials(_study(folder, words), FakeSweep(folder, space, words), words, total)  # type: ignore[arg-type]


def finish(found: Trials, job: Job, value: float, name: str = "evaluate/x0_mse") -> None:
    write_status(_made(job.folder), "finished", 100, figures={name: value})
    found.ended(Ended(job, "finished", "", 1.0))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def write(job: Job, *rows: tuple[int, float]) -> None:
    with (_made(job.folder) / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "evaluate/x0_mse": value}) + "\n" for step, value in rows)


def error(job: Job) -> float:
    """A bowl with its bottom at lr = 1e-3."""
    return (math.log10(float(job.values["lr"])) + 3) ** 2


def test_a_search_finds_the_bottom_and_ends(tmp_path: Path) -> None:
    found = trials(tmp_path, total=30, startup=10)
    jobs = []
    for job in found.jobs():
        jobs.append(job)
        finish(found, job, error(job))
    assert len(jobs) == 30 and [job.number for job in jobs] == list(range(30))
    assert min(map(error, jobs)) < 0.01 and len({job.folder for job in jobs}) == 30
    assert sum(map(error, jobs[20:])) < 0.5 * sum(map(error, jobs[:10])), "what was drawn at random, and what was sought"
    assert list(trials(tmp_path, total=30).jobs()) == [], "the same command has nothing to do"
    assert len(list(_finished(trials(tmp_path, total=32)))) == 2, "a longer one the rest"


def _finished(found: Trials) -> Iterator[Job]:
    for job in found.jobs():
        yield job
        finish(found, job, 1.0)


def test_what_was_cut_short_goes_on_under_its_name(tmp_path: Path) -> None:
    first = trials(tmp_path, total=4)
    asked = first.jobs()
    one, two, three = next(asked), next(asked), next(asked)
    finish(first, one, 1.0)
    first.ended(Ended(two, "preempted", "stopped", 1.0))  # and of the third the sweep never heard again
    again = trials(tmp_path, total=4)
    jobs = list(_finished(again))
    assert [(job.folder, job.values) for job in jobs[:2]] == [(job.folder, job.values) for job in (two, three)]
    assert len(jobs) == 3 and jobs[2].number == 3 and jobs[2].values not in [job.values for job in (one, two, three)]
    assert list(trials(tmp_path, total=4).jobs()) == []


def test_a_second_launch_does_not_draw_the_first_one_s_values(tmp_path: Path) -> None:
    drawn = [job.values["lr"] for total in (3, 6) for job in _finished(trials(tmp_path, total=total, sampler="random"))]
    assert len(drawn) == len(set(drawn)) == 6


def test_a_failed_trial_counts_as_made(tmp_path: Path) -> None:
    found = trials(tmp_path, total=3)
    for job in found.jobs():
        found.ended(Ended(job, "failed", "no", 1.0))
    assert [trial.state.name for trial in found.study.trials] == ["FAIL"] * 3 and list(trials(tmp_path, total=3).jobs()) == []


def test_figures_that_are_none_and_pairs_that_cannot_be(tmp_path: Path) -> None:
    found = trials(tmp_path, {"model": Choice(("impossible", "good"))}, total=8, sampler="random")
    values = [job.values["model"] for job in _nan_first(found)]
    assert set(values) == {"good"} and {trial.state.name for trial in found.study.trials} == {"FAIL", "COMPLETE"}


def _nan_first(found: Trials) -> Iterator[Job]:
    for i, job in enumerate(found.jobs()):
        yield job
        finish(found, job, math.nan if i == 0 else 2.0)


def test_the_same_values_are_not_trained_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = trials(tmp_path, {"model": Choice(("a", "b"))}, total=8, sampler="random")
    assert sorted(job.values["model"] for job in _finished(found)) == ["a", "b"]
    assert capsys.readouterr().out.count("whose figure is taken") == 6 and len(found.study.trials) == 8


def test_a_grid_is_every_point_in_its_order(tmp_path: Path) -> None:
    found = trials(tmp_path, {"model": Choice(("a", "b")), "n": Choice(("1", "2"))}, total=4, sampler="grid")
    for model, n in ("a1", "a2", "b1", "b2"):
        found.study.enqueue_trial({"model": model, "n": n})
    assert ["".join(job.values.values()) for job in _finished(found)] == ["a1", "a2", "b1", "b2"]


def test_the_misnamed_figure_ends_the_search(tmp_path: Path) -> None:
    found = trials(tmp_path, metric="evaluate/x0_msee")
    job = next(found.jobs())
    with pytest.raises(ConfigError, match=r"evaluate/x0_msee: the runs do not report it; did you mean evaluate/x0_mse\?"):
        finish(found, job, 1.0)
    again = next(trials(tmp_path, metric="evaluate/x0_mse").jobs())
    assert again.folder == job.folder, "its run is not lost"


# -- pruning -----------------------------------------------------------------------------------------------------------


def three_done(tmp_path: Path, **changed: Any) -> tuple[Trials, Job]:
    """Three runs at 0.5, 0.4, 0.3 after 10 and 20 steps, and a fourth that has begun."""
    found = trials(tmp_path, startup=3, **changed)
    asked = found.jobs()
    for value in (0.5, 0.4, 0.3):
        job = next(asked)
        found.watch(job)
        write(job, (10, value), (20, value), (100, value))
        found.watch(job)
        finish(found, job, value)
    job = next(asked)
    assert found.watch(job) == "", "nothing is known yet"
    return found, job


def test_what_falls_behind_the_median_is_pruned(tmp_path: Path) -> None:
    found, job = three_done(tmp_path)
    write(job, (5, 0.9))
    assert found.watch(job) == "", "nothing to compare with"
    write(job, (10, 0.41))
    assert found.watch(job) == "evaluate/x0_mse 0.41 at step 10 falls behind the other runs (median)"
    found.ended(Ended(job, "pruned", "behind", 1.0))
    assert found.study.trials[-1].state.name == "PRUNED" and found.study.trials[-1].intermediate_values == {5: 0.9, 10: 0.41}


def test_what_is_better_than_the_median_goes_on(tmp_path: Path) -> None:
    found, job = three_done(tmp_path)
    write(job, (10, 0.39))
    assert found.watch(job) == ""


@pytest.mark.parametrize(
    ("changed", "value"),
    [({"direction": "maximize"}, 0.9), ({"warmup": 15}, 0.9), ({"pruner": "none"}, 0.9), ({"startup": 9}, 0.9), ({}, math.nan)],
    ids=["maximize", "warmup", "none", "startup", "nan"],
)
def test_what_is_not_pruned(changed: dict[str, Any], value: float, tmp_path: Path) -> None:
    found, job = three_done(tmp_path, **{key: v for key, v in changed.items() if key != "startup"})
    if "startup" in changed:
        found = trials(tmp_path, startup=9)
        job = next(found.jobs())
        found.watch(job)
    write(job, (10, value))
    assert found.watch(job) == ""


def test_the_last_evaluation_prunes_nothing(tmp_path: Path) -> None:
    found, job = three_done(tmp_path)
    write(job, (100, 0.9))
    assert found.watch(job) == "", "the run is over anyway"


def test_old_figures_of_a_run_that_goes_on_are_told_but_prune_nothing(tmp_path: Path) -> None:
    found, job = three_done(tmp_path)
    write(job, (10, 0.9))
    found.ended(Ended(job, "preempted", "stopped", 1.0))
    again = trials(tmp_path, startup=3)
    same = next(again.jobs())
    assert same.folder == job.folder and again.watch(same) == ""
    assert again.live[same.folder.name]._cached_frozen_trial.intermediate_values == {10: 0.9}
    write(same, (20, 0.9))
    assert "at step 20 falls behind" in again.watch(same)


# -- following a file --------------------------------------------------------------------------------------------------


def test_news_are_whole_new_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    news = News(path, "a")
    read = lambda: [(step, value) for step, _, value in news.read()]  # noqa: E731
    assert read() == []
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 1, "b": 9.0}\n{"step": 2, "a"')
    assert read() == [(1, 1.0)]
    with path.open("a") as file:
        file.write(': 2.0}\n{"step": 3, "a": NaN}\n')
    assert read() == [(2, 2.0)] and read() == []
    path.write_text('{"step": 1, "a": 1.0}\n')  # the run goes on from step 1
    assert read() == []
    with path.open("a") as file:
        file.write('{"step": 2, "a": 2.5}\n{"step": 3, "a": 3.0}\n')
    assert read() == [(3, 3.0)], "step 2 was told"


# -- one study, one search ---------------------------------------------------------------------------------------------


def test_another_search_is_refused(tmp_path: Path) -> None:
    node = {"seed": 1, "name": "000", "trainer": TRAINER}
    words = trials(tmp_path).words
    study = _study(tmp_path, words)
    sweep = lambda space=LR, metric=None: SimpleNamespace(  # noqa: E731
        space=space, words=SimpleNamespace(metric=metric, direction="minimize"), folder=tmp_path
    )
    _same_search(study, sweep(), node)
    _same_search(_study(tmp_path, words), sweep(), {**node, "name": "007"})
    for changed, said in (
        ((sweep({"lr": Interval(1, 2)}), node), "lr"),
        ((sweep(metric="train/loss"), node), "hydra.sweeper.metric"),
        ((sweep(), {**node, "seed": 2}), "seed: 1 in the run, 2 now"),
        ((sweep(), {**node, "trainer": {**TRAINER, "steps": 9}}), "the length of the runs"),
    ):
        with pytest.raises(ConfigError, match=f"is another search .{said}"):
            _same_search(_study(tmp_path, words), *changed)
