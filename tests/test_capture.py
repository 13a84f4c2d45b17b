"""A recorded step, repeated, is the step itself. What a CUDA graph does is done here by a tape: the same operators, in the same
order, on the same memory, with every number that Python had when it was recorded."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import figures, hashes, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from diffusion_cli import training
from diffusion_cli.capture import Lessons, recorder
from diffusion_cli.devices import Compute
from diffusion_cli.errors import ConfigError
from diffusion_cli.gradients import Gradients
from diffusion_cli.losses.times import Uniform

READS = {"_local_scalar_dense", "nonzero", "masked_select"}


def places(tensors: Any) -> Any:
    """The same memory by objects of their own, whose shapes nobody changes."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, tensors)


class Tape(TorchDispatchMode):
    """As torch.cuda.graph: refuses to wait for a number, and repeats all else."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = places((args, kwargs or {}))
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, given, places(made)))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, given, made in self.calls:
            args, kwargs = places(given)
            for place, value in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """Runs record their steps on these."""
    made: list[Tape] = []

    def record(work: Callable[[], Lessons]) -> tuple[Lessons, Callable[[], None]]:
        made.append(Tape())
        with made[-1]:
            lessons = work()
        return lessons, made[-1].replay

    monkeypatch.setattr(training, "recorder", lambda word, compute, alone: record if word else None)
    yield made


STEPS = ("trainer.steps=5", "trainer.report_every=1")
WORK = {
    "labels": ("dataset.labels=true", "objective.label_dropout=0.3", "dataset.flip=true", "model.dropout=0.3"),
    "parts": ("trainer.accumulate=4", "model.dropout=0.3", "loss/times=low_discrepancy"),
    "doubled": ("trainer.batch_doublings=[24]", "trainer.accumulate=2", "dataset.flip=true"),
    "hints": ("objective.self_conditioning=0.5", "objective/augment=edm", "optimizer.clip=0.1"),
    "edm": ("loss=learned", "schedule=edm", "prediction=edm", "objective/term=dispersive", "optimizer=muon"),
    "importance": ("loss=importance", "loss.times.buckets=4", "loss.times.memory=2", "ema=power"),
    "hybrid": ("objective/term=hybrid", "loss=ddpm", "schedule=cosine", "prediction=eps", "sampler=ddpm"),
    "bf16": ("precision=bf16", "loss=logit_normal", "schedule=pyramid"),
    "transformer": ("model=dit", "model.width=32", "model.depth=1", "model.heads=2", "model.groups=DEFAULT",
                    "model.multipliers=DEFAULT"),
}  # fmt: skip


@pytest.mark.parametrize("work", WORK)
def test_a_run_of_repeated_steps_is_the_run(work: str, tmp_path: Any, tapes: list[Tape], capfd: pytest.CaptureFixture) -> None:
    plain = train(tmp_path, *STEPS, *WORK[work], "cuda_graph=false", name="plain")
    assert not tapes
    run = train(tmp_path, *STEPS, *WORK[work], name="run")
    replays = {"parts": [1 + 4 * 4], "doubled": [1 + 2 * 2, 1 + 4]}  # once to compare; another batch is another recording
    assert [tape.replays for tape in tapes] == replays.get(work, [1 + 4]), capfd.readouterr().out[-500:]
    assert hashes(run) == hashes(plain) and figures(run) == figures(plain)


@pytest.mark.parametrize(
    "words", [("objective/coupling=optimal",), ("objective=consistency", "loss=consistency", "sampler=multistep")]
)
def test_what_python_decides_is_not_recorded(words: tuple[str, ...], tmp_path: Any, tapes: list[Tape]) -> None:
    train(tmp_path, *STEPS, *words)
    assert not tapes


def _counts(self: Uniform, schedule: Any, source: Any) -> torch.Tensor:
    return source.uniform("time") / (source.step + 1)


def _reads(self: Uniform, schedule: Any, source: Any) -> torch.Tensor:
    return source.uniform("time").clamp(max=float(source.uniform("other").max()))


def _at(self: Uniform, schedule: Any, source: Any) -> torch.Tensor:
    return source.at(source.step + 1).uniform("time")


def _some(self: Uniform, schedule: Any, source: Any) -> torch.Tensor:
    return source.uniform(f"time {source.step}")


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (_counts, "it is another one"),
        (_reads, "not permitted"),
        (_at, "a step that it counts itself"),
        (_some, "it is another one"),
        (Uniform.sample, "it is another one"),  # with recompute, which draws dropout anew from a state that Python keeps
    ],
)
def test_a_step_that_cannot_be_repeated_goes_on_as_it_is(
    sample: Any, reason: str, tmp_path: Any, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And one line says so."""
    monkeypatch.setattr(Uniform, "sample", sample)
    words = (*STEPS, "loss=simple", "model.dropout=0.3", f"recompute={'true' if sample is Uniform.sample else 'false'}")
    plain = train(tmp_path, *words, "cuda_graph=false", name="plain")
    capsys.readouterr()
    run = train(tmp_path, *words, name="run")
    said = [line for line in capsys.readouterr().out.splitlines() if "CUDA graph" in line]
    assert len(said) == 1 and reason in said[0], said
    assert hashes(run) == hashes(plain) and figures(run) == figures(plain)


def test_smaller_parts_are_recorded_anew(tmp_path: Any, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is too small for a repeated step: as the run to which the same happened without."""
    original = Gradients.of

    def of(self: Gradients, batch: Any, step: int, parts: int) -> Any:
        if step == 2 and parts == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch, step, parts)

    monkeypatch.setattr(Gradients, "of", of)
    words = ("trainer.steps=6", "trainer.report_every=1", "model.dropout=0.3")
    plain, run = (train(tmp_path, *words, f"cuda_graph={word}", name=f"it_{word}") for word in ("false", "auto"))
    assert [tape.replays for tape in tapes] == [2, 1 + 3 * 2]  # compared and step 1; compared and both parts of steps 3 to 5
    assert hashes(run) == hashes(plain) and figures(run) == figures(plain)


def test_there_is_none_on_a_cpu() -> None:
    compute = Compute(torch.device("cpu"), None, False)
    assert recorder("auto", compute, True) is None and recorder(False, compute, True) is None
    with pytest.raises(ConfigError, match="cuda_graph=true is for one process on a GPU"):
        recorder(True, compute, True)
