"""Optional dependencies, imported when a command needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from rlscuda.cli.errors import UserError

_EXTRA_OF = {
    "torchvision": "vision",
    "torch_pruning": "pruning",
    "safetensors": "pruning",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}


def require(*modules: str) -> ModuleType:
    """Import ``modules`` and return the last one.

    Raises:
        UserError: one of them is not installed; the message names the extra that brings it.
    """
    module: ModuleType | None = None
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or name
            if missing.partition(".")[0] != name.partition(".")[0]:
                raise  # the package is there, one of its own dependencies is not
            extra = _EXTRA_OF.get(name.partition(".")[0], "cli")
            raise UserError(
                f"this command needs the package {name}, which is not installed: "
                f"pip install 'rlscuda[{extra}]'"
            ) from None
    if module is None:
        raise ValueError("require() needs at least one module name")
    return module
