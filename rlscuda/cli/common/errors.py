"""What the command line shows as one line instead of a traceback, and how it gets there.

A fault of ours is no such line: whatever else is raised keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right: a wrong argument, a missing file, a corrupt checkpoint.

    Args:
        message: What was expected and what came.
        exit_code: Exit status of the process.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def reading(problem: str, after: str = "") -> Iterator[None]:
    """Turns whatever a block raises about the user's file, or in the user's code, into a line.

    Only the reading of a file, the use of what it said, or a call of the user's code may stand in
    the block: readers raise anything at all of a damaged file.

    Args:
        problem: What it means, with the file; the reason is put behind it.
        after: What follows the reason.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem}: {reason(error)}{after}") from error


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its kind."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text[:300] or type(error).__name__


def line_of(error: Exception) -> str | None:
    """The line for an exception that ends a command; None where it is a fault of this program."""
    text = str(error).partition("\n")[0]
    if isinstance(error, UserError):
        return str(error)
    if type(error) is ImportError and "pip install 'rlscuda[" in text:  # of `optional`
        return text
    if isinstance(error, OSError):
        named = ", ".join(str(name) for name in (error.filename, error.filename2) if name)
        return f"{error.strerror or error}: {named}" if named else str(error.strerror or error)
    if isinstance(error, MemoryError):
        return f"not enough memory: {text}" if text else "not enough memory"
    if isinstance(error, RuntimeError):
        if "allocate memory" in text or "out of memory" in text:
            return f"not enough memory: {text}"
        cause = error.__context__
        if "inline_container" in text and isinstance(cause, OSError):  # of torch.save
            return line_of(cause)
    return None
