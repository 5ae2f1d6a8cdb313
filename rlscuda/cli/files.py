"""Whether a name is a file that can be read, or a folder: nothing else is ever opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rlscuda.cli.errors import UserError, reason

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_there(path: Path) -> bool:
    """Whether a regular file, or a link to one, has this name; False where nothing has it.

    Raises:
        UserError: something else has it, which could block or never end, or a link to nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(f"{path} must be a file, got a link to nothing") from None
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise UserError(f"{path} must be a file, got {kind}")
    return True


def check_folder(path: Path) -> None:
    """Check that a name is that of a folder, or of nothing.

    Raises:
        UserError: something else has it.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} must be a folder, got something else")
