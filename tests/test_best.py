"""Figures of samples while training, the best checkpoint, and the end of a run that gets no better; all of it resumes."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_resume import assert_equal
from tiny import compose, figures, hashes, stopped, train, words

from diffusion_cli import checkpoint, config
from diffusion_cli.best import Best
from diffusion_cli.errors import ConfigError, Stopped
from diffusion_cli.evaluation import watch
from diffusion_cli.evaluation.run import evaluate
from diffusion_cli.finding import find
from diffusion_cli.objectives import Objective
from diffusion_cli.runs import status_of
from diffusion_cli.trainer import Trainer

METRICS = ("trainer.metrics=[kid]", "features=raw", "trainer.metrics_n=12")
KID = "evaluate/raw_kid_12"
X0 = "evaluate/x0_mse"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def named(run: Path, tag: str) -> dict[int, float]:
    return {int(row["step"]): row[tag] for row in figures(run) if tag in row}


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in reversed(checkpoint.folders(run / "checkpoints"))]


# -- the rule ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-5, 5), max_size=12), st.sampled_from(["evaluate/x0_mse", "evaluate/raw_recall_9"]))
def test_the_best_is_the_first_of_the_best(values: list[int], figure: str) -> None:
    best, sign = Best(figure), -1 if "recall" in figure else 1
    for step, value in enumerate(values):
        assert best.hear(step, {figure: float(value)}) == (best.step == step)
        assert not best.hear(step, {"evaluate/other": -99.0}), "what is not there is not heard"
    if values:
        first = min(range(len(values)), key=lambda k: sign * values[k])
        assert (best.step, best.value, best.worse) == (first, values[first], len(values) - 1 - first)
    assert Best.of_state(figure, {"best": best.state()}) == best
    assert Best.of_state("evaluate/else", {"best": best.state()}) == Best("evaluate/else")
    assert Best.of_state(figure, {}) == Best(figure)


def test_no_number_is_never_the_best() -> None:
    best = Best(X0)
    assert not best.hear(1, {X0: float("nan")}) and best.step is None and best.worse == 1
    assert best.hear(2, {X0: 3.0}) and not best.hear(3, {X0: float("nan")}) and not best.given_up(2)
    assert not best.hear(4, {X0: float("inf")}) and best.given_up(2) and not best.given_up(None)


# -- figures on a cadence ----------------------------------------------------------------------------------------------


def test_samples_are_measured_on_their_cadence_as_afterwards(tmp_path: Path) -> None:
    """And at the end; diffusion-evaluate finds the same figure of the same checkpoint."""
    run = train(tmp_path, *METRICS, "trainer.metrics_every=3", "trainer.steps=4", "dataset.labels=true")
    found = named(run, KID)
    assert list(found) == [3, 4]
    asked = (f"ckpt={run}", "metrics=[kid]", "features=raw", "n=12", "batch=8", "device=cpu")
    path = evaluate(config.check_evaluate(compose(*asked, primary="evaluate")))
    assert json.loads(path.read_text())["figures"]["raw_kid_12"]["value"] == pytest.approx(found[4], rel=1e-3)
    assert status_of(run)["figures"][KID] == found[4]


def test_measuring_changes_nothing_of_the_training(tmp_path: Path) -> None:
    one = train(tmp_path, *METRICS, "trainer.metrics_every=1", "trainer.best=evaluate/raw_kid_12", name="one")
    assert hashes(one) == hashes(train(tmp_path, name="two"))


# -- the best checkpoint -----------------------------------------------------------------------------------------------


def dictated(monkeypatch: pytest.MonkeyPatch, values: Mapping[int, float]) -> None:
    """Lets an evaluation at a step find that x0_mse."""
    original = Trainer.evaluate

    def evaluate(self: Trainer, average: Objective) -> dict[str, float]:
        return original(self, average) | {X0: values[self.progress.step]}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


EACH = ("trainer.evaluate_every=1", "trainer.best=evaluate/x0_mse", "trainer.save_every=0", "trainer.keep=2")


def test_the_best_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved where it was found, spared by tidying, found by its name, replaced by a better one."""
    dictated(monkeypatch, {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: 6.0, 6: 6.0, 7: 1.0, 8: 2.0})
    run = train(tmp_path, *EACH, "trainer.save_every=1", "trainer.steps=6")
    assert steps(run) == [2, 5, 6] and find(run / "checkpoints" / "best").step == 2 and find(run).step == 6
    assert json.loads((run / "checkpoints" / "best.json").read_text()) == {"figure": X0, "step": 2, "value": 3.0, "worse": 4}
    train(tmp_path, *EACH, "trainer.save_every=1", "trainer.steps=8")
    assert steps(run) == [7, 8] and find(run / "checkpoints" / "best").step == 7


def test_the_best_is_saved_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dictated(monkeypatch, {1: 5.0, 2: 5.0, 3: 4.0, 4: 6.0, 5: 6.0})
    assert steps(train(tmp_path, *EACH, "trainer.keep=3", "trainer.steps=5")) == [1, 3, 5]


def test_a_run_without_a_best_checkpoint_says_so(tmp_path: Path) -> None:
    run = train(tmp_path)
    with pytest.raises(ConfigError, match=r"kept no best checkpoint; trainer.best=evaluate/x0_mse does"):
        find(run / "checkpoints" / "best")


