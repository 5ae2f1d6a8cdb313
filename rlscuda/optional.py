"""Packages that only an extra brings, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def optional(name: str, extra: str) -> ModuleType:
    """Imports a package that only an extra brings.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise  # the package is there, one of its own dependencies is not
        raise ImportError(
            f"this needs the package {name}, which is not installed: pip install 'rlscuda[{extra}]'"
        ) from None
