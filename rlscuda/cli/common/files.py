"""Files that are read only where a name is that of a file, and JSON documents."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from rlscuda.cli.common.errors import UserError, reading, reason
from rlscuda.files.atomic import write_text

LARGEST = 2**28  # bytes of a document; what a run writes is a thousandth of it
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
        UserError: Something else has it, which could block or never end, or a link to nothing.
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
    """Checks that a name is that of a folder, or of nothing.

    Raises:
        UserError: Something else has it.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} must be a folder, got something else")


def write_json(path: Path, document: Any) -> None:
    """Replaces a file by a document; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_without_nan(document), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a document.

    Raises:
        UserError: The file is missing or no JSON.
    """
    if not is_there(path):
        raise UserError(f"{path} cannot be read as JSON: no such file")
    with reading(f"{path} cannot be read as JSON"):
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"it must have at most {LARGEST} bytes, got {size}")
        return json.loads(path.read_text(encoding="utf-8"))


def _without_nan(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _without_nan(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_without_nan(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document
