"""A resumed run equals the uninterrupted one to the bit, however and wherever it was interrupted."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_storage import KILLED, Fault
from tiny import after_step, figures, hashes, in_child, stopped, train, words

from diffusion_cli import checkpoint, config, devices, storage, training
from diffusion_cli.errors import StorageError
from diffusion_cli.runs import status_of
from diffusion_cli.trainer import Trainer

TRAIN = str(Path(sys.executable).with_name("diffusion-train"))
EPOCH = 5  # 40 pictures in batches of 8
LAST = 12
BASE = (
    f"trainer.steps={LAST}",
    "trainer.report_every=2",
    "trainer.save_every=0",
    "trainer.evaluate_every=4",
    "trainer.preview_every=6",
)
CELLS = {
    "plain": (),
    "accumulate": ("trainer.accumulate=2", "model.dropout=0.2"),
    "no average": ("ema=none", "model.dropout=0.2"),
    "all at once": ("trainer.accumulate=2", "model.dropout=0.2", "dataset.flip=true", "dataset.labels=true",
    "objective.label_dropout=0.5",
                    "ema=decay", "optimizer/decay=cosine", "optimizer.warmup=4", "optimizer=adamw"),
    "self-conditioned": ("objective.self_conditioning=0.5", "model.dropout=0.2", "dataset.labels=true"),
    "importance": ("loss=importance", "loss.times.buckets=4", "loss.times.memory=2", "model.dropout=0.2"),
    "learned": ("loss=learned", "schedule=edm", "prediction=edm", "dataset.flip=true"),
    "doubled": ("trainer.batch_doublings=[20,60]", "trainer.accumulate=2", "dataset.flip=true", "model.dropout=0.2"),
    "power": ("ema=power", "ema.every=2"),
    "augmented": ("objective/augment=edm", "objective.augment.p=0.5", "objective.self_conditioning=0.5"),
    "terms": ("objective/term=dispersive", "trainer.accumulate=2", "loss=importance", "loss.times.buckets=4"),
    "hybrid": ("objective/term=hybrid", "loss=ddpm", "schedule=ddpm", "prediction=eps", "sampler=ddpm",
               "sampler.variance=learned", "trainer.accumulate=2", "model.dropout=0.2"),
    "coupled": ("objective/coupling=optimal", "dataset.labels=true", "trainer.accumulate=2"),
    "muon": ("optimizer=muon", "dataset.labels=true", "trainer.accumulate=2"),
    "streamed": ("dataset.memory=0", "dataset.workers=0", "dataset.flip=true", "model.dropout=0.2"),
}  # fmt: skip


OTHERS = (*(f"model.{key}=DEFAULT" for key in ("width", "groups", "multipliers")), "trainer.evaluate_every=0")
GRID = CELLS | {
    "bf16": ("precision=bf16", "trainer.accumulate=2", "model.dropout=0.2", "dataset.labels=true"),
    "workers": ("dataset.memory=0", "dataset.workers=0", "dataset.flip=true", "trainer.accumulate=2", "ema=decay"),
    "codebook": ("objective=autoencoding", "model=autoencoder_vq", "model.codes=16", "dataset.flip=true", *OTHERS),
    "classifying": ("objective=classifying", "model=classifier", "model.attention_levels=[]", "model.head_width=8",
                    "dataset.labels=true", "dataset.flip=true"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """The uninterrupted run of a cell, trained once."""
    folder = tmp_path_factory.mktemp("whole")
    return cache(lambda cell: train(folder, *BASE, *GRID[cell], name=re.sub(r"\W", "_", cell)))


def assert_equal(resumed: Path, uninterrupted: Path) -> None:
    """Weights, average, optimizer and the trainer's sums by SHA-256; every figure but the speed."""
    assert hashes(resumed) == hashes(uninterrupted)
    assert figures(resumed) == figures(uninterrupted)
    one, two = (checkpoint.load(checkpoint.folders(run / "checkpoints")[0]).state for run in (resumed, uninterrupted))
    assert {**one, "seconds": 0, "reported": one["reported"][0]} == {**two, "seconds": 0, "reported": two["reported"][0]}
    assert status_of(resumed)["state"] == "finished"


@pytest.mark.parametrize("cell", CELLS)
def test_resumed_equals_uninterrupted(cell: str, whole, tmp_path: Path) -> None:
    """Stopped after the first step, mid-epoch, at the epoch's edge, within the second and before the last."""
    for stop in (1, 3, EPOCH, EPOCH + 2, LAST - 1):
        stopped(tmp_path, stop, *BASE, *CELLS[cell])
    assert_equal(train(tmp_path, *BASE, *CELLS[cell]), whole(cell))


