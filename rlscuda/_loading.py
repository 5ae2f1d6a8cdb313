"""The extension; and in one line what an import says where it cannot be loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch  # its libraries must be loaded before the extension

__all__ = ["OLDEST_TORCH", "_C"]
OLDEST_TORCH = "2.10"  # whose LibTorch stable ABI the extension is built on


def check_torch(version: str) -> None:
    """Compares a version of torch with the oldest that the extension loads in, as numbers.

    Args:
        version: As `torch.__version__` gives it: "2.13.0+cpu", "2.10.0a0+git1234567".

    Raises:
        ImportError: It is older.
    """
    found, oldest = (re.match(r"(\d+)\.(\d+)", text) for text in (version, OLDEST_TORCH))
    if found and oldest and tuple(map(int, found.groups())) < tuple(map(int, oldest.groups())):
        raise ImportError(
            f"rlscuda needs torch {OLDEST_TORCH} or newer, got {version}: pip install -U torch"
        )


def failure(error: ImportError, torch_version: str) -> ImportError:
    """The error to raise in place of the one of `from rlscuda import _C`."""
    if (error.path or "").endswith((".so", ".pyd")):
        return ImportError(f"rlscuda's extension does not load in torch {torch_version}: {error}")
    if error.name not in ("rlscuda", "rlscuda._C"):
        return error  # of another package, which the extension itself imports
    folder = Path(__file__).parent
    built = ", ".join(sorted(path.name for path in folder.glob("_C.*") if path.suffix != ".pyi"))
    return ImportError(
        f"rlscuda's extension is not built for Python {sys.version_info[0]}.{sys.version_info[1]}: "
        f"in {folder} is {built or 'none'}; in a checkout python -m pip install -e . builds it"
    )


check_torch(torch.__version__)
try:
    from rlscuda import _C
except ImportError as error:
    raise failure(error, torch.__version__) from None
