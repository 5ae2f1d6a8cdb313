"""Changes that are all made or none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_ABSENT = object()


@dataclass(eq=False)
class Change:
    """A reference to be replaced: an attribute of an object, or an item of a dict or list."""

    target: Any
    key: Any
    value: Any


def _read(target: Any, key: Any) -> Any:
    if isinstance(target, dict):
        return target.get(key, _ABSENT)
    return target[key] if isinstance(target, list) else getattr(target, key, _ABSENT)


def _write(target: Any, key: Any, value: Any) -> None:
    """Sets a reference, or removes it where `value` is that of an absent one."""
    items = isinstance(target, (dict, list))
    if value is _ABSENT:
        if items:
            target.pop(key, None)
        elif hasattr(target, key):
            delattr(target, key)
    elif items:
        target[key] = value
    else:
        setattr(target, key, value)


def commit(changes: Iterable[Change]) -> list[Change]:
    """Makes every change, in order; where one fails, takes back those before it and raises.

    Returns:
        What takes all of them back, for `revert`.
    """
    done: list[Change] = []
    try:
        for change in changes:
            # noted before it is made, since it may fail half-way
            done.append(Change(change.target, change.key, _read(change.target, change.key)))
            _write(change.target, change.key, change.value)
    except BaseException:
        revert(done)
        raise
    return done


def revert(done: list[Change]) -> None:
    """Takes back committed changes, the last one first."""
    for before in reversed(done):
        _write(before.target, before.key, before.value)
