"""What is not finite does no harm, and what does not fit into memory is worked off in smaller parts, with the same result."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import distance, weights
from tiny import figures, hashes, stopped, train

from diffusion_cli import checkpoint, errors
from diffusion_cli.checkpoint import Checkpoint
from diffusion_cli.data import Batch
from diffusion_cli.errors import NumericError, OutOfMemory
from diffusion_cli.guard import ROW, Guard
from diffusion_cli.objectives.denoising import Denoising
from diffusion_cli.runs import status_of
from diffusion_cli.trainer import Trainer

LONG = ("trainer.steps=12", "trainer.save_every=4", "trainer.report_every=3")
MOVING = {  # what a step changes besides the weights: an average, momenta, a history of losses, a codebook outside the gradient
    "adam": (),
    "importance": ("loss=importance", "loss.times.buckets=4", "loss.times.memory=2"),
    "codebook": ("objective=autoencoding", "model=autoencoder_vq", "model.codes=16",
                 *(f"model.{key}=DEFAULT" for key in ("width", "groups", "multipliers"))),
}  # fmt: skip


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, buffers, average and optimizer, as they are now."""
    found = {f"weights/{name}": value.clone() for name, value in trainer.objective.state_dict().items()}
    found |= {f"average/{name}": value.clone() for name, value in trainer.shadow.state_dict().items()}
    for name, parameter in trainer.objective.named_parameters():
        found |= {f"optimizer/{name}/{key}": value.clone() for key, value in trainer.optimizer.state[parameter].items()}
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@contextmanager
def spoiling(at: set[int], where: str, times: int = 10**9) -> Iterator[list[bool]]:
    """Makes loss, gradient or a picture of those steps not finite. Yields whether each of them left the state as it was."""
    original, untouched = Trainer.step, list[bool]()

    def step(self: Trainer, batch: Batch) -> None:
        number = self.progress.step
        if number not in at or len(untouched) >= times:
            return original(self, batch)
        before = state_of(self)
        with pytest.MonkeyPatch.context() as patch:
            if where == "picture":
                batch.x[3, 0, 0, 0] = float("nan")
            elif where == "loss":
                patch.setattr(type(self.objective), "loss", overflowing(type(self.objective).loss))
            else:
                patch.setattr(torch.nn.utils, "clip_grad_norm_", broken_gradient(self))
            untouched.append(False)
            original(self, batch)
        untouched[-1] = equal(before, state_of(self)) and self.progress.step == number + 1
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        yield untouched


def overflowing(loss: Any) -> Any:
    def overflown(self: object, batch: Batch, source: object) -> Any:
        found, tallies = loss(self, batch, source)
        return found * torch.where(torch.arange(len(found)) == 5, torch.inf, 1.0), tallies

    return overflown


def broken_gradient(trainer: Trainer) -> Any:
    original = torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, limit: float) -> torch.Tensor:
        trainer.parameters[-1].grad.view(-1)[0] = float("-inf")
        return original(parameters, limit)

    return clip


