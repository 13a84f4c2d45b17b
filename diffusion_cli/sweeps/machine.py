"""What this machine has to share among the jobs of a sweep, asked without torch, and how it is dealt out."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from diffusion_cli.sweeps.settings import Processes

JOB_MEMORY = 1.5e9  # bytes of main memory that a small run takes: torch alone is 0.5e9


@dataclass(frozen=True)
class Machine:
    """cores: that this process may use; memory: bytes that are free; gpus: as CUDA_VISIBLE_DEVICES names them."""

    cores: int
    memory: float
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """The share of one job. gpu: None leaves the environment as it is."""

    threads: int
    gpu: str | None = None


def deal(machine: Machine, words: Processes, jobs: int | None, threads: int | None = None) -> list[Slot]:
    """A slot for each job at a time. threads: what the environment asks for, if it does.

    jobs: of the whole sweep if known, the finished ones too, so that what an interrupted sweep left over computes with the same
    number of threads and so to the same bits.
    """
    gpus = machine.gpus if words.gpus == "auto" else tuple(map(str, words.gpus))
    if words.jobs != "auto":
        count = words.jobs
    elif gpus:
        count = len(gpus)
    else:
        each = threads if words.threads == "auto" and threads else 1 if words.threads == "auto" else words.threads
        count = max(1, min(machine.cores // each, int(machine.memory / JOB_MEMORY)))
    count = count if jobs is None else max(1, min(count, jobs))
    share = (threads or max(1, machine.cores // count)) if words.threads == "auto" else words.threads
    return [Slot(share, gpus[i % len(gpus)] if gpus else None) for i in range(count)]


def this_machine() -> Machine:
    return Machine(_cores(), _memory(), _gpus())


def asked_threads() -> int | None:
    """OMP_NUM_THREADS, if it is a number."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else None


def memory_kills() -> int:
    """How often the kernel has ended a process for want of memory since it started (Linux 4.13 and later)."""
    return _numbers("/proc/vmstat").get("oom_kill", 0)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a container's share: "quota period" in microseconds, or "max period"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _memory() -> float:
    free = 1024.0 * _numbers("/proc/meminfo").get("MemAvailable:", 0) or float("inf")
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        return free if limit.strip() == "max" else min(free, float(limit) - float(used))
    except (OSError, ValueError):
        return free


def _gpus() -> tuple[str, ...]:
    """By nvidia-smi, which answers in a fraction of the time that torch takes to be imported."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))
    if shutil.which("nvidia-smi") is None:
        return ()
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.split()) if done.returncode == 0 else ()


def _numbers(path: str) -> dict[str, int]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in map(str.split, lines) if len(words) > 1 and words[1].isdecimal()}
