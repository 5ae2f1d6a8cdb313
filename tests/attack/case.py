"""One damage and what reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from damages import Damage

Action = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One damage and what reads it.

    Attributes:
        name: where and what.
        apply: damages the workspace, which is the current folder.
        argv: the command; None where ``call`` reads instead.
        call: a function of the library.
        size: bytes that a file may have: a disk that is full beyond them.
    """

    name: str
    apply: Callable[[Random], object]
    argv: tuple[str, ...] | None = None
    call: Action | None = None
    size: int | None = None

    @property
    def late(self) -> bool:
        """Whether it is what test images hold, which are read at the end of a training."""
        return "new" in (self.argv or ()) and "test" in self.name


def file(path: str, damage: Damage) -> Callable[[Random], object]:
    return lambda random: damage(Path(path), random)


def spread(count: int, *lists: Any) -> Iterator[tuple[Any, ...]]:
    """``count`` combinations of one thing from each list, all of them in turn."""
    for number in range(count):
        chosen = []
        for things in lists:
            number, place = divmod(number, len(things))
            chosen.append(things[place])
        yield tuple(chosen)


def nothing(random: Random) -> None:
    """No damage: the command itself is what is wrong."""
