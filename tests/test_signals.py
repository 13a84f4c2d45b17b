"""A signal at any point: the work ends at the next boundary or at once, all is saved, and the same command goes on."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_resume import assert_equal
from tiny import in_child, train, words

from diffusion_cli import checkpoint, storage
from diffusion_cli.commands import train as command
from diffusion_cli.data.digits import Digits
from diffusion_cli.errors import Stopped
from diffusion_cli.evaluation.watch import Watch
from diffusion_cli.objectives.denoising import Denoising
from diffusion_cli.runs import status_of
from diffusion_cli.signals import listening
from diffusion_cli.trainer import Trainer

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
WORDS = (
    "trainer.steps=6", "trainer.save_every=3", "trainer.evaluate_every=2", "trainer.preview_every=2", "trainer.report_every=1",
    "features=random", "trainer.metrics=[kid]", "trainer.metrics_n=20", "trainer.metrics_every=2", "sampler.steps=2",
)  # fmt: skip
LONG = 100  # seconds that nobody waits for: who is not broken off at once sleeps past every patience


def before(
    owner: Any, name: str, when: Callable[..., bool] = lambda *given: True, then: Callable[[], None] = lambda: None
) -> Any:
    """(patch, number): a signal comes to the process itself as it calls that, the first time that `when` holds."""

    def patch(number: int) -> None:
        original, sent = getattr(owner, name), list[bool]()

        def called(*given: Any, **named: Any) -> Any:
            if not sent and when(*given):
                sent.append(True)
                os.kill(os.getpid(), number)
                then()
            return original(*given, **named)

        setattr(owner, name, called)

    return patch


def sleep() -> None:
    time.sleep(LONG)
    os._exit(98)  # it was not broken off


at = lambda step: lambda trainer, *more: trainer.progress.step == step  # noqa: E731
saving = lambda step: lambda operation, path: f"step_{step:08d}.tmp/average" in str(path)  # noqa: E731
POINTS = {  # where it comes, and the step whose checkpoint is there afterwards
    "import": (before(command, "_train", then=sleep), None),
    "data": (before(Digits, "read", then=sleep), None),
    "compile": (before(Denoising, "loss", then=sleep), None),  # within the first step
    "step": (before(Trainer, "step", at(1)), 2),
    "save": (before(storage, "watch", saving(3)), 3),
    "evaluate": (before(Denoising, "evaluate", then=sleep), 2),
    "preview": (before(Denoising, "preview", then=sleep), 2),
    "sampling": (before(Watch, "__call__", then=sleep), 2),
    "last save": (before(storage, "watch", saving(6)), 6),
    "afterwards": (before(storage, "watch", lambda operation, path: "loss.png" in str(path)), 6),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("whole"), *WORDS)


def started(outputs: Path, patch: Callable[[int], None], number: int) -> int:
    """The installed command in a process of its own, told by a signal at that point; its exit status."""

    def work() -> None:
        sys.argv = ["diffusion-train", *words(outputs, *WORDS)]
        patch(number)
        try:
            command.main()
        except SystemExit as end:
            os._exit(int(end.code or 0))

    return in_child(work)


def stops_and_goes_on(point: str, number: int, whole: Path, outputs: Path) -> None:
    patch, expected = POINTS[point]
    code, run = started(outputs, patch, number), outputs / "run"
    folders = checkpoint.folders(run / "checkpoints")
    assert (int(folders[0].name[5:]) if folders else None) == expected
    status = status_of(run)
    if point == "last save":  # nothing was left to do: it finished
        assert (code, status["state"]) == (0, "finished")
    else:
        assert code == 128 + number
        if point == "import":
            assert not run.exists()
        else:
            assert (status["state"], status["code"]) == ("preempted", 128 + number)
            assert status["reason"].startswith(f"stopped by {signal.Signals(number).name}")
    assert_equal(train(outputs, *WORDS), whole)


@pytest.mark.parametrize("point", ["data", "save", "preview"])
def test_a_signal_at_some_points(point: str, whole: Path, tmp_path: Path) -> None:
    stops_and_goes_on(point, NUMBERS[list(POINTS).index(point) % 4], whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("point", POINTS)
def test_every_signal_at_every_point(point: str, number: int, whole: Path, tmp_path: Path) -> None:
    stops_and_goes_on(point, number, whole, tmp_path)


@pytest.mark.parametrize("number", NUMBERS[:1])
def test_a_second_signal_ends_at_once(number: int, whole: Path, tmp_path: Path) -> None:
    """While the first one is being answered by a save: and the same command goes on from there too."""

    def patch(number: int) -> None:
        before(Trainer, "step", at(4))(number)
        before(storage, "watch", saving(5), sleep)(number)

    assert started(tmp_path, patch, number) == -number
    assert status_of(tmp_path / "run")["state"] == "running", "it had no time to say it"
    assert_equal(train(tmp_path, *WORDS), whole)


def test_a_signal_that_a_library_swallows_is_not_lost() -> None:
    """The loop that listens next knows of it."""
    with pytest.raises(Stopped) as caught, listening(lambda: True):
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with listening() as inner:
            assert inner.number == signal.SIGTERM
            raise Stopped("told", inner.number)
    assert caught.value.code == 143


def test_handlers_are_put_back() -> None:
    kept = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(Stopped, match="SIGUSR1"), listening(lambda: True):
        signal.raise_signal(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in NUMBERS] == kept


def test_what_is_broken_off_goes_on_after_the_block() -> None:
    reached = []
    with listening() as stop:
        with stop.breaking_off():
            signal.raise_signal(signal.SIGINT)
            reached.append("within")
        assert stop.number == signal.SIGINT
        reached.append("after")
    assert reached == ["after"]
