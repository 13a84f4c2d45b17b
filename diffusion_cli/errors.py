"""What went wrong, in the user's words: one clear line each, and the exit code that a script can ask for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Ends the command with its message alone, never a traceback. `code` is the exit status."""

    code = 1


class ConfigError(UserError):
    """A word of the command line or a YAML file is wrong."""

    code = 64


class DataError(UserError):
    """Pictures are missing, unreachable or unreadable."""

    code = 65


class NumericError(UserError):
    """The numbers left the finite."""

    code = 70


class OutOfMemory(UserError):
    """The device or the machine has too little memory."""

    code = 71


class StorageError(UserError):
    """A file could not be written, read or trusted."""

    code = 74


class Lost(UserError):
    """Another process of the same run is gone; nothing is wrong here."""

    code = 75


class Stopped(UserError):
    """A signal asked the run to stop; it saved first. `code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.code = 128 + signal_number


_NO_MEMORY = re.compile(  # the last is what oneDNN says; those before it are of sizes beyond 64 bits
    r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED|"
    r"size calculation overflowed|overflow when unpacking|"
    r"could not (create|execute) a primitive",
    re.IGNORECASE,
)


def lacks_memory(error: BaseException) -> bool:
    """Whether it says that an allocation failed: of Python, NumPy (a ValueError), torch on a CPU (a RuntimeError; a TypeError
    where one size is beyond 64 bits) or a GPU."""
    if isinstance(error, ValueError):
        return "array is too big" in str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | TypeError) and bool(_NO_MEMORY.search(str(error)))
    )


@contextmanager
def advising_on_memory(*advice: str) -> Iterator[None]:
    """An allocation that fails in the block ends it with one line that says what to try."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "MemoryError"
        raise OutOfMemory(f"out of memory ({reason}): try {', '.join(advice[:-1])} or {advice[-1]}") from None
