"""Importing libraries whose torchvision is of another build than the torch at hand."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "frameworks"


@contextmanager
def importable():
    """In the block, torchvision imports without its operators, which need its very own build.

    Nothing here uses them; timm, Lightning and transformers import it.
    """
    with mock.patch("torch.library.register_fake", lambda *_, **__: lambda function: function):
        yield


def example(name: str) -> ModuleType:
    """An example of `examples/frameworks`."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    with importable():
        return importlib.import_module(name)
