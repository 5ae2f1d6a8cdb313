"""How the public functions call the operators, and what fake kernels check."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlscuda._torch import Operator, arguments_of

_FAILURES = ("out of memory", "CUDA")  # what begins so is no fault of the arguments


def check_tensor(name: str, value: object) -> None:
    """Raises TypeError for what is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def as_user_error(error: Exception) -> Exception:
    """The exception for the caller of a function whose operator has raised `error`.

    Operators raise RuntimeError for whatever they refuse, as the dispatcher does; a function raises
    ValueError, or TypeError where an argument is not of the type that the schema names.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or text.startswith(_FAILURES):
        return error
    if too_large := re.search(r"'int' for argument '(\w+)' but instead found type 'int'", text):
        return ValueError(f"{too_large[1]} must be a 64-bit integer")
    return (TypeError if "xpected a value of type" in text else ValueError)(text)


def call(operator: Operator, *arguments: Any) -> Any:
    """Calls an operator, and raises what `as_user_error` makes of its exception."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        for expected, value in zip(arguments_of(operator), arguments):
            if value is None and not isinstance(expected.type, torch.OptionalType):
                raise TypeError(f"{expected.name} must be a {expected.type}, got None") from None
        raise as_user_error(error) from None


def fake(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers a fake kernel, for tensors of one device: with one on `meta` it is called for all.

    Raises:
        RuntimeError: From the operator, where its tensors are not on one device.
    """

    def register(kernel: Callable[..., Any]) -> None:
        def checked(*arguments: Any) -> Any:
            given = [a if isinstance(a, (list, tuple)) else [a] for a in arguments]
            devices = {str(t.device) for some in given for t in some if isinstance(t, Tensor)}
            if len(devices) > 1:
                found = ", ".join(sorted(devices))
                raise RuntimeError(f"all tensors must be on one device, got {found}")
            return kernel(*arguments)

        torch.library.register_fake(f"rlscuda::{name}", checked)

    return register
