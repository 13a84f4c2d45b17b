"""The trainer's promises but for resuming: accumulation, schedules, stopping, bad numbers, the lock, and that it learns."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import after_step, changed, compose, figures, hashes, in_child, stopped, train, words
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_cli import checkpoint, config, storage, training
from diffusion_cli.devices import choose
from diffusion_cli.errors import ConfigError, NumericError, Stopped, StorageError
from diffusion_cli.runs import Run, status_of
from diffusion_cli.trainer import Trainer


def weights(run: Path, name: str = "weights") -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.folders(run / "checkpoints")[0]).tensors(name)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a if a[key].numel())


def test_accumulation_changes_only_rounding(tmp_path: Path) -> None:
    learned = ("loss/weight=learned", "loss/times=low_discrepancy", "dataset.labels=true", "dataset.flip=true")
    runs = [train(tmp_path, f"trainer.accumulate={n}", *learned, name=f"{n}") for n in (1, 2, 4)]
    assert 0 < distance(weights(runs[0]), weights(runs[1])) < 1e-5
    assert 0 < distance(weights(runs[0]), weights(runs[2])) < 1e-5
    for one, two in zip(figures(runs[0]), figures(runs[1]), strict=True):
        assert one.keys() == two.keys() and max(abs(one[key] - two[key]) for key in one) < 1e-4
    other = train(tmp_path, *learned, "seed=1", name="other")
    assert distance(weights(runs[0]), weights(other)) > 1e-3, "the comparison can fail"


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers that Python reads, and shapes that depend on numbers."""

    READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.removeprefix("aten::")
        masked = name in ("index", "index_put_") and any(k is not None and k.dtype == torch.bool for k in args[1])
        self.found += [name] * (name in self.READS or masked)
        return func(*args, **(kwargs or {}))


OTHERS = tuple(f"model.{key}=DEFAULT" for key in ("width", "groups", "multipliers"))
WORK = {
    "default": ("dataset.labels=true", "objective.label_dropout=0.1", "dataset.flip=true"),
    "adam": ("optimizer.clip=1", "optimizer.warmup=2", "objective.self_conditioning=0.5", "objective/augment=edm"),
    "learned": ("loss=learned", "schedule=edm", "prediction=edm", "objective/term=dispersive", "optimizer=muon"),
    "importance": ("loss=importance", "loss.times.buckets=4", "loss.times.memory=2", "ema=power"),
    "consistency": ("objective=consistency", "loss=consistency", "sampler=multistep", "trainer.accumulate=2"),
    "latents": ("objective=autoencoding", "model=autoencoder_kl", *OTHERS),
    "codebook": ("objective=autoencoding", "model=autoencoder_vq", "model.codes=16", *OTHERS),
}  # fmt: skip


@pytest.mark.parametrize("work", WORK)
def test_a_step_waits_once_for_its_device(work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the guard's question before the optimizer, whose three numbers come as one list."""
    original, tolist, waits = Trainer.step, torch.Tensor.tolist, list[list[str]]()

    def step(self: Trainer, batch: object) -> None:
        with Waits() as mode, monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda tensor: mode.found.append("tolist") or tolist(tensor))
            original(self, batch)
        waits.append(mode.found)

    monkeypatch.setattr(Trainer, "step", step)
    train(tmp_path, *WORK[work])
    assert waits[1:] == [["tolist"]] * 3, "the first step may make the optimizer's state"


def test_what_is_compiled_is_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    choose("cpu", "fp32", True, print)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine", "who says where is heard"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    choose("cpu", "fp32", False, print)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    choose("cpu", "fp32", True, print)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "diffusion-cli" / "compiled")


