"""distributed=fsdp: two processes hold a half each, and train, save and judge what one process does."""

import copy
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from test_classifying import TINY
from test_distributed_training import QUICK, at_step, equal, said, together, watched_step
from test_models import OPTIONS, READERS, make
from torch.distributed.device_mesh import init_device_mesh

from diffusion_cli import config
from diffusion_cli.collectives import local
from diffusion_cli.errors import ConfigError, OutOfMemory
from diffusion_cli.recomputing import blocks
from diffusion_cli.sharding import shard
from diffusion_cli.trainer import Trainer

FSDP = "distributed=fsdp"
WORDS = (
    *QUICK, "trainer.accumulate=2", "objective.self_conditioning=0.5", "optimizer.clip=0.5", "trainer.best=evaluate/x0_mse",
    "trainer.evaluate_every=2", "trainer.preview_every=4",
)  # fmt: skip


def held(trainer: Trainer) -> int:
    """Bytes of weights, gradients, the optimizer's state and the average on this process."""
    gradients = [weight.grad for weight in trainer.parameters if weight.grad is not None]
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    there = local([*trainer.parameters, *gradients, *states, *trainer.shadow.parameters()])
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in there}
    return sum(storages.values())  # each once: the gradients of a block share one


def weighed() -> Any:
    """Prints what is held in the midst of the last step, and each time that gradients are sent."""

    def act(trainer: Trainer, batch: Any) -> None:
        norm = trainer.guard.norm

        def told(weights: list[torch.Tensor]) -> torch.Tensor:
            print(f"HELD {held(trainer)}", flush=True)
            return norm(weights)

        if trainer.progress.step == 3:
            trainer.guard.norm = told
            if trainer.group.me.world > 1:
                print(f"GROUPS {len(blocks(trainer.objective.network)) + 1}", flush=True)
                name = (
                    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
                )  # torch 2.13
                scatter = getattr(dist, name)
                setattr(dist, name, lambda *given, **named: print("SENT", flush=True) or scatter(*given, **named))

    return watched_step(act)


