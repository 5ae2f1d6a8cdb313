"""Files that are either the old ones or the new ones, whenever the process is killed."""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # a system without flock
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace `path` by what `write` puts into a file object.

    The bytes go to a temporary file in the same folder, of a name that no other writer has, reach
    the disk (fsync), and take the name in one step (`os.replace`). Of several that write one file
    at once the last one wins, whole. If writing fails, `path` is as it was. Temporary files that
    killed processes left in the folder are removed.

    Args:
        path: The file; its folder is created if it is missing.
        write: Called once with a binary file object open for writing.

    Raises:
        OSError: The file cannot be written, as on a full disk; its `filename` is `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    file: _File | None = None
    try:
        with _temporary(path.parent) as file, io.BufferedWriter(file) as stream:
            write(stream)
            stream.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
    except BaseException as error:
        if file is not None:
            Path(file.name).unlink(missing_ok=True)
        cause = file.failure if file is not None and file.failure else error
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        if cause.filename is not None and Path(cause.filename).parent != path.parent:
            raise  # of another file, which `write` reads
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for a UTF-8 text."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in ``folder`` whose writers were killed.

    A writer holds a lock on its file, which the system takes back from a killed process. Where
    the file system has no locks, nothing is removed.
    """
    for path in folder.glob(".rlscuda-*.tmp"):
        try:
            with open(path, "rb+") as file:
                if lock(file.fileno()):
                    path.unlink()
        except OSError:  # it is gone already, or another user's
            continue


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file until its descriptor is closed, or the process ends.

    Args:
        descriptor: Of the file, open for writing unless the lock is shared.
        shared: Whether others may have a shared lock too.
        wait: Whether to wait for the process that has the lock.

    Returns:
        Whether the file is locked now; None where the file system has no locks.
    """
    if fcntl is None:
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def has_name(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _File(io.FileIO):
    """A file that remembers why it could not be written: `torch.save` raises something else."""

    failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def _temporary(folder: Path) -> _File:
    """A new file in the folder, locked as long as it is open."""
    while True:
        path = folder / f".rlscuda-{secrets.token_hex(8)}.tmp"
        file = _File(path, "xb")
        lock(file.fileno(), wait=True)
        if has_name(file.fileno(), path):
            return file
        file.close()  # taken for a leftover before it was locked