def test_same_seed_same_bits_other_seed_other_bits(tmp_path: Path) -> None:
    a, b, c = (train(tmp_path, f"seed={seed}", name=name) for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    assert hashes(a) == hashes(b) and figures(a) == figures(b)
    assert hashes(a)["weights.safetensors"] != hashes(c)["weights.safetensors"]


def test_global_randomness_is_not_asked(tmp_path: Path) -> None:
    """Neither what ran before, nor previews and evaluations, change what is learned."""
    torch.manual_seed(1)
    plain = train(tmp_path, "model.dropout=0.3", name="plain")
    torch.manual_seed(2)
    torch.randn(100)
    busy = train(
        tmp_path,
        "model.dropout=0.3",
        "trainer.preview_every=1",
        "trainer.evaluate_every=1",
        "sampler=ddpm",
        "sampler.steps=3",
        name="busy",
    )
    assert hashes(plain) == hashes(busy)


def test_loss_falls_on_digits(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.steps=60", "trainer.batch=32", "dataset.limit=400", "optimizer.lr=3e-3",
                "trainer.report_every=10",
                "model.width=16", "model.groups=8")  # fmt: skip
    losses = [row["train/loss"] for row in figures(run) if "train/loss" in row]
    assert len(losses) == 6 and losses[-1] < 0.6 * losses[0], losses
    assert (run / "loss.png").exists() and status_of(run)["state"] == "finished"


def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.preview_every=2", "trainer.evaluate_every=2")
    assert {p.name for p in run.iterdir()} >= {
        "checkpoints",
        "samples",
        "tensorboard",
        "metrics.jsonl",
        "status.json",
        "config.yaml",
        "growth.gif",
    }
    assert {p.name for p in (run / "samples").iterdir()} >= {
        f"{kind}_0000000{k}.png" for kind in ("samples", "steps") for k in (2, 4)
    }
    assert not [p for p in run.rglob("*") if "=" in p.name or "," in p.name]
    status = status_of(run)
    assert (status["state"], status["step"], status["total"]) == ("finished", 4, 4)
    assert set(status["figures"]) >= {"train/loss", "evaluate/x0_mse"}
    rows = figures(run)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4] and rows[-1]["evaluate/x0_mse"] > 0


def test_the_recipe_sets_the_rate(tmp_path: Path) -> None:
    run = train(tmp_path, "optimizer/decay=linear", "optimizer.warmup=2", "optimizer.lr=1e-3")
    rates = [row["train/learning_rate"] for row in figures(run) if "train/learning_rate" in row]
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.5e-3, 0.25e-3], abs=1e-12)


@pytest.mark.parametrize(("ema", "equal"), [("none", True), ("half_life", False), ("decay", False)])
def test_average_is_not_the_weights(ema: str, equal: bool, tmp_path: Path) -> None:
    run = train(tmp_path, f"ema={ema}")
    assert (distance(weights(run), weights(run, "average")) == 0) == equal


def test_it_ends_after_so_many_images(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.steps=null", "trainer.images=20")
    assert status_of(run)["step"] == 3, "20 pictures in batches of 8"
    assert status_of(train(tmp_path, "trainer.images=9", name="sooner"))["step"] == 2, (
        "whichever of steps and images ends first"
    )


def test_it_ends_after_so_many_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = ("trainer.steps=null", "trainer.minutes=0.002", "trainer.report_every=1000")
    run = train(tmp_path, *limit)
    step = status_of(run)["step"]
    assert step >= 1 and checkpoint.load(checkpoint.folders(run / "checkpoints")[0]).state["seconds"] >= 0.12
    before, capsys_before = hashes(run), capsys.readouterr()
    figures_before = status_of(run)["figures"]
    assert "done" in capsys_before.out
    train(tmp_path, *limit)
    assert hashes(run) == before and status_of(run)["figures"] == figures_before
    assert "is finished at step" in capsys.readouterr().out


def test_a_finished_run_says_so_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    train(tmp_path)
    said = capsys.readouterr().out
    assert "is finished at step 4" in said and "trainer.steps=" in said and "diffusion-sample ckpt=" in said
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}


FROZEN = ["seed=1", "trainer.batch=4", "model.width=16", "schedule=cosine", "prediction=v", "loss/norm=mae", "optimizer.lr=0.1",
          "optimizer=adamw", "ema=none", "dataset.limit=30", "dataset.flip=true", "dataset.labels=true",
          "trainer.accumulate=2", "trainer.batch_doublings=[16]"]  # fmt: skip
