"""The look of all figures, and matplotlib in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlscuda.optional import optional

INK, MUTED, FAINT, PAPER = "#22272e", "#57606a", "#d8dee4", "#fefefe"
KEPT, GONE, CUT, REGAINED = "#30638e", "#bccbd9", "#d1495b", "#3c9d7b"  # for the colour-blind too
STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}


@contextmanager
def drawing(**style: Any) -> Iterator[Any]:
    """Gives pyplot, to draw files; a text is no formula to it.

    Args:
        style: Of matplotlib's parameters, beside those of `STYLE`.
    """
    optional("matplotlib", "cli").use("Agg")
    pyplot = optional("matplotlib.pyplot", "cli")
    plain = {"text.parse_math": False, "text.usetex": False}
    with pyplot.rc_context({**STYLE, **style, **plain}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from (current )?font")
        yield pyplot
