"""Signals ask, loops answer: the first one sets a request that every loop polls, so what is half done can be left in order.

Where nothing is there that could be lost (before the first step, within a preview) nobody waits for a poll: the signal breaks
the work off at once.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from diffusion_cli.errors import Stopped

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(KeyboardInterrupt):
    """Breaks work off from within; not an Exception, which libraries catch. `listening` makes a Stopped of it."""

    def __init__(self, number: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} before there was anything new to save: the same command goes on")
        self.number, self.code = number, 128 + number


class StopRequest:
    """Set by the first SIGTERM, SIGINT, SIGUSR1 or SIGUSR2; a second one ends the process at once."""

    def __init__(self, at_once: Callable[[], bool] = lambda: False) -> None:
        self.number, self._at_once, self._breaks_off = 0, at_once, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number
        if self._breaks_off or self._at_once():
            raise Interrupted(number)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """A signal ends the block at once, wherever it is; what follows it looks at `number`."""
        self._breaks_off = True
        try:
            yield
        except Interrupted:
            if self._at_once():
                raise
        finally:
            self._breaks_off = False


@contextmanager
def listening(at_once: Callable[[], bool] = lambda: False) -> Iterator[StopRequest]:
    """A stop request that signals set as long as the block runs. Raises Stopped where one came while `at_once()` held."""
    request = StopRequest(at_once)
    before = {number: signal.signal(number, request) for number in _NUMBERS}
    # a library may have caught the exception of a request around this one, which is then still unanswered
    request.number = next((handler.number for handler in before.values() if isinstance(handler, StopRequest)), 0)
    try:
        yield request
    except Interrupted as error:
        raise Stopped(str(error), error.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
