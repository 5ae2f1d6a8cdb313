"""Files of a folder that take the place of earlier ones together, whenever the process is killed.

The new files are written to a folder within the folder. When it is complete, it is renamed: from
then on they are the result, and whoever next holds the folder finishes what is left to do. Up to
then the earlier files are the result, none of them touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlscuda.files.atomic import remove_leftovers, sync_folder

_NEW = ".rlscuda-new"  # being written
_READY = ".rlscuda-ready"  # complete: what has no successor in it is to be deleted
_MOVING = ".rlscuda-moving"  # deleted: what is still in it is to be moved


@contextmanager
def replaced(folder: Path, old: list[Path]) -> Iterator[Path]:
    """A new folder to write to, whose files then take the place of the old ones.

    Where the block raises, the old files stay as they were.

    Args:
        folder: Where the files are to be; it is held by this process and `finish` has run.
        old: The files in it, or in folders in it, that are replaced or, where the new folder holds
            none of their name, deleted.
    """
    new = folder / _NEW
    new.mkdir(parents=True)
    try:
        yield new
        os.replace(new, folder / _READY)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        finish(folder, old)
    except KeyboardInterrupt:
        finish(folder, old)
        raise


def finish(folder: Path, old: list[Path]) -> None:
    """Goes on where a process was killed while it replaced files of a folder, or changes nothing.

    Args:
        folder: Where the files are; it is held by this process.
        old: As for `replaced`.
    """
    new, ready, moving = (folder / name for name in (_NEW, _READY, _MOVING))
    remove_leftovers(folder)
    shutil.rmtree(new, ignore_errors=True)
    if ready.is_dir():
        sync_folder(folder)
        for path in old:
            if not (ready / path.relative_to(folder)).exists():
                path.unlink(missing_ok=True)
        os.replace(ready, moving)
        sync_folder(folder)
    if moving.is_dir():
        for path in moving.iterdir():
            os.replace(path, folder / path.name)
        moving.rmdir()
        sync_folder(folder)


def is_pending(folder: Path) -> bool:
    """Whether a process was killed while it replaced files of a folder, which is to be finished."""
    return (folder / _READY).is_dir() or (folder / _MOVING).is_dir()