@pytest.mark.parametrize(
    ("cell", "where"),
    [("adam", "picture"), ("adam", "loss"), ("adam", "gradient"), ("importance", "loss"), ("codebook", "picture")],
)
def test_a_bad_step_leaves_everything_as_it_was(
    cell: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with spoiling({0, 5, 6}, where) as untouched:
        run = train(tmp_path, *LONG, *MOVING[cell])
    assert untouched == [True, True, True]
    assert status_of(run)["state"] == "finished"
    said = [line for line in capsys.readouterr().out.splitlines() if "is not finite" in line]
    assert len(said) == 3 and all(("gradient" if where == "gradient" else "loss") in line for line in said)
    named = [re.search(r"\(pictures ([\d, ]+)\)", line)[1].split(", ") for line in said]
    assert [len(ids) for ids in named] == 3 * [8 if where == "gradient" else 1], "the pictures that did it"
    rows = [row for row in figures(run) if "train/loss" in row]
    assert [row.get("train/skipped") for row in rows] == [1, 2, 3, 3] and all(row["train/loss"] < 1e9 for row in rows)


def test_skipped_steps_are_counted_over_an_interruption(tmp_path: Path) -> None:
    """Four in a row, of which two before the interruption: the same end as without it."""
    with spoiling({3, 4, 5, 6}, "loss"):
        whole = train(tmp_path, *LONG, name="whole")
        stopped(tmp_path, 5, *LONG)
        run = train(tmp_path, *LONG)
    assert hashes(run) == hashes(whole) and figures(run) == figures(whole)
    with spoiling({3, 4, 5, 6, 7}, "loss"), pytest.raises(NumericError, match="in 5 steps in a row, 3 to 7"):
        stopped(tmp_path, 5, *LONG, name="five")
        train(tmp_path, *LONG, name="five")


def test_five_in_a_row_go_back_and_a_passing_fault_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = train(tmp_path, *LONG, name="clean")
    with spoiling(set(range(5, 10)), "loss", times=ROW) as untouched:
        run = train(tmp_path, *LONG)
    assert len(untouched) == ROW
    assert hashes(run) == hashes(clean) and figures(run) == figures(clean)
    said = capsys.readouterr().out
    assert "not finite in 5 steps in a row, 5 to 9" in said and "going back to step 4" in said


@pytest.mark.parametrize(("at", "where"), [(1, "before the first checkpoint"), (6, "also after going back to step 4")])
def test_what_comes_again_ends_the_run_with_its_pictures(at: int, where: str, tmp_path: Path) -> None:
    with spoiling(set(range(at, at + ROW)), "loss"), pytest.raises(NumericError) as caught:
        train(tmp_path, *LONG)
    message = str(caught.value)
    assert caught.value.code == 70 and len(message.splitlines()) == 1 and where in message
    listed = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert list(listed["steps"]) == [str(step) for step in range(at, at + ROW)] and listed["seed"] == 0
    ids = [i for row in listed["steps"].values() for i in row]
    assert len(ids) == ROW and f"pictures {', '.join(map(str, dict.fromkeys(ids)))}" in message
    status = status_of(tmp_path / "run")
    assert (status["state"], status["code"], status["reason"]) == ("failed", 70, message)
    assert all_finite(tmp_path / "run")
    assert hashes(train(tmp_path, *LONG)) == hashes(train(tmp_path, *LONG, name="clean")), "the same command goes on"


def all_finite(run: Path) -> bool:
    found = [one for one in checkpoint.good(run / "checkpoints") if isinstance(one, Checkpoint)]
    groups = [one.tensors(name) for one in found for name in one.groups()]
    return all(bool(v.isfinite().all()) for group in groups for v in group.values() if v.is_floating_point())


@pytest.mark.parametrize("place", ["weight", "average", "momentum"])
def test_a_bit_that_flips_in_memory_is_noticed_and_healed(place: str, tmp_path: Path) -> None:
    """A weight in the step that meets it; the average and the momenta at the latest when they would be saved."""
    clean, original, once = train(tmp_path, *LONG, name="clean"), Trainer.step, [True]

    def step(self: Trainer, batch: Batch) -> None:
        if self.progress.step == 6 and once:
            once.clear()
            first = self.parameters[0]
            hit = {
                "weight": first,
                "average": next(self.shadow.parameters()),
                "momentum": self.optimizer.state[first]["exp_avg"],
            }
            hit[place].data.view(-1)[0] = float("nan")
        original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        run = train(tmp_path, *LONG)
    assert not once and hashes(run) == hashes(clean) and figures(run) == figures(clean) and all_finite(run)


def test_a_spike_is_told_once_with_its_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    ids, one = torch.arange(40, 48), torch.ones(())
    guard = Guard([one], torch.amp.GradScaler("cpu", enabled=False), lambda: None)
    for step in range(60):
        losses = torch.linspace(0.5, 1.5, 8) * (11 if step in (10, 50) else 1)
        assert guard.accepts(step, ids, losses, one)
    (line,) = capsys.readouterr().out.splitlines()
    assert "step      50" in line and "(pictures 47, 46, 45, 44 most)" in line, "and 10 steps are too few to tell"


@pytest.mark.parametrize("level", [-1.0, 0.0])
def test_a_loss_below_zero_has_no_spikes(level: float, capsys: pytest.CaptureFixture[str]) -> None:
    """As with a learned weight or a dispersive term: ten times a negative median is no bound."""
    guard = Guard([torch.ones(())], torch.amp.GradScaler("cpu", enabled=False), lambda: None)
    for step in range(60):
        assert guard.accepts(step, torch.arange(4), torch.full((4,), level + 0.001 * step), torch.ones(()))
    assert not capsys.readouterr().out


def test_fp16_halves_its_scale_in_peace() -> None:
    """A gradient that overflows is how the scale is found, and no trouble, until the scale is below 1."""
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = Guard([weight], scaler, lambda: None)
    accepted = []
    for step in range(6):
        scaler.scale(weight.sum() * torch.inf).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
        accepted.append(guard.accepts(step, torch.arange(2), torch.ones(2), norm))
        scaler.update()
        optimizer.zero_grad()
    assert not any(accepted) and guard.skipped == 2, "8, 4, 2 and 1 are searched through, 1/2 and 1/4 are trouble"


# -- memory ------------------------------------------------------------------------------------------------------------

ERRORS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError,
}


