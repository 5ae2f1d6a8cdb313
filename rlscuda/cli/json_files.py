"""JSON files: read with one clear error, written in one step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rlscuda.cli.errors import UserError, reading
from rlscuda.cli.files import is_there
from rlscuda.files.atomic import write_text

LARGEST = 2**28  # bytes of a document; what a run writes is a thousandth of it


def write_json(path: Path, document: Any) -> None:
    """Replace ``path`` by a document; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_without_nan(document), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a document.

    Raises:
        UserError: the file is missing or no JSON.
    """
    if not is_there(path):
        raise UserError(f"{path} cannot be read as JSON: no such file")
    with reading(f"{path} cannot be read as JSON"):
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"it must have at most {LARGEST} bytes, got {size}")
        return json.loads(path.read_text(encoding="utf-8"))


def _without_nan(document: Any) -> Any:
    """The document with null where a number is NaN or infinite, which JSON cannot say."""
    if isinstance(document, dict):
        return {key: _without_nan(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_without_nan(value) for value in document]
    if isinstance(document, float) and not math.isfinite(document):
        return None
    return document