FREE = ["trainer.steps=5", "trainer.report_every=3", "trainer.save_every=1", "trainer.keep=1", "sampler=ddim sampler.steps=3",
        "trainer.preview=2", "dataset.workers=1", "precision=fp32", "trust=[x]"]  # fmt: skip


def test_frozen_keys_are_refused_and_free_ones_taken(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.steps=2")
    before = hashes(run)
    for word in FROZEN:
        with pytest.raises(ConfigError, match="is a run with other settings") as caught:
            train(tmp_path, "trainer.steps=3", word)
            pytest.fail(f"{word} was taken")
        lines = str(caught.value).splitlines()
        assert "choose another name=" in lines[-1] and len(lines) <= 7
        if "." in word:
            key, _, value = word.partition("=")
            assert any(line.startswith(f"  {key.replace('/', '.')}: ") and f"{value} now" in line for line in lines), lines
    assert hashes(run) == before
    for word in FREE:
        train(tmp_path, *(["trainer.steps=2"] if "steps=5" not in word else []), *word.split())
    assert hashes(run)["step"] == "step_00000005"


def test_resume_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume=always, but .* has no checkpoint"):
        train(tmp_path, "resume=always")
    run = train(tmp_path, "trainer.steps=2", "resume=never")
    with pytest.raises(ConfigError, match=r"resume=never, but .* exists \(step 2\)"):
        train(tmp_path, "resume=never")
    train(tmp_path, "resume=always")
    assert status_of(run)["step"] == 4


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    try:
        with pytest.raises(StorageError, match=r"in use by another process \(pid \d+\)"):
            train(tmp_path)

        def second() -> None:
            try:
                train(tmp_path)
            except StorageError as error:
                raise SystemExit(error.code) from None

        assert in_child(second) != 0
    finally:
        run.close()
    train(tmp_path)


def test_the_lock_of_a_dead_process_is_no_lock(tmp_path: Path) -> None:
    import os

    def die() -> None:
        held = Run(tmp_path / "run")  # noqa: F841 (its lock ends with the process)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert (tmp_path / "run" / ".lock").read_text()
    train(tmp_path)


def test_workers_that_outlive_a_killed_run_do_not_hold_its_lock(tmp_path: Path) -> None:
    """A forked worker of the data room has the lock's descriptor too, and notices only seconds later that it is alone."""
    import os
    import time

    def die() -> None:
        held = Run(tmp_path / "run")  # noqa: F841 (its lock ends with the process)
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "worker").write_text(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    try:
        Run(tmp_path / "run").close()
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("save_every", [1, 0])
def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(save_every: int, tmp_path: Path) -> None:
    said = ("trainer.report_every=2", f"trainer.save_every={save_every}")

    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.objective.parameters()).fill_(float("nan"))

    original = Trainer.step

    def step(self: Trainer, batch: object) -> None:
        original(self, batch)
        if self.progress.step == 3:
            spoil(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(NumericError) as caught:
            train(tmp_path, *said)
    run = tmp_path / "run"
    assert caught.value.code == 70 and "not finite" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert (status_of(run)["state"], status_of(run)["code"]) == ("failed", 70)
    for path in checkpoint.folders(run / "checkpoints"):
        assert all(torch.isfinite(v).all() for v in checkpoint.load(path).tensors("weights").values() if v.is_floating_point())
    assert len(checkpoint.folders(run / "checkpoints")) == (2 if save_every else 0)
    assert not [row for row in figures(run) if row["step"] > 2 and row["train/loss"] != row["train/loss"]]
    train(tmp_path, *said)
    assert hashes(run) == hashes(train(tmp_path, *said, name="clean")), "and the same command goes on to the same end"


def test_a_failure_is_written_down(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    with after_step(2, fail), pytest.raises(RuntimeError):
        train(tmp_path)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["reason"], status["step"]) == ("failed", "a bug", 0)
    assert hashes(train(tmp_path)) == hashes(train(tmp_path, name="clean"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_and_says_how_to_go_on(number: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with after_step(3, lambda: signal.raise_signal(number)), pytest.raises(Stopped) as caught:
        train(tmp_path, "trainer.save_every=0")
    assert caught.value.code == 128 + number
    assert "step 3, saved: the same command goes on" in str(caught.value)
    assert hashes(tmp_path / "run")["step"] == "step_00000003"
    assert (status_of(tmp_path / "run")["state"], status_of(tmp_path / "run")["step"]) == ("preempted", 3)
    assert signal.getsignal(number) == before, "the handlers are put back"


def test_a_signal_before_the_first_step_saves_nothing_and_does_not_say_so(tmp_path: Path) -> None:
    def early(self: Trainer) -> bool:
        signal.raise_signal(signal.SIGTERM)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "done", early)
        with pytest.raises(Stopped) as caught:
            train(tmp_path)
    assert "saved" not in str(caught.value) and not checkpoint.folders(tmp_path / "run" / "checkpoints")
    train(tmp_path)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        with after_step(2, twice):
            train(tmp_path)

    assert in_child(work) == -signal.SIGTERM


def test_changed_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words, other pictures: the fingerprint tells."""
    train(tmp_path, "trainer.steps=2")
    monkeypatch.setattr(training, "_facts", lambda dataset, pictures: {"fingerprint": "other"})
    with pytest.raises(ConfigError, match="not those that the run began with"):
        train(tmp_path)


def test_a_broken_tensorboard_does_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fail(self: SummaryWriter, *arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", fail)
        run = train(tmp_path)
    assert status_of(run)["state"] == "finished"
    assert capsys.readouterr().out.count("TensorBoard's files cannot be written") == 1


def test_tensorboard_holds_the_figures_of_metrics(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.preview_every=2")
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    rows = figures(run)
    for tag in board.Tags()["scalars"]:
        if tag.split("/")[0] in ("train", "evaluate", "loss_by_noise"):
            logged = [(event.step, event.value) for event in board.Scalars(tag)]
            expected = [(row["step"], row[tag]) for row in rows if tag in row]
            assert [s for s, _ in logged] == [s for s, _ in expected], tag
            assert all(abs(a - b) <= 1e-6 * max(1, abs(b)) for (_, a), (_, b) in zip(logged, expected, strict=True))
    assert "train/loss" in board.Tags()["scalars"]
    assert set(board.Tags()["images"]) >= {"preview/samples", "preview/steps"}


def test_preview_data_draws_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "preview=data")
    assert [p.name for p in run.iterdir()] == ["data.png"] and "data.png" in capsys.readouterr().out


def test_what_a_constructor_refuses_is_said_before_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_cli.data import Digits

    monkeypatch.setattr(Digits, "read", lambda self, split: pytest.fail("data was read"))
    with pytest.raises(ConfigError, match=r"model: .*groups"):
        training.train(config.check_train(changed(compose(*words(tmp_path)), "model.groups=3")))
    assert not (tmp_path / "run").exists()


def test_status_is_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(tmp_path)
    json.loads((run / "status.json").read_text())
    (run / "status.json").write_text('{"state": "fin')
    assert status_of(run) == {} and status_of(tmp_path / "nothing") == {}


def test_a_full_disk_ends_with_74_and_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(operation: str, path: Path) -> None:
        if "step_00000004" in str(path) and operation == "write":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "watch", full)
        with pytest.raises(StorageError, match=r"No space left on device .*MB free") as caught:
            train(tmp_path)
    assert caught.value.code == 74 and status_of(tmp_path / "run")["state"] == "failed"
    assert hashes(tmp_path / "run")["step"] == "step_00000002"
    assert hashes(train(tmp_path)) == hashes(train(tmp_path, name="clean"))


def test_stopped_helper_is_honest(tmp_path: Path) -> None:
    stopped(tmp_path, 1)
    assert hashes(tmp_path / "run")["step"] == "step_00000001"
