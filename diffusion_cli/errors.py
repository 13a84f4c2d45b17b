"""What went wrong, in the user's words: one clear line each, and the exit code that a script can ask for."""


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


class StorageError(UserError):
    """A file could not be written, read or trusted."""

    code = 74


class Stopped(UserError):
    """A signal asked the run to stop; it saved first. `code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.code = 128 + signal_number
