"""The installed command in two processes, as distributed.processes=2 and as torchrun start them: when one of them is killed,
raises, is stopped or hangs, all end soon, one line names it, nobody is left, and the same command goes on."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

TRAIN = str(Path(sys.executable).with_name("diffusion-train"))
STEP = 3  # at which it happens, once
LIMITS = ("distributed.patience=4", "trainer.stall=4")
WAYS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "raises": "raise ValueError('a bug')",
    "hangs": "time.sleep(1000)",
}
FAULTY = f"""
import os, signal, time
from pathlib import Path
from diffusion_cli.pace import Pace
from diffusion_cli.optimizers import ONE, AdamW

class Faulty(AdamW):
    def rate(self, step: int, total: int, pace: Pace = ONE) -> float:
        when = Path(os.environ["FAULT"])
        if step == {STEP} and os.environ["RANK"] == os.environ["FAULT_RANK"] and not when.exists():
            when.write_text(str(time.time()))
            WHAT
        return super().rate(step, total, pace)
"""
STARTS = {
    "processes": [TRAIN, "distributed.processes=2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", TRAIN],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    command = [*STARTS["processes"], *tiny.words(folder, *LIMITS)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder / "run"


def left(mark: Path) -> list[int]:
    """Processes that have the fault in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(entry.parent.name)] if f"FAULT={mark}".encode() in entry.read_bytes() else []
        except OSError:
            continue
    return found


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_one_is_lost(way: str, rank: int, start: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY.replace("WHAT", WAYS[way]))
    mark, run = tmp_path / "when", tmp_path / "run"
    environment = {**os.environ, "FAULT": str(mark), "FAULT_RANK": str(rank)}
    environment["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    words = tiny.words(tmp_path, *LIMITS, "trainer.save_every=1", "trainer.keep=9")
    command = [*STARTS[start], *words, "trust=[faulty]", "optimizer._target_=faulty.Faulty"]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    took = time.time() - float(mark.read_text())
    assert until(lambda: not left(mark), 10), f"left behind: {left(mark)}"
    gone = time.time() - float(mark.read_text())
    code = 1 if way == "raises" else 75
    assert done.returncode == (1 if start == "torchrun" else code), done.stderr  # torchrun knows no other
    who = {"raises": f"rank {rank} of 2, step {STEP}", "hangs": f"rank {rank} of 2 hangs, at step {STEP}"}
    line = who.get(way, f"rank {rank} of 2 is gone or hangs, at step {STEP}")
    told = [one for one in done.stderr.splitlines() if re.match(r"(\[rank\d\]: )?(diffusion-train: |rank \d of 2)", one)]
    assert len(told) == 1 and line in told[0], done.stderr
    status = json.loads((run / "status.json").read_text())
    reason = "a bug" if (way, rank) == ("raises", 0) else line  # whose own step stands beside it
    assert (status["state"], status["code"], status["step"]) == ("failed", code, STEP) and reason in status["reason"], status

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "going on from step 3" in again.stdout, again.stderr
    assert tiny.hashes(run) == tiny.hashes(whole)
    print(f"rank {rank} {way}, {start}: the command ended after {took:.1f} s, the last process after {gone:.1f} s")
