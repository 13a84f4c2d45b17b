"""One process per job, as many at once as there are slots; nothing of a job reaches the next, and no end of one is the others'.

    free slot -> next job -> its process, its log -> exit -> how it ended -> free slot

Each job is a session of its own, so Ctrl-C reaches the sweep alone, which passes it on once. A sweep that is killed closes the
jobs' standard input, on which they stop by themselves (commands/job.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from diffusion_cli import storage
from diffusion_cli.errors import Stopped
from diffusion_cli.signals import listening
from diffusion_cli.status import note_failure, status_of
from diffusion_cli.sweeps.jobs import Job
from diffusion_cli.sweeps.machine import Slot, memory_kills

POLL = 0.05  # seconds
OURS = "diffusion-train: "  # how a message of ours begins
COMMAND = ("-m", "diffusion_cli.commands.job")  # of one job, to this Python


@dataclass(frozen=True)
class Ended:
    """state: finished, pruned, preempted or failed; reason: of all but the first; seconds: from start to end."""

    job: Job
    state: str
    reason: str
    seconds: float


@dataclass
class _Running:
    job: Job
    slot: Slot
    process: subprocess.Popen[bytes]
    log: BinaryIO
    began: float
    kills: int  # of the kernel's before it
    pruned: str = ""


def run(
    jobs: Iterator[Job], slots: Sequence[Slot], begins: Callable[[Job], None], watch: Callable[[Job], str]
) -> Iterator[Ended]:
    """Yields each job as it ends, and takes the next only then: an iterator may learn from those that ended.

    begins: told of each as it starts; watch: asked again and again of each that runs, for a reason to prune it or "".
    Raises Stopped after a signal, when all have saved and ended.
    """
    free, running = list(reversed(slots)), list[_Running]()
    told = False
    with listening() as stop:
        try:
            while True:
                while free and not stop.number and (job := next(jobs, None)) is not None:
                    begins(job)
                    running.append(_start(job, free.pop()))
                if not running:
                    break
                if stop.number and not told:
                    told = True
                    _signal(running, signal.SIGTERM)
                for one in list(running):
                    if not _has_ended(one.process):
                        if not one.pruned and not told and (reason := watch(one.job)):
                            one.pruned = reason
                            _signal([one], signal.SIGUSR1)
                        continue
                    running.remove(one)
                    free.append(one.slot)
                    yield _end(one, stopping=told)
                time.sleep(POLL)
        finally:  # after a failure of ours, or when nobody asks for more
            _signal(running, signal.SIGTERM)
            for one in running:
                one.process.wait()
                _end(one, stopping=True)
    if stop.number:
        raise Stopped(f"stopped by {stop.name}: what ran is saved, and the same command goes on", stop.number)


def ending(code: int, status: dict[str, Any], pruned: str, stopping: bool, starved: bool, last_line: str) -> tuple[str, str]:
    """(state, reason) from the exit code of a process, minus the signal that ended it, and from what it wrote itself.

    status: its status.json, {} if it wrote none; starved: whether the kernel ended some process for want of memory meanwhile.
    """
    if code == 0:
        return "finished", ""
    said = status.get("state")
    if said in ("failed", "preempted"):
        if pruned and said == "preempted":
            return "pruned", pruned
        return str(said), next(iter(str(status.get("reason", "")).splitlines()), "") or f"exit code {code}"
    if stopping and code in (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT):
        return "preempted", "stopped before its first step"
    if code == -signal.SIGKILL:
        why = (
            "the system ran out of memory: fewer hydra.launcher.jobs, or a smaller batch"
            if starved
            else "kill -9, or out of memory"
        )
        return "failed", f"killed by SIGKILL ({why})"
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}"
    if last_line.startswith(OURS):
        return "failed", last_line.removeprefix(OURS)
    return "failed", f"exit code {code}" + f": {last_line}" * bool(last_line)


def _start(job: Job, slot: Slot) -> _Running:
    storage.make_folder(job.folder)
    storage.append(job.folder / "job.log", f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {job.command}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": str(slot.threads)}
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    here = not {"", os.getcwd()} & set(sys.path)  # -m would put this folder first in the search for modules
    command = [sys.executable, *["-P"] * here, *COMMAND, str(job.folder)]
    kills, log = memory_kills(), storage.log(job.folder / "job.log")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it is dead already: its exit code says more
        process.stdin.write(json.dumps(job.node).encode() + b"\n")
        process.stdin.flush()
    return _Running(job, slot, process, log, time.perf_counter(), kills)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without taking its exit status: until then no other process can have its number."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _end(one: _Running, stopping: bool) -> Ended:
    """Nothing of the job stays behind, and its status says how it ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(one.process.pid, signal.SIGKILL)  # workers that outlive it
    code = one.process.wait()
    for file in (one.process.stdin, one.log):
        with suppress(BrokenPipeError):
            file and file.close()
    folder, status = one.job.folder, status_of(one.job.folder)
    own = status if status.get("pid") == one.process.pid else {}
    log = (folder / "job.log").read_text(encoding="utf-8", errors="replace").splitlines()
    state, reason = ending(code, own, one.pruned, stopping, memory_kills() > one.kills, _last_word(log))
    busy = not own and status.get("state") == "running" and code == 74  # another process works in this run: the word is its own
    if state != "finished" and own.get("state") != state and not busy:
        note_failure(folder, reason, state, code=code, pid=one.process.pid)
    return Ended(one.job, state, reason, time.perf_counter() - one.began)


def _last_word(log: Sequence[str]) -> str:
    """The newest message of ours, else the end of a traceback."""
    messages = [line for line in log if line.startswith(OURS)]
    return (messages or [line for line in log if line.strip()] or [""])[-1]


def _signal(running: Sequence[_Running], number: signal.Signals) -> None:
    for one in running:
        with suppress(ProcessLookupError):
            one.process.send_signal(number)
