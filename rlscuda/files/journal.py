"""A journal of finished work: one record of JSON a line, so that a kill loses what was under way.

Records are appended whole, in one write each; a last line that was cut short is dropped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Appends one record, in one write, so that two writers never mix theirs."""
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a journal, without a last line that was cut short; none where it is missing.

    Raises:
        ValueError: A line is no record.
    """
    records = []
    for number, line in enumerate(_whole(path).splitlines(), 1):
        try:
            record = json.loads(line) if line else {}
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} must be a record, got {line[:60]!r}")
        if record:
            records.append(record)
    return records


def repair(path: Path) -> None:
    """Drops a last line that an interruption cut short."""
    if path.is_file() and len(whole := _whole(path)) < path.stat().st_size:
        os.truncate(path, len(whole))


def _whole(path: Path) -> bytes:
    """All lines that have an end."""
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1]
