"""Two processes train as one does: same pictures, noise and decisions, one folder, one end. They are forked here, and meet by
gloo as they would under torchrun, which the slow tests use."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import torch.distributed as dist
from torch import Tensor

from diffusion_cli import collectives, stall, storage
from diffusion_cli.distributed import Process
from diffusion_cli.errors import UserError
from diffusion_cli.objectives import Denoising
from diffusion_cli.pulse import Pulse
from diffusion_cli.trainer import Trainer

TRAIN = str(Path(sys.executable).parent / "diffusion-train")
QUICK = ("trainer.save_every=1", "trainer.keep=9")


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", TRAIN]
    return subprocess.run([*run, *words], capture_output=True, text=True)


def forked(work: Callable[[int], object], log: Path, world: int = 2) -> list[int]:
    """Pids of processes that run work(rank), each told who it is; what they print goes to log.0, log.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1]:
            continue
        code = 99
        try:
            out = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            signal.alarm(0)
            place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in place.items()})
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            try:
                work(rank)
                code = 0
            except UserError as error:
                print(f"diffusion-train: {error}", file=sys.stderr, flush=True)
                code = error.code
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pids


def together(folder: Path, *words: str, name: str = "run", at: Callable[[int], Any] = contextlib.nullcontext) -> list[int]:
    """Trains in two processes, within the context at(rank); their exit codes. Who is stopped is killed when the other ends."""
    work = lambda rank: trained(folder, words, name, at(rank))  # noqa: E731
    pids = forked(work, folder / name)
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        for one in set(pids) - set(codes):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    os.kill(one, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def trained(folder: Path, words: tuple[str, ...], name: str, around: Any) -> None:
    with around if hasattr(around, "__enter__") else contextlib.nullcontext():
        tiny.train(folder, *words, name=name)


def said(folder: Path, name: str = "run") -> str:
    return "".join(Path(f"{folder / name}.{rank}").read_text() for rank in (0, 1))


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    groups = [safetensors.torch.load_file(folder / f"{group}.safetensors") for group in ("weights", "average", "optimizer")]
    return {f"{number}/{name}": value for number, group in enumerate(groups) for name, value in group.items()}


def equal(one: Path, other: Path, step: int = 4) -> None:
    """Within rounding: the gradients are added up in another order."""
    left, right = tensors(one, step), tensors(other, step)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@contextlib.contextmanager
def watched_step(act: Callable[[Trainer, Any], None]) -> Iterator[None]:
    """Calls act before each step."""
    original = Trainer.step

    def step(self: Trainer, batch: Any) -> None:
        act(self, batch)
        original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        yield


def at_step(number: int, rank: int, act: Callable[[], object]) -> Callable[[int], Any]:
    """On that rank, before that step."""
    wanted = lambda trainer, batch: trainer.progress.step == number and act()  # noqa: E731
    return lambda me: watched_step(wanted) if me == rank else contextlib.nullcontext()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return tiny.train(tmp_path_factory.mktemp("one"), *QUICK)


# -- the same mathematics ----------------------------------------------------------------------------------------------


def test_two_are_one(one: Path, tmp_path: Path) -> None:
    """Weights, averages and optimizer within rounding, so pictures, times and noise; figures too; only one of them writes."""

    @contextlib.contextmanager
    def noted(rank: int) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            note = lambda operation, path: print(f"STORAGE {rank} {operation}", flush=True)  # noqa: E731
            patch.setattr(storage, "watch", note)
            with watched_step(lambda trainer, batch: print(f"IDS {trainer.progress.step} {batch.ids.tolist()}", flush=True)):
                yield

    ids = {}
    with watched_step(lambda trainer, batch: ids.setdefault(trainer.progress.step, batch.ids.tolist())):
        tiny.train(tmp_path, name="alone")
    assert together(tmp_path, *QUICK, at=noted) == [0, 0], said(tmp_path)
    equal(one, tmp_path / "run")
    whole: dict[int, list[int]] = {}
    for step, part in re.findall(r"IDS (\d+) (\[.*\])", said(tmp_path)):
        whole[int(step)] = whole.get(int(step), []) + json.loads(part)
    assert whole == ids
    for mine, theirs in zip(tiny.figures(one), tiny.figures(tmp_path / "run"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4)
    assert "STORAGE 0" in said(tmp_path) and "STORAGE 1" not in said(tmp_path)


@pytest.mark.parametrize(
    ("words", "alone"),
    [
        (("model.dropout=0.3",), "trainer.accumulate=2"),
        (("trainer.batch_doublings=[16]", "dataset.flip=true", "model.dropout=0.3"), "trainer.accumulate=2"),
        (("loss/times=importance", "loss.times.buckets=2", "loss.times.memory=2"), "trainer.accumulate=1"),
    ],
)
def test_dropout_and_what_a_loss_remembers(words: tuple[str, ...], alone: str, tmp_path: Path) -> None:
    """Two processes draw dropout as one with two parts; a history of losses is that of the whole batch."""
    tiny.train(tmp_path, *words, alone, name="one")
    assert together(tmp_path, *words) == [0, 0], said(tmp_path)
    equal(tmp_path / "one", tmp_path / "run")


def test_parts_do_not_communicate(one: Path, tmp_path: Path) -> None:
    """A step of two parts sends its gradients once, and as one of one part."""

    def counted(trainer: Trainer, batch: object) -> None:
        if trainer.progress.step == 2:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
                print(f"BUCKET {trainer.progress.step} {bucket.index()}", flush=True)
                return allreduce_hook(state, bucket)

            trainer.group.objective.register_comm_hook(None, hook)  # type: ignore[operator]

    assert together(tmp_path, *QUICK, "trainer.accumulate=2", at=lambda rank: watched_step(counted)) == [0, 0], said(tmp_path)
    sent = re.findall(r"BUCKET (\d+) 0", (tmp_path / "run.0").read_text())
    assert sent == ["2", "3"], "the first two steps are cautious: they send when the memory has sufficed everywhere"
    equal(one, tmp_path / "run")


def test_a_run_goes_on_with_more_and_with_fewer(one: Path, tmp_path: Path) -> None:
    tiny.train(tmp_path, *QUICK, "trainer.steps=2", name="run")
    assert together(tmp_path, *QUICK, "trainer.steps=3") == [0, 0], said(tmp_path)
    tiny.train(tmp_path, *QUICK)
    equal(one, tmp_path / "run")


def test_weights_that_take_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Denoising.__init__

    def with_a_spare(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        self.spare = torch.nn.Parameter(torch.ones(1))

    monkeypatch.setattr(Denoising, "__init__", with_a_spare)
    tiny.train(tmp_path, name="one")
    assert together(tmp_path) == [0, 0], said(tmp_path)
    equal(tmp_path / "one", tmp_path / "run")


def test_gathered_alone_is_itself() -> None:
    rows = torch.arange(3)
    assert collectives.gathered(rows) is rows


# -- the same decisions ------------------------------------------------------------------------------------------------


def test_a_bad_part_of_one_is_skipped_by_all(tmp_path: Path) -> None:
    def poisoned(trainer: Trainer, batch: Any) -> None:
        if trainer.progress.step == 2:
            batch.x[batch.ids == bad] = torch.nan

    ids: list[int] = []
    with watched_step(lambda trainer, batch: ids.extend(batch.ids.tolist())):
        tiny.train(tmp_path, name="clean")
    bad = ids[2 * 8 + 7]  # of the second process' slots
    with watched_step(poisoned):
        tiny.train(tmp_path, name="one")
    assert together(tmp_path, at=lambda rank: watched_step(poisoned)) == [0, 0], said(tmp_path)
    equal(tmp_path / "one", tmp_path / "run")
    assert f"the loss is not finite (pictures {bad})" in said(tmp_path)


def short_of_memory(step: int) -> Callable[[int], Any]:
    """The second process has too little memory for more than two pictures, from that step on."""

    @contextlib.contextmanager
    def patched(rank: int) -> Iterator[None]:
        original = Denoising.loss

        def loss(self: Any, batch: Any, source: Any) -> Any:
            if rank == 1 and len(batch.x) > 2 and source.step >= step:
                raise RuntimeError("out of memory: injected")
            return original(self, batch, source)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Denoising, "loss", loss)
            yield

    return patched


def test_too_little_memory_in_one_makes_smaller_parts_in_all(one: Path, tmp_path: Path) -> None:
    assert together(tmp_path, *QUICK, at=short_of_memory(0)) == [0, 0], said(tmp_path)
    assert "from now on batches are done in 2 parts" in said(tmp_path)
    equal(one, tmp_path / "run")


def test_too_little_memory_later_ends_all_and_the_same_command_goes_on(one: Path, tmp_path: Path) -> None:
    assert together(tmp_path, *QUICK, at=short_of_memory(3)) == [71, 71], said(tmp_path)
    assert said(tmp_path).count("rank 1 of 2, step 3: out of memory") == 1
    assert together(tmp_path, *QUICK, at=short_of_memory(3)) == [0, 0], said(tmp_path)
    equal(one, tmp_path / "run")


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_step(one: Path, tmp_path: Path, rank: int) -> None:
    assert together(tmp_path, at=at_step(2, rank, lambda: signal.raise_signal(signal.SIGTERM))) == [143, 143], said(tmp_path)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 3) and tiny.hashes(tmp_path / "run")["step"] == "step_00000003"
    assert together(tmp_path) == [0, 0]
    equal(one, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_gone_or_hangs_is_named_and_nobody_waits(one: Path, tmp_path: Path, rank: int, number: int) -> None:
    codes = together(tmp_path, *QUICK, "distributed.patience=4", at=at_step(2, rank, lambda: os.kill(os.getpid(), number)))
    assert (codes[1 - rank], codes[rank]) == (75, -signal.SIGKILL), said(tmp_path)
    told = re.findall(r"^diffusion-train: (.*)$", said(tmp_path), re.M)
    assert told == [f"rank {rank} of 2 is gone or hangs, at step 2: the same command goes on"]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["code"], status["reason"]) == ("failed", 75, told[0])
    assert together(tmp_path, *QUICK) == [0, 0]
    equal(one, tmp_path / "run")


def seen_by(watchful: tuple[int, ...], around: Callable[[int], Any]) -> Callable[[int], Any]:
    """The others find that no step takes too long."""

    @contextlib.contextmanager
    def patched(rank: int) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, around(rank):
            if rank not in watchful:
                patch.setattr(stall.Watch, "look", lambda watch, limit, hangs: None)
            yield

    return patched


@pytest.mark.parametrize(("rank", "watchful"), [(0, (0, 1)), (1, (0, 1)), (0, (0,)), (1, (1,))], ids=str)
def test_who_hangs_in_a_step_is_named_though_its_threads_live(rank: int, watchful: tuple[int, ...], tmp_path: Path) -> None:
    """All pulses go on; the one that lacks in the next collective is meant, whoever notices, and stacks show where that is."""
    asleep = seen_by(watchful, at_step(3, rank, lambda: time.sleep(1000)))
    assert together(tmp_path, *QUICK, "trainer.stall=4", at=asleep) == [75, 75], said(tmp_path)
    (told,) = re.findall(r"^diffusion-train: (.*)$", said(tmp_path), re.M)
    stacks = {number: tmp_path / "run" / f"stalled_{number}.txt" for number in (0, 1)}
    assert told == f"rank {rank} of 2 hangs, at step 3: the same command goes on; what its threads did is in {stacks[rank]}"
    assert "time.sleep(1000)" in stacks[rank].read_text() and "time.sleep(1000)" not in stacks[1 - rank].read_text()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["code"], status["reason"]) == ("failed", 75, told)