@pytest.mark.parametrize("stop", [1, 3, EPOCH, LAST - 1])
def test_each_stop_alone(stop: int, whole, tmp_path: Path) -> None:
    stopped(tmp_path, stop, *BASE, *CELLS["all at once"])
    assert_equal(train(tmp_path, *BASE, *CELLS["all at once"]), whole("all at once"))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3, EPOCH, LAST - 1])
@pytest.mark.parametrize("cell", GRID)
def test_grid(cell: str, stop: int, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step, within an epoch, at its edge, before the last step; streamed pictures go on with other workers."""
    monkeypatch.setattr(devices, "_cpu_has_bf16", lambda: True)
    words = (*BASE, *GRID[cell])
    stopped(tmp_path, stop, *words)
    assert_equal(train(tmp_path, *words, *(["dataset.workers=2"] if cell == "workers" else [])), whole(cell))


def test_a_killed_data_worker_changes_nothing(whole, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Killed in the midst of training, where only a wait for pictures may hear of it."""

    def kill() -> None:
        (child,) = multiprocessing.active_children()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    with after_step(5, kill):
        run = train(tmp_path, *BASE, *CELLS["streamed"], "dataset.workers=1")
    assert_equal(run, whole("streamed"))
    assert capfd.readouterr().err.count("another goes on in its place") == 1


def test_the_comparison_can_fail(whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed, and a resumed run whose counter was tampered with, differ in every file of tensors."""
    other = train(tmp_path, *BASE, "seed=1", name="other")
    assert all(hashes(other)[name] != hashes(whole("plain"))[name] for name in ("weights.safetensors", "average.safetensors"))
    stopped(tmp_path, 3, *BASE)
    restore = Trainer.restore

    def tampered(self: Trainer, start: checkpoint.Checkpoint) -> None:
        restore(self, start)
        self.progress.step += 1

    monkeypatch.setattr(Trainer, "restore", tampered)
    train(tmp_path, *BASE)
    for name in ("weights.safetensors", "average.safetensors", "optimizer.safetensors"):
        assert hashes(tmp_path / "run")[name] != hashes(whole("plain"))[name]


@pytest.mark.parametrize("forgotten", ["optimizer", "average", "trainer"])
def test_every_file_of_a_checkpoint_is_needed(forgotten: str, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget one file's tensors when resuming, and the end is another: each is really restored and really compared."""
    stopped(tmp_path, 3, *BASE)
    tensors = checkpoint.Checkpoint.tensors

    def forget(self: checkpoint.Checkpoint, name: str) -> object:
        found = tensors(self, "weights" if name == forgotten == "average" else name)
        return {} if name == forgotten != "average" else found

    monkeypatch.setattr(checkpoint.Checkpoint, "tensors", forget)
    train(tmp_path, *BASE)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_equal(tmp_path / "run", whole("plain"))


def test_a_longer_run_is_the_same_run(whole, tmp_path: Path) -> None:
    """Finished at 6 and told to go on to 12: the same weights as 12 in one go."""
    train(tmp_path, *BASE, "trainer.steps=6")
    assert hashes(train(tmp_path, *BASE)) == hashes(whole("plain"))


def test_a_damaged_newest_checkpoint_costs_only_time(whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(tmp_path, 3, *BASE)
    stopped(tmp_path, 7, *BASE)
    (tmp_path / "run" / "checkpoints" / "step_00000007" / "average.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert_equal(train(tmp_path, *BASE), whole("plain"))
    said = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in said and "step_00000007" in said and "going on from step 3" in said


def test_no_good_checkpoint_is_not_a_new_start(tmp_path: Path) -> None:
    """Hours of training are not silently begun anew."""
    stopped(tmp_path, 3, *BASE)
    (tmp_path / "run" / "checkpoints" / "step_00000003" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match=r"no checkpoint of .* is whole"):
        train(tmp_path, *BASE)


def test_torn_and_surplus_lines_of_metrics_are_mended(whole, tmp_path: Path) -> None:
    stopped(tmp_path, 4, *BASE)
    path = tmp_path / "run" / "metrics.jsonl"
    surplus = json.dumps({"step": 6, "train/loss": 99.0})
    path.write_text(path.read_text() + surplus + "\n" + '{"step": 8, "train/lo')
    assert_equal(train(tmp_path, *BASE), whole("plain"))


def tensorboard(run: Path) -> dict[str, list[int]]:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    found = {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    return found | {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}


def assert_nothing_twice(run: Path) -> None:
    found = tensorboard(run)
    assert "train/loss" in found and "preview/samples" in found
    for tag, steps in found.items():
        assert steps == sorted(set(steps)), f"{tag}: {steps}"
    rows = [row["step"] for row in figures(run) if "train/loss" in row]
    assert rows == sorted(set(rows)) == found["train/loss"]


@pytest.mark.parametrize("save_every", [4, 0], ids=["after a checkpoint", "before the first"])
def test_figures_beyond_the_checkpoint_are_dropped(save_every: int, tmp_path: Path) -> None:
    """Written, on the disk, and made again by the next attempt: once in the lines and once in TensorBoard."""

    def fail() -> None:
        raise RuntimeError("a bug")

    more = (*BASE, f"trainer.save_every={save_every}", "trainer.preview_every=2")
    with after_step(7, fail), pytest.raises(RuntimeError):
        train(tmp_path, *more)
    assert tensorboard(tmp_path / "run")["train/loss"] == [2, 4, 6]
    time.sleep(1.1)  # TensorBoard orders its files by the second in which they were begun
    run = train(tmp_path, *more)
    assert_nothing_twice(run)
    assert tensorboard(run)["train/loss"] == [2, 4, 6, 8, 10, 12]


def test_the_row_of_a_run_is_there_once(tmp_path: Path) -> None:
    """Interrupted after TensorBoard's row of final figures and before "finished" was noted; made again; and a longer run's."""

    def end(run: Path, objective: object) -> None:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(training, "_draw_history", end)
        train(tmp_path, *BASE, "trainer.steps=6")
    assert tensorboard(tmp_path / "run")["final/train/loss"] == [6]
    train(tmp_path, *BASE, "trainer.steps=6")
    assert tensorboard(tmp_path / "run")["final/train/loss"] == [6]
    train(tmp_path, *BASE)
    assert tensorboard(tmp_path / "run")["final/train/loss"] == [12]


def slow(run: Path) -> None:
    """Trains with a pause in every step and every operation, so that a kill hits anything."""
    original = Trainer.step

    def step(self: Trainer, batch: object) -> None:
        original(self, batch)
        time.sleep(0.02)

    Trainer.step = step  # type: ignore[method-assign]
    storage.watch = lambda operation, path: time.sleep(0.001)
    train(run, *BASE, *CELLS["accumulate"], "trainer.save_every=2", "trainer.keep=3")


def test_kills_at_random_times(whole, tmp_path: Path) -> None:
    """kill -9, again and again; each attempt is given a little longer, so that some end before their first checkpoint."""
    rng, kills = random.Random(7), 0
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            try:
                slow(tmp_path)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.3, 0.6) + 0.15 * attempt)
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        time.sleep(0.6)  # TensorBoard orders its files by the second in which they were begun
    run = train(tmp_path, *BASE, *CELLS["accumulate"], "trainer.save_every=2", "trainer.keep=3")
    assert kills >= 3
    assert_equal(run, whole("accumulate"))
    assert_nothing_twice(run)
    assert not [p for p in run.rglob(".*") if p.name != ".lock"], "no temporary file is left"


SHORT = ("trainer.steps=6", "trainer.report_every=1", "trainer.save_every=2", "trainer.keep=1", "trainer.evaluate_every=0",
         "trainer.preview_every=3", "trainer.best=evaluate/x0_mse", "trainer.evaluate_every=2")  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that does everything once or more, and the number of its operations."""
    counter = Fault(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "watch", counter)
        run = train(tmp_path_factory.mktemp("short"), *SHORT)
    assert counter.seen >= 100
    return run, counter.seen


def struck(outputs: Path, k: int, error: int | None, lasting: bool) -> None:
    """The short run, killed at operation number k, or told there that it failed: then what was saved is whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "watch", Fault(k, error, lasting))
        if error is None:
            assert in_child(lambda: train(outputs, *SHORT)) == KILLED
        else:
            with pytest.raises(StorageError) as caught:
                train(outputs, *SHORT)
            message = str(caught.value)
            assert len(message.splitlines()) == 1 and os.strerror(error) in message and str(outputs.parent) in message
            assert (" MB needed, " in message) == (error in (errno.ENOSPC, errno.EDQUOT))
    found = list(checkpoint.good(outputs / "run" / "checkpoints"))
    assert all(isinstance(one, checkpoint.Checkpoint) for one in found)
    steps = [one.step for one in found]  # type: ignore[union-attr]
    rows = [row["step"] for row in figures(outputs / "run")] if (outputs / "run" / "metrics.jsonl").exists() else [0]
    assert max(steps, default=0) >= (max(rows, default=0) - 1) // 2 * 2, "what was reported two steps ago is saved"


def ends_as(run: Path, clean: Path) -> None:
    assert hashes(run) == hashes(clean)
    assert figures(run) == figures(clean)
    status = status_of(run)
    assert (status["state"], status["figures"].keys()) == ("finished", status_of(clean)["figures"].keys())
    assert (run / "loss.png").exists() and (run / "growth.gif").exists()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(p.name for p in (clean / "checkpoints").iterdir())


FAULTS = [(None, False), *((error, lasting) for error in (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT)
                           for lasting in (False, True))]  # fmt: skip


def named(fault: tuple[int | None, bool]) -> str:
    return "killed" if fault[0] is None else f"{errno.errorcode[fault[0]]}{' lasting' * fault[1]}"


@pytest.mark.parametrize("fault", FAULTS[:3], ids=named)
def test_stopped_at_some_operations_of_a_run(fault: tuple[int | None, bool], short: tuple[Path, int], tmp_path: Path) -> None:
    for k in range(FAULTS.index(fault) * 10 + 7, short[1] + 1, 31):
        struck(tmp_path / f"{k}", k, *fault)
        ends_as(train(tmp_path / f"{k}", *SHORT), short[0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", FAULTS, ids=named)
def test_stopped_at_every_operation_of_a_run(fault: tuple[int | None, bool], short: tuple[Path, int], tmp_path: Path) -> None:
    for k in range(1, short[1] + 1):
        struck(tmp_path / f"{k}", k, *fault)
        ends_as(train(tmp_path / f"{k}", *SHORT), short[0])
        shutil.rmtree(tmp_path / f"{k}")
    print(f"{named(fault)}: {short[1]} of {short[1]} operations")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_and_killed_again_on_the_way_back(short: tuple[Path, int], tmp_path: Path) -> None:
    """Chains of up to five kills, each at a random operation of what the one before left."""
    rng, kills = random.Random(3), 0
    for chain in range(20):
        outputs = tmp_path / f"{chain}"
        for _ in range(5):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(storage, "watch", Fault(rng.randrange(1, 60)))
                kills += in_child(lambda: train(outputs, *SHORT)) == KILLED  # noqa: B023
        ends_as(train(outputs, *SHORT), short[0])
    assert kills > 40
    print(f"{kills} kills in 20 chains")


def launch(tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    command = [TRAIN, *words(tmp_path, *BASE, *CELLS["accumulate"], *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)


def at_step(process: subprocess.Popen[str], step: int) -> None:
    """Waits for the line of that step."""
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(rf"step +{step} ", line):
            return
    pytest.fail(f"no line of step {step}: {process.communicate()}")


def test_the_installed_command_is_stopped_by_signals_and_goes_on(tmp_path: Path) -> None:
    """SIGTERM, SIGINT, SIGKILL to real processes in turn, then to the end: equal to the uninterrupted run."""
    often = ("trainer.report_every=20", "trainer.save_every=40", "trainer.evaluate_every=0", "trainer.preview_every=0")
    long = ("trainer.steps=240", *often)
    run, reached = tmp_path / "run", 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = launch(tmp_path, *long)
        at_step(process, reached // 20 * 20 + 40)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        assert "Traceback" not in err
        if number == signal.SIGKILL:
            break
        (line,) = [line for line in err.splitlines() if line.startswith("diffusion-train: ")]
        found = re.fullmatch(
            rf"diffusion-train: stopped by {signal.Signals(number).name} at step (\d+), saved: the same command goes on", line
        )
        assert found, line
        assert (status_of(run)["state"], status_of(run)["code"]) == ("preempted", code)
        assert int(found[1]) > reached
        reached = int(found[1])
        assert hashes(run)["step"] == f"step_{reached:08d}"
    assert reached < 240
    time.sleep(1.1)  # TensorBoard orders its files by the second in which they begin; a command takes longer to start
    train(tmp_path, *BASE, *CELLS["accumulate"], *long)
    clean = train(tmp_path, *BASE, *CELLS["accumulate"], *long, name="clean")
    assert_equal(run, clean)
    assert_nothing_twice(run)


@pytest.mark.slow
def test_a_chain_of_real_kills(tmp_path: Path) -> None:
    """kill -9 of the installed command at random times, ten times."""
    long = (
        "trainer.steps=600",
        "trainer.report_every=20",
        "trainer.save_every=20",
        "trainer.evaluate_every=0",
        "trainer.preview_every=100",
    )
    rng = random.Random(1)
    for _ in range(10):
        process = launch(tmp_path, *long)
        time.sleep(rng.uniform(2, 9))
        process.kill()
        process.communicate()
    run = train(tmp_path, *BASE, *CELLS["accumulate"], *long)
    assert_equal(run, train(tmp_path, *BASE, *CELLS["accumulate"], *long, name="clean"))
    assert_nothing_twice(run)


def test_what_is_compared_is_what_is_checked() -> None:
    """The base of all cells is a config that the command itself would take."""
    from tiny import compose

    for cell in GRID.values():
        assert config.check_train(compose(*words(Path("x"), *BASE, *cell))).trainer.steps
