"""Names that others chose, made safe for where they are shown: terminal, page and figure.

Files, layers and classes may be called anything: `$x$` is a formula to matplotlib, `[red]` a style
and `:bell:` a picture to rich, an escape sequence a command to the terminal, and a name that is no
UTF-8 cannot be written at all. JSON needs none of this: it escapes what is not ASCII.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def one_line(text: object) -> str:
    r"""A text whose every character can be printed; others as `repr` writes them: ``\n``."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )


def shortened(text: object, most: int) -> str:
    """One line of at most so many characters: its end, where names differ most."""
    line = one_line(text)
    return line if len(line) <= most else "…" + line[1 - most :]


def terminal() -> Any:
    """A `rich` console on stdout to which a text is no markup; colours are given as styles."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def print_files(console: Any, what: str, files: Iterable[Path]) -> None:
    """Names the files of a result, one a line."""
    console.print(f"\nfiles of this {what}:")
    for path in files:
        console.print(f"  {one_line(path)}", soft_wrap=True)
