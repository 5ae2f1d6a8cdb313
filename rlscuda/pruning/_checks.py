"""Checks of options."""

from __future__ import annotations

import math
import numbers


def check_number(
    name: str, value: object, least: float = -math.inf, *, whole: bool = False
) -> None:
    """Raises ValueError where an option is no number, or not in [least, inf).

    Args:
        name: Of the option.
        value: Given for it.
        least: The least that it may be.
        whole: Whether it must be an integer.
    """
    kind = numbers.Integral if whole else numbers.Real
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or not least <= value < math.inf:  # type: ignore[operator]
        what = "an integer" if whole else "a finite number"
        bound = "" if least == -math.inf else f" >= {least}"
        raise ValueError(f"{name} must be {what}{bound}, got {value!r}")