def taken_back(run: Path, to: Path, step: int = 2) -> None:
    """A copy of the run as it was at that step."""
    shutil.copytree(run, to)
    for folder in sorted((to / "checkpoints").glob("step_*"))[step:]:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run of two processes, with what they said."""
    folder = tmp_path_factory.mktemp("sharded")
    assert together(folder, *WORDS, FSDP, at=lambda rank: weighed()) == [0, 0], said(folder)
    return folder


def test_two_halves_are_one(sharded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Weights, averages and optimizer within rounding, figures and pictures too; each holds half of it all, step by step."""
    with weighed():
        one = tiny.train(tmp_path, *WORDS)
    equal(one, sharded / "run")
    assert tiny.figures(one)[-1].keys() == tiny.figures(sharded / "run")[-1].keys()
    for mine, theirs in zip(tiny.figures(one), tiny.figures(sharded / "run"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4)
    drawn = lambda run: sorted(path.name for path in (run / "samples").iterdir())  # noqa: E731
    assert drawn(one) == drawn(sharded / "run") != []
    (whole,) = (int(held) for held in re.findall(r"HELD (\d+)", capfd.readouterr().out))
    halves = [int(held) for held in re.findall(r"HELD (\d+)", said(sharded))]
    assert len(halves) == 2 and max(halves) < 0.55 * whole, (halves, whole)
    (groups, _) = (int(number) for number in re.findall(r"GROUPS (\d+)", said(sharded)))
    assert said(sharded).count("SENT") == 2 * groups, "of the two parts of a step the first sends nothing"


@pytest.mark.parametrize(
    "words",
    [
        ("objective=consistency", "objective.method.every=2", "objective.method.teacher={teacher}"),
        ("objective=meanflow", "schedule=flow", "prediction=flow"),
        pytest.param(("objective=progressive",), marks=pytest.mark.slow),
        pytest.param(("objective=reflow", "schedule=flow", "prediction=flow", "objective.method.teacher={teacher}",
                      "objective.method.pairs=20", "objective.method.sampler.steps=2"), marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0].partition("=")[2],
)  # fmt: skip
def test_a_few_steps_in_parts(words: tuple[str, ...], tmp_path: Path) -> None:
    """Of the network that is asked aside, and differentiated forwards, each process holds a part too."""
    taught = ("dataset.labels=true", "schedule=flow", "prediction=flow")
    teacher = tiny.train(tmp_path, *QUICK, *taught, "trainer.steps=1", name="teacher")
    given = [*QUICK, "dataset.labels=true", f"init={teacher}", *(word.format(teacher=teacher) for word in words)]
    assert together(tmp_path, *given, FSDP) == [0, 0], said(tmp_path)
    equal(tiny.train(tmp_path, *given, name="one"), tmp_path / "run")


def test_muon_in_parts(tmp_path: Path) -> None:
    """A matrix is moved as a whole, of which each process holds some rows."""
    given = (*QUICK, "optimizer=muon", "optimizer.weight_decay=0.1", "trainer.save_every=2")
    assert together(tmp_path, *given, FSDP) == [0, 0], said(tmp_path)
    equal(tiny.train(tmp_path, *given, name="one"), tmp_path / "run")


def test_it_goes_on_to_the_bit_and_so_does_one_process(sharded: Path, tmp_path: Path) -> None:
    taken_back(sharded / "run", tmp_path / "run")
    assert together(tmp_path, *WORDS, FSDP) == [0, 0], said(tmp_path)
    assert tiny.hashes(tmp_path / "run") == tiny.hashes(sharded / "run")
    taken_back(sharded / "run", tmp_path / "alone")
    equal(sharded / "run", tiny.train(tmp_path, *WORDS, name="alone"))


def test_it_goes_on_from_one_process_skips_a_bad_step_and_recomputes(tmp_path: Path) -> None:
    bad: list[int] = []

    def poisoned(trainer: Trainer, batch: Any) -> None:
        if trainer.progress.step == 2:
            bad[:] = bad or [batch.ids[-1].item()]  # of the second process' slots
            batch.x[batch.ids == bad[0]] = torch.nan

    with watched_step(poisoned):
        one = tiny.train(tmp_path, *QUICK, name="one")
    taken_back(one, tmp_path / "run", step=1)
    assert together(tmp_path, *QUICK, FSDP, "recompute=true", at=lambda rank: watched_step(poisoned)) == [0, 0], said(tmp_path)
    equal(one, tmp_path / "run")
    assert f"the loss is not finite (pictures {bad[0]})" in said(tmp_path)


def test_who_is_gone_is_named(tmp_path: Path) -> None:
    gone = at_step(2, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert together(tmp_path, *QUICK, FSDP, "distributed.patience=4", at=gone) == [75, -signal.SIGKILL], said(tmp_path)
    assert re.findall(r"^diffusion-train: (.*)$", said(tmp_path), re.M) == [
        "rank 1 of 2 is gone or hangs, at step 2: the same command goes on"
    ]


@pytest.mark.slow
def test_a_run_goes_from_copies_to_parts_and_a_signal_stops_it(tmp_path: Path) -> None:
    one = tiny.train(tmp_path, *QUICK, name="one")
    assert together(tmp_path, *QUICK, "trainer.steps=1") == [0, 0], said(tmp_path)
    stopped = at_step(2, 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert together(tmp_path, *QUICK, FSDP, at=stopped) == [143, 143], said(tmp_path)
    assert tiny.hashes(tmp_path / "run")["step"] == "step_00000003"
    assert together(tmp_path, *QUICK) == [0, 0], said(tmp_path)
    equal(one, tmp_path / "run")


@pytest.mark.slow
def test_blocks_are_compiled(tmp_path: Path) -> None:
    one = tiny.train(tmp_path, *QUICK, name="one")
    assert together(tmp_path, *QUICK, FSDP, "compile=true") == [0, 0], said(tmp_path)
    equal(one, tmp_path / "run")


@pytest.mark.slow
def test_a_classifier_in_parts(tmp_path: Path) -> None:
    words = (*QUICK, *TINY, "model.dropout=0")
    one = tiny.train(tmp_path, *words, name="one")
    assert together(tmp_path, *words, FSDP) == [0, 0], said(tmp_path)
    for mine, theirs in zip(tiny.figures(one), tiny.figures(tmp_path / "run"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4)  # not the weights: that of keys alone has no gradient but rounding


def test_too_little_memory_ends_the_run() -> None:
    from diffusion_cli.sharding import Sharded

    one = Sharded.__new__(Sharded)  # without others
    assert one.lacking("") == ""
    with pytest.raises(OutOfMemory, match=r"out of memory \(here\): try a larger trainer\.accumulate"):
        one.lacking("here")


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process, in which weights are sharded all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # the root, which is no network in a run
@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if not option.startswith("edm2")]
)  # refused: gains are numbers
def test_every_network_is_asked_as_it_was(option: str, alone: None) -> None:
    network = make(option, 1, 8 if option != "unet2d" else 16, 0 if option in READERS else 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # what begins at zero gives no gradient
    told = torch.randn(4, 5, 6) if option in READERS else torch.tensor([0, 1, 2, 3])
    asked = (torch.randn(4, 1, network.image_size, network.image_size), torch.rand(4), told)
    other = copy.deepcopy(network)
    names = list(network.state_dict())
    shard(network, network, init_device_mesh("cpu", (1,)))
    assert list(network.state_dict()) == names
    for one in (network, other):
        torch.manual_seed(1)  # of dropout
        one(*asked).square().sum().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in other.parameters() if parameter.grad is not None)
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:  # what several blocks add to is added in another order
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-5 * largest)


def test_what_cannot_be_sharded_is_refused() -> None:
    node = tiny.compose("name=x", FSDP, "distributed.processes=2")
    config.check_train(node)
    for change, reason in (
        (
            "distributed.processes=1",
            r"distributed=fsdp, and one process: give distributed\.processes=2",
        ),
        ("precision=fp16", "distributed=fsdp with precision=fp16"),
    ):
        with pytest.raises(ConfigError, match=reason):
            config.check_train(tiny.changed(node, change))
    node = tiny.compose("name=x", FSDP, "distributed.processes=2", "experiment=autoencoder_digits")
    with pytest.raises(ConfigError, match=r"distributed=fsdp shards objective=denoising .* this is autoencoding"):
        config.check_train(node)
