"""The tree and the hash of its kernel sources, for what must not need the built extension."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tree_hash() -> str:
    """The hash of the kernel sources in this tree, formed as setup.py forms it."""
    return _hash("")


def cpu_hash() -> str:
    """The same of those that a CPU runs: all outside of csrc/cuda."""
    return _hash("cuda")


def _hash(without: str) -> str:
    csrc = ROOT / "csrc"
    sources = sorted(
        path for path in csrc.rglob("*.*")
        if path.suffix in {".cpp", ".h", ".cu"} and path.relative_to(csrc).parts[0] != without
    )  # fmt: skip
    parts = [p.name.encode() + re.sub(rb"//.*|\s+", b"", p.read_bytes()) for p in sources]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
