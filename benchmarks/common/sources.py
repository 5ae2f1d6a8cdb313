"""The tree and the hash of its kernel sources, for what must not need the built extension."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tree_hash() -> str:
    """The hash of the kernel sources in this tree, formed as setup.py forms it."""
    sources = sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in {".cpp", ".h", ".cu"})
    parts = [p.name.encode() + re.sub(rb"//.*|\s+", b"", p.read_bytes()) for p in sources]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
