"""How much memory there is, asked before much of it is taken."""

from __future__ import annotations

import os
from pathlib import Path

from rlscuda.cli.common.errors import UserError

_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container this process runs in."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(_GROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return memory


def check_fits(what: str, size: int) -> None:
    """Checks that something takes at most half of the memory, since it is copied on its way.

    Args:
        what: What it is, for the error.
        size: Its bytes.

    Raises:
        UserError: It takes more.
    """
    memory = machine_memory()
    if size > memory // 2:
        raise UserError(
            f"{what} must take at most half of the {memory / 2**30:.1f} GiB of memory, got "
            f"{size / 2**30:.4g} GiB"
        )
