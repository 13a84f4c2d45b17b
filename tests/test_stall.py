"""A step that does not end is noticed, and one that is merely slow is not."""

import time
from pathlib import Path

import pytest
import tiny

from diffusion_cli.stall import LONGER, LOOK, Watch
from diffusion_cli.status import status_of


def noticed(happens: str) -> int | None:
    """Between looks a step begins "(", ends ")", does both "x", or neither: the number of the look at which it is said to
    hang, of a limit of two looks."""
    watch, called = Watch(), list[int]()
    script = iter(enumerate(happens))

    def wait(seconds: float) -> bool:
        number, what = next(script, (0, None))
        if what in ("(", "x"):
            watch.__enter__()
        if what in (")", "x"):
            watch.__exit__()
        called[:] = [number]
        return what is None

    watch.over.wait = wait  # type: ignore[method-assign, assignment]
    found = list[int]()
    watch.look(2 * LOOK, lambda: found.append(called[0]))
    return found[0] if found else None


@pytest.mark.parametrize(
    ("happens", "look"),
    [
        ("(" + "." * 99, 1 + LONGER * 2),  # the first may take longer
        ("()(" + "." * 99, 5),  # after a quick one
        ("x(" + "." * 99, 4),  # which no look saw
        ("(...)(" + "." * 99, 6 + LONGER * 3),  # after one of three looks
        ("(...)()(" + "." * 99, 10),  # the one before counts
        ("()" + "." * 99, None),  # an evaluation, which is no step
        ("()(..)" * 9, None),  # slow, and within the limit
    ],
)
def test_when_a_step_hangs(happens: str, look: int | None) -> None:
    assert noticed(happens) == look


def test_a_step_that_hangs_ends_the_run_and_leaves_what_its_threads_did(tmp_path: Path) -> None:
    def hang() -> None:
        with tiny.after_step(3, lambda: time.sleep(1000)):
            tiny.train(tmp_path, "trainer.stall=3")

    assert tiny.in_child(hang) == 75
    run = tmp_path / "run"
    status = status_of(run)
    assert (status["state"], status["code"]) == ("failed", 75)
    assert status["reason"] == f"step 2 hangs: the same command goes on; what its threads did is in {run / 'stalled_0.txt'}"
    assert "time.sleep(1000)" in (run / "stalled_0.txt").read_text() and "MainThread" in (run / "stalled_0.txt").read_text()
