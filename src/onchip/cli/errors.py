"""How a command fails: one line for the person, an exit code for the script."""


class Failure(Exception):
    """An error a command expects. `exit_code` is 2 for bad input, 1 for a failure while running.

    >>> raise Failure("notes.txt is empty", exit_code=2)
    Traceback (most recent call last):
    onchip.cli.errors.Failure: notes.txt is empty
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


BAD_INPUT = (ValueError, TypeError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
EXPECTED = (Failure, *BAD_INPUT, OSError, RuntimeError, ImportError)


def exit_code(error: BaseException) -> int:
    """2 where the input was at fault, 1 where the run was."""
    if isinstance(error, Failure):
        return error.exit_code
    return 2 if isinstance(error, BAD_INPUT) else 1


def one_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