@contextmanager
def room_for(pictures: int, error: str = "gpu", from_step: int = 0) -> Iterator[None]:
    """A loss of more pictures than that runs out of memory, after it has done its work."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in {Denoising}:
            original = kind.loss

            def loss(self: Any, batch: Batch, source: Any, original: Any = original) -> Any:
                found = original(self, batch, source)
                if len(batch.x) > pictures and source.step >= from_step:
                    raise ERRORS[error]()
                return found

            patch.setattr(kind, "loss", loss)
        yield


@pytest.mark.parametrize(
    ("error", "step", "room", "parts"), [("gpu", 0, 4, 2), ("cpu", 0, 2, 4), ("python", 2, 2, 4), ("gpu", 2, 1, 8)]
)
def test_smaller_parts_are_the_same_mathematics(
    error: str, step: int, room: int, parts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path, name="whole")
    with room_for(room, error, step):
        run = train(tmp_path)
    assert capsys.readouterr().out.count(f"in {parts} parts, as trainer.accumulate={parts} does") == 1
    if step == 0:
        asked = train(tmp_path, f"trainer.accumulate={parts}", name="asked")
        assert hashes(run) == hashes(asked), "to the bit what was asked for in so many parts from the start"
    assert distance(weights(run), weights(whole)) < 1e-5
    assert checkpoint.load(checkpoint.folders(run / "checkpoints")[0]).state["parts"] == parts, "a resumed run knows it"


def test_a_resumed_run_keeps_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with room_for(4):
        stopped(tmp_path, 2)
        capsys.readouterr()
        run = train(tmp_path)
        assert "out of memory" not in capsys.readouterr().out
        assert hashes(run) == hashes(train(tmp_path, name="whole"))


@pytest.mark.parametrize(
    ("room", "more"),
    [(0, ()), (4, ("loss=importance", "loss.times.buckets=4", "loss.times.memory=2"))],
    ids=["not one picture", "other mathematics"],
)
def test_where_parts_do_not_help_it_is_said_in_a_line(room: int, more: tuple[str, ...], tmp_path: Path) -> None:
    with room_for(room), pytest.raises(OutOfMemory) as caught:
        train(tmp_path, *more)
    message = str(caught.value)
    assert caught.value.code == 71 and len(message.splitlines()) == 1
    assert all(advice in message for advice in ("trainer.batch", "trainer.accumulate", "model"))
    assert (status_of(tmp_path / "run")["state"], status_of(tmp_path / "run")["code"]) == ("failed", 71)


def test_compared_pictures_stay_together() -> None:
    from diffusion_cli.objectives.contrasting import Contrasting
    from diffusion_cli.parts import Parts

    def short(parts: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory):
        Parts(torch.nn.Linear(1, 1), 1, 8, Contrasting.coupled).work(short)


@pytest.mark.parametrize("place", ["preview", "evaluate", "save"])
def test_other_places_say_what_to_try(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: Trainer, *asked: object) -> None:
        raise ERRORS["cpu"]()

    monkeypatch.setattr(Trainer, place, short)
    with pytest.raises(OutOfMemory, match=r"try a smaller trainer\.batch, a smaller trainer\.preview or a smaller model"):
        train(tmp_path, "trainer.preview_every=2", "trainer.evaluate_every=2")
    assert status_of(tmp_path / "run")["code"] == 71


def test_other_errors_are_no_lack_of_memory() -> None:
    others = (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x"))
    for error in (*others, TypeError("empty() received an invalid combination of arguments")):
        assert not errors.lacks_memory(error)
        with pytest.raises(type(error)), errors.advising_on_memory("a", "b", "c"):
            raise error


@pytest.mark.parametrize(
    "word", [f"model.width={2**61}", f"model.width={2**40}", f"trainer.batch={2**62}", f"trainer.preview={2**62}"]
)
def test_a_size_beyond_64_bits_is_one_line(word: str, tmp_path: Path) -> None:
    line = pytest.raises(OutOfMemory, match=r"^out of memory \(.*\): try .* a smaller model$")
    with line, errors.advising_on_memory("a smaller batch", "fewer pictures", "a smaller model"):  # as cli.py has it
        train(tmp_path, word)


SHORT = """
import resource, sys
from pathlib import Path
from tiny import compose, words
from diffusion_cli import config
from diffusion_cli.training import train

big = ("trainer.batch=512", "dataset.limit=600", "model.width=64", "model.groups=8", "trainer.preview=1")
plan = config.check_train(compose(*words(Path(sys.argv[1]), *big, "trainer.steps=2")))
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
train(plan)
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [200, 500])
def test_real_lack_of_memory(room: int, tmp_path: Path) -> None:
    """The system refuses: a limit on a process' addresses, between what a part and what the whole batch takes (900 MB)."""
    paths = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", SHORT, str(tmp_path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    assert "out of memory" in done.stdout
    assert checkpoint.load(tmp_path / "run/checkpoints/step_00000002").state["parts"] > 1
