"""The folder of a result: whether it can be written, and that one process at a time writes it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlscuda.cli.common.errors import UserError
from rlscuda.files.atomic import has_name, lock

_LOCK = ".rlscuda.lock"
_ATTEMPTS, _PAUSE = 10, 0.02  # who looks at a lock has it for an instant, which is no refusal


def check_writable(out: Path, what: str = "--out") -> None:
    """Checks that a folder can be written, or made where it is missing; touches nothing.

    Args:
        out: The folder.
        what: What it is, for the error.

    Raises:
        UserError: It, or of a missing one the nearest folder above it, is a file or may not be
            written.
    """
    nearest = next(path for path in (out, *out.parents) if os.path.exists(path))
    if not nearest.is_dir():
        above = "" if nearest == out else f"{out}: "
        raise UserError(f"{what} {above}{nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{what} {out} must be a folder that can be written, {nearest} cannot")


def is_empty(folder: Path) -> bool:
    """Whether a folder is missing, or holds nothing but the lock of `writing`."""
    return not folder.is_dir() or all(path.name == _LOCK for path in folder.iterdir())


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Holds a folder, made where it is missing, so that no other process writes to it meanwhile.

    The system takes the lock back from a process that is killed. A folder that was made for it and
    is left empty is removed.

    Args:
        out: The folder.

    Raises:
        UserError: Another process holds it, or it or a file in it cannot be written, as on a full
            disk.
    """
    check_writable(out)
    made = [path for path in (out, *out.parents) if not os.path.exists(path)]
    try:
        descriptor = _hold(out)
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(out / _LOCK)
            os.close(descriptor)
            with suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()
    except OSError as error:
        if not isinstance(error.filename, str | Path):
            raise
        file = Path(error.filename)
        if not {file, *file.parents} & {out, *made}:
            raise  # of a file elsewhere
        raise UserError(
            f"{file} cannot be written: {error.strerror}; the files in {out} are whole: mend that, "
            "then give the command again, with --resume where a training had begun"
        ) from None


def check_free(folder: Path) -> None:
    """Checks that no process writes to a folder now; removes what one left that was killed.

    Raises:
        UserError: One does.
    """
    path = folder / _LOCK
    for _ in range(_ATTEMPTS):
        try:
            descriptor = _open(path, os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            locked = lock(descriptor)
            if locked is not False:
                if locked and has_name(descriptor, path):
                    with suppress(OSError):
                        path.unlink()
                return
        finally:
            os.close(descriptor)
        time.sleep(_PAUSE)
    raise _in_use(folder)


def _hold(out: Path) -> int:
    """The lock file of a folder, open and locked."""
    for _ in range(_ATTEMPTS):
        out.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _open(out / _LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # the folder was removed by another process that had made it
            continue
        locked = lock(descriptor)
        if locked is None:
            print(f"{out} is on a file system without locks: nothing else may write to it now",
                  file=sys.stderr)  # fmt: skip
        if locked is not False and has_name(descriptor, out / _LOCK):
            return descriptor
        os.close(descriptor)
        time.sleep(_PAUSE)
    raise _in_use(out)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags, 0o666)
    except OSError:
        if not os.path.exists(path):
            raise
        return os.open(path, os.O_RDONLY)  # another user's, or on a disk that is read only


def _in_use(folder: Path) -> UserError:
    return UserError(
        f"{folder} is being written by another process of rlscuda: wait until it has ended, or "
        "choose another folder"
    )