def test_another_figure_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dictated(monkeypatch, dict.fromkeys(range(9), 5.0))
    run = train(tmp_path, *EACH, "trainer.steps=2")
    assert find(run / "checkpoints" / "best").step == 1
    train(tmp_path, *EACH, *METRICS, "trainer.metrics_every=4", f"trainer.best={KID}", "trainer.steps=5")
    kept = json.loads((run / "checkpoints" / "best.json").read_text())
    assert kept["figure"] == KID and kept["step"] in (4, 5) and kept["value"] == min(named(run, KID).values())


# -- a run that gets no better -----------------------------------------------------------------------------------------


def test_a_run_that_gets_no_better_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 6.0, 7: 6.0, 8: 6.0, 9: 6.0}
    dictated(monkeypatch, values)
    run = train(tmp_path, *EACH, "trainer.patience=3", "trainer.steps=9")
    line = "stopped at step 8: evaluate/x0_mse was no better than 2 of step 5 in 3 evaluations"
    status = status_of(run)
    assert status["state"] == "finished" and status["step"] == 8 and status["reason"] == line
    assert (line in capsys.readouterr().out and steps(run) == [5, 7, 8]) or steps(run) == [5, 8]
    train(tmp_path, *EACH, "trainer.patience=3", "trainer.steps=9")
    assert "is finished at step 8: a larger trainer.patience= goes on" in capsys.readouterr().out
    train(tmp_path, *EACH, "trainer.patience=4", "trainer.steps=9")
    assert status_of(run)["step"] == 9


# -- resuming ----------------------------------------------------------------------------------------------------------

WHOLE = (
    *METRICS, "trainer.metrics_every=2", f"trainer.best={KID}", "trainer.steps=9", "trainer.save_every=0",
    "trainer.evaluate_every=3", "trainer.keep=9",
)  # fmt: skip


def states(run: Path) -> dict[str, Any]:
    found = checkpoint.load(checkpoint.folders(run / "checkpoints")[0]).state
    return {key: found[key] for key in ("best", "owed", "step")}


@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_run_remembers_its_best(at: int, tmp_path: Path) -> None:
    whole = train(tmp_path, *WHOLE, name="whole")
    stopped(tmp_path, at, *WHOLE, name="parts")
    parts = train(tmp_path, *WHOLE, name="parts")
    assert_equal(parts, whole)
    assert states(parts) == states(whole)
    assert (parts / "checkpoints" / "best.json").read_bytes() == (whole / "checkpoints" / "best.json").read_bytes()
    assert find(parts / "checkpoints" / "best").step == states(whole)["best"]["step"]


@pytest.mark.parametrize("at", [4, 9])
def test_a_signal_while_samples_are_made_costs_nothing(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are saved at once; the figure is owed, and found when the run goes on: also that of the last step."""
    whole = train(tmp_path, *WHOLE, name="whole")
    original, seen = watch.rows_of_samples, []

    def stopping(samples: Any, look: Any, ids: Any) -> Any:
        seen.append(int(ids[0]))
        if len(seen) == 2 * ((at + 1) // 2) - 1:  # two batches each time: the first of that step's
            signal.raise_signal(signal.SIGTERM)
        return original(samples, look, ids)

    monkeypatch.setattr(watch, "rows_of_samples", stopping)
    with pytest.raises(Stopped, match=f"at step {at}, saved"):
        train(tmp_path, *WHOLE, name="parts")
    assert states(tmp_path / "parts")["owed"] and at not in named(tmp_path / "parts", KID)
    parts = train(tmp_path, *WHOLE, name="parts")
    assert figures(parts) == figures(whole) and hashes(parts) == hashes(whole)
    assert (parts / "checkpoints" / "best.json").read_bytes() == (whole / "checkpoints" / "best.json").read_bytes()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "said"), [
    (("trainer.metrics=[kid]",), "trainer.metrics=kid: compared in which features"),
    (("trainer.metrics=[kidd]", "features=raw"), "trainer.metrics is"),
    (("trainer.metrics=[inception_score]", "features=raw"), "gives no classes"),
    (("trainer.patience=3",), "without a better what"),
    (("trainer.best=x0_mse",), "trainer.best is x0_mse: it must be the name of a figure"),
    (("trainer.best=evaluate/x0_msee",), "this run has evaluate/x0_mse"),
    ((*METRICS, "trainer.best=evaluate/raw_kid_13"), "this run has evaluate/x0_mse, evaluate/raw_kid_12"),
    ((*METRICS, "objective=classifying", "model=classifier", "dataset.labels=true"), "this objective makes none"),
    ((*METRICS, "trainer.metrics=[class_accuracy]", "features=inception", "features.path=none"), "weights are not at none"),
])  # fmt: skip
def test_mistakes_are_said_before_a_step(given: tuple[str, ...], said: str, tmp_path: Path) -> None:
    line = words(tmp_path, *given)
    line = [word for word in line if not word.startswith("model.")] if "model=classifier" in given else line
    with pytest.raises(ConfigError, match=said) as caught:
        from diffusion_cli.training import train

        train(config.check_train(compose(*line)))
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("run/checkpoints/step*"))