def test_who_fails_says_so_for_all(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("a bug")

    assert together(tmp_path, *QUICK, at=at_step(2, 1, fails)) == [1, 1]
    assert "ValueError: a bug\nrank 1 of 2, step 2" in said(tmp_path)
    assert "rank 1 of 2, step 2: a bug" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]


def test_the_own_word_does_not_end_who_still_tells_more() -> None:
    """The thread that looks whether another has ended finds this process's word, spoken since it began to look."""
    ended = list[int]()

    class Store(dist.HashStore):
        def clone(self) -> "Store":
            return self

        def check(self, keys: list[str]) -> bool:  # the word comes in its midst
            pulse.over.set()
            pulse.word(0, 1, "a bug")
            return super().check(keys)

    def end(code: int, said: str, silent: bool, pid: int | None = None, hangs: bool = False) -> None:
        ended.append(code)

    pulse = Pulse(Process(0, 2, 0), Store(), 100.0, str, end)
    assert pulse.over.wait(100)
    pulse.stop()
    assert json.loads(pulse.store.get("end"))["said"] == "a bug" and not ended


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_cli import config
    from diffusion_cli.errors import ConfigError

    node = tiny.compose("name=x", "trainer.batch=9", "distributed.processes=2")
    with pytest.raises(ConfigError, match=r"trainer\.batch is 9: 2 processes share it equally"):
        config.check_train(node)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"distributed\.processes is 2, and there are 3 already"):
        config.check_train(tiny.changed(node, "trainer.batch=6"))


# -- the real commands -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun(one: Path, tmp_path: Path) -> None:
    done = torchrun(*tiny.words(tmp_path, *QUICK))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1 and "Warning" not in done.stderr
    equal(one, tmp_path / "run")


@pytest.mark.slow
def test_the_command_starts_its_processes(one: Path, tmp_path: Path) -> None:
    words = tiny.words(tmp_path, *QUICK, "distributed.processes=2")
    done = subprocess.run([TRAIN, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("2 processes") == 1, done.stderr
    equal(one, tmp_path / "run")
    refused = subprocess.run([TRAIN, *words, "resume=never"], capture_output=True, text=True)
    assert refused.returncode == 64 and refused.stderr.count("resume=never, but") == 1, refused.stderr
