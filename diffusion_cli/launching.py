"""distributed.processes=2: the command starts as many processes of the run on this machine, and ends as they do.

Each gets the checked config as a job of a sweep does (commands/job.py), and is told in the environment which one it is, as
torchrun tells it. If this process is killed, their standard input closes, on which they stop.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from diffusion_cli.distributed import process
from diffusion_cli.errors import Lost
from diffusion_cli.settings import Plan
from diffusion_cli.signals import listening
from diffusion_cli.status import status_of

COMMAND = ("-m", "diffusion_cli.commands.job")  # of one process, to this Python
POLL = 0.05  # seconds
LAST = 8.0  # seconds in which a process ends by itself when another has failed
LOST = 2.0  # when one was given up, and nobody saves any more


def start(plan: Plan) -> dict[str, float]:
    """Trains, here or in processes of its own, and returns the last figures. SystemExit: as those ended, who have said why."""
    count = plan.node["distributed"]["processes"] or 1
    if count == 1 or process().world > 1 or plan.root.preview is not None:
        from diffusion_cli.training import train  # torch, now that the config is known to be right

        return train(plan)
    if code := _ended(_started(plan, count)):
        raise SystemExit(code)
    return dict(status_of(Path(plan.root.outputs) / str(plan.root.name)).get("figures", {}))


def _started(plan: Plan, count: int) -> list[subprocess.Popen[bytes]]:
    """Sessions of their own, so Ctrl-C reaches this process alone, which passes it on once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count))
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": threads}
    here = not {"", os.getcwd()} & set(sys.path)  # -m would put this folder first in the search for modules
    command, ranks = [sys.executable, *["-P"] * here, *COMMAND], list[subprocess.Popen[bytes]]()
    for rank in range(count):
        environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True))
        stdin = ranks[-1].stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it is dead already: its exit code says more
            stdin.write(json.dumps(plan.node).encode() + b"\n")
            stdin.flush()
    return ranks


def _ended(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Waits for all: 0, or how the first of them ended that could say so; 128 + n where all were killed by signal n."""
    told, failed = False, 0.0
    try:
        with listening() as stop:
            while None in (codes := [one.poll() for one in ranks]):
                if stop.number and not told:
                    told = True
                    for one in ranks:
                        one.send_signal(stop.number)
                if any(codes):
                    failed = failed or time.monotonic()
                    if time.monotonic() - failed > (LOST if Lost.code in codes else LAST):
                        break
                time.sleep(POLL)
    finally:
        for one in ranks:  # and what they started
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(one.pid, signal.SIGKILL)
    ends = [one.wait() for one in ranks]
    return next((code for code in ends if code > 0), 128 - min(ends) if any(ends) else 0)
