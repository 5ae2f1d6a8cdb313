"""Whether plain data from a file are what the code expects: checked against type hints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import Tensor


def check(value: Any, hint: Any, where: str) -> None:
    """Checks a value of a file all the way down.

    Args:
        value: Of `json.loads` or `torch.load`.
        hint: `bool`, `int` (of 64 bits), `float` (whole numbers too), `str`, `Tensor` (dense, with
            data), `Any`, `list[T]`, `tuple[...]`, `dict[str, T]`, `T | None`; a TypedDict, or a
            dataclass for a dict of its fields. More keys than these have are let be.
        where: What the value is, for the error.

    Raises:
        ValueError: It is of another type; the message says what of it, what was expected and what
            came.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return
        (hint,) = (option for option in arguments if option is not NoneType)
        check(value, hint, where)
    elif dataclasses.is_dataclass(hint) or is_typeddict(hint):
        _check_keys(value, hint, where)
    elif origin is dict:
        _require(isinstance(value, dict), hint, where, value)
        for key, entry in value.items():
            check(key, arguments[0], f"a key of {where}")
            check(entry, arguments[1], f"{where}[{short(key)}]")
    elif origin is list:
        _require(isinstance(value, list), hint, where, value)
        _check_items(value, [arguments[0]] * len(value), where)
    elif origin is tuple:
        _require(isinstance(value, tuple), hint, where, value)
        hints = [arguments[0]] * len(value) if arguments[-1] is ... else list(arguments)
        _require(len(hints) == len(value), hint, where, value)
        _check_items(value, hints, where)
    else:
        _require(_is_a(value, hint), hint, where, value)


def short(value: Any) -> str:
    """A value as an error shows it: its start, or the shape of a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} {value.dtype} on {value.device}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if isinstance(value, (str, bool, float, NoneType)) else str(type(value))
    if type(value) is int:
        text = str(value) if abs(value) < 2**64 else f"an int of {value.bit_length()} bits"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_a(value: Any, hint: Any) -> bool:
    if hint is Tensor:
        return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if hint in (int, float):
        is_int = type(value) is int and -(2**63) <= value < 2**63
        return is_int or (hint is float and type(value) is float)
    return type(value) is hint


def _check_keys(value: Any, hint: Any, where: str) -> None:
    _require(isinstance(value, dict), dict, where, value)
    hints = get_type_hints(hint)
    for name, entry_hint in hints.items():
        if name in value:
            check(value[name], entry_hint, f"{name} of {where}")
        elif not is_typeddict(hint) or name in hint.__required_keys__:
            raise ValueError(f"{where} must have {', '.join(hints)}; {name} is missing")


def _check_items(value: Iterable[Any], hints: Iterable[Any], where: str) -> None:
    for place, (item, hint) in enumerate(zip(value, hints)):
        check(item, hint, f"{where}[{place}]")


def _require(ok: bool, hint: Any, where: str, value: Any) -> None:
    if not ok:
        name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
        raise ValueError(f"{where} must be of the type {name}, got {short(value)}")
