"""One job of a sweep, or one process of a run that has several: its config, checked, comes as JSON, and training follows.

    python -m diffusion_cli.commands.job outputs/sweep/lr_0.001 < config.json

The sweep holds the other end of standard input as long as it lives. When that closes, the job stops as on SIGTERM: saved.
"""

import json
import os
import signal
import sys
import threading

from diffusion_cli import config, launching
from diffusion_cli.errors import UserError
from diffusion_cli.signals import listening


def main() -> None:
    try:
        with listening(lambda: True):
            # ends a job that is not worth its time, while it trains (where it listens again); before and after that nothing
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            node = json.loads(sys.stdin.readline())
            threading.Thread(target=_follow, args=(0,), daemon=True).start()
            launching.start(config.check_train(node))
    except UserError as error:
        print(f"diffusion-train: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)


def _follow(descriptor: int) -> None:
    """Waits for the end of the sweep."""
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
