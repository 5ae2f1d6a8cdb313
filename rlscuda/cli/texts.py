"""Names that others chose, made safe for where they are shown: terminal, page and figure.

Files, layers and classes may be called anything: `$x$` is a formula to matplotlib, `[red]` a style
and `:bell:` a picture to rich, an escape sequence a command to the terminal, and a name that is no
UTF-8 cannot be written at all. JSON needs none of this: it escapes what is not ASCII.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from rlscuda.cli.extras import require

if TYPE_CHECKING:
    from rich.console import Console


def one_line(text: object) -> str:
    r"""A text whose every character can be printed; others as `repr` writes them: ``\n``."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )


def shortened(text: object, most: int) -> str:
    """One line of at most so many characters: its end, where names differ most."""
    line = one_line(text)
    return line if len(line) <= most else "…" + line[1 - most :]


def html(text: object) -> str:
    """One line as the content or an attribute of an HTML element."""
    return escape(one_line(text))


def terminal() -> Console:
    """A console on stdout to which a text is no markup; colours are given as styles."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


@contextmanager
def drawing(style: dict[str, Any]) -> Iterator[Any]:
    """Gives pyplot, to draw files in a style; a text is no formula to it.

    Args:
        style: of matplotlib's parameters.
    """
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    plain = {"text.parse_math": False, "text.usetex": False}
    with pyplot.rc_context({**style, **plain}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from (current )?font")
        yield pyplot
