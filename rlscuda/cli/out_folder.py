"""Whether a result can be written where it is wanted: known before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from rlscuda.cli.errors import UserError


def check_writable(out: Path, what: str = "--out") -> None:
    """Check that a folder can be written, or made where it is missing; touch nothing.

    Args:
        out: the folder.
        what: what it is, for the error.

    Raises:
        UserError: it, or of a missing one the nearest folder above it, is a file or may not be
            written.
    """
    nearest = next(path for path in (out, *out.parents) if os.path.exists(path))
    if not nearest.is_dir():
        above = "" if nearest == out else f"{out}: "
        raise UserError(f"{what} {above}{nearest} is a file, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{what} {out} must be a folder that can be written, {nearest} cannot")
