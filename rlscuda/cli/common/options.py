"""Options that are declared once, in the fields of a dataclass, and the texts that they may have.

    @dataclass
    class Config:
        epochs: int = option(10, "Passes over the training images.", least=1)

is `--epochs` of a command, its help, its default and its range.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.files.documents import check

MOST = 10**9  # of any count, so that products of counts stay within 64 bits
_POWERS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its type and default; None passes every range.

    Attributes:
        help: What it is.
        least: Of a whole number.
        most: Of a whole number with a least.
        above: The bound that a number must exceed.
        below: The bound that a number with a lower one must stay under.
        choices: The texts that it may be.
    """

    help: str
    least: int | None = None
    most: int = MOST
    above: float | None = None
    below: float = math.inf
    choices: Iterable[str] | None = None

    def check(self, flag: str, value: Any) -> None:
        """Checks a value.

        Raises:
            UserError: It is out of its range.
        """
        if self.choices is not None:
            one_of(flag, value, self.choices)
        if self.least is not None:
            in_range(flag, value, self.least, self.most)
        if self.above is not None and not self.above < value < self.below:
            expected = f"lie between {self.above:g} and {self.below:g}, both excluded"
            expected = "be a positive number" if self.below == math.inf else expected
            raise UserError(f"{flag} must {expected}, got {value}")


_Options = TypeVar("_Options")


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field of a dataclass that is an option, see `Option`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **limits)})


def flag_of(name: str) -> str:
    """`--batch-size` of `batch_size`."""
    return "--" + name.replace("_", "-")


def declared(kind: type) -> Iterator[tuple[dataclasses.Field, Any, Option]]:
    """The fields of a dataclass that are options, with their types."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if "option" in field.metadata:
            yield field, hints[field.name], field.metadata["option"]


def check_options(config: Any) -> None:
    """Checks the range of each option of a dataclass.

    Raises:
        UserError: One is out of it.
    """
    for field, _, declaration in declared(type(config)):
        if (value := getattr(config, field.name)) is not None:
            declaration.check(flag_of(field.name), value)


def resumed(kind: type[_Options], what: str, stored: Any, given: Mapping[str, Any]) -> _Options:
    """The options of what was begun, checked against those given again.

    Args:
        kind: A dataclass of options, one of which is `data`.
        what: Was begun, as `run`.
        stored: The options in its `config.json`.
        given: The options written on the command line now.

    Raises:
        UserError: The stored options are not of this kind, or an option given now differs from the
            stored one. Only `data` may: the files can have moved, and their fingerprint is checked.
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(stored, dict) or stored.keys() != names:
        raise UserError("config.json does not hold the options of this version of rlscuda")
    with reading("config.json"):
        check(stored, kind, "the options")
    for name, value in given.items():
        if name != "data" and stored[name] != value:
            raise UserError(
                f"--resume continues the {what} as it was started: {flag_of(name)} was "
                f"{stored[name]}, got {value}; start another {what} with --out"
            )
    return kind(**{**stored, "data": given.get("data", stored["data"])})


def in_range(what: str, value: int, least: int, most: int = MOST) -> None:
    """Checks a whole number.

    Raises:
        UserError: It is less than `least` or more than `most`.
    """
    if value < least:
        raise UserError(f"{what} must be at least {least}, got {value}")
    if value > most:
        raise UserError(f"{what} must be at most {most}, got {value}")


def one_of(flag: str, value: str, allowed: Iterable[str]) -> None:
    """Checks a text.

    Raises:
        UserError: It is none of those allowed.
    """
    if value not in allowed:
        raise UserError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")


def read_list(flag: str, text: str, allowed: Iterable[str], what: str) -> tuple[str, ...]:
    """The entries of a comma list, each one of those allowed and none twice.

    Raises:
        UserError: They are not; `what` an entry is, for the error.
    """
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        one_of(flag, name, allowed)
    if len(set(names)) != len(names):
        raise UserError(f"{flag} names one {what} twice: {text}")
    return names


def read_pairs(flag: str, parts: Iterable[str], text: str) -> dict[str, str]:
    """The values of `NAME=VALUE` by name; `text` is what was given, for the error.

    Raises:
        UserError: A name stands there twice.
    """
    values: dict[str, str] = {}
    for part in parts:
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name in values:
            raise UserError(f"{flag} names {name} twice: {text}")
        values[name] = value
    return values


def read_amount(flag: str, text: str) -> float:
    """A size, such as `250000`, `250k` or `1.5M`; or a share: `0.5`, `0.5x`, `50%`.

    Returns:
        The share, in (0, 1), or the size, 1 or more.

    Raises:
        UserError: It is neither.
    """
    number, unit = _number(text, "%|x|[kMGT]?")
    is_share = unit in ("%", "x") or (not unit and number < 1)
    value = number / 100 if unit == "%" else number * _POWERS.get(unit, 1)
    if (0 < value < 1) if is_share else 1 <= value < math.inf:
        return value if is_share else float(int(value))
    raise UserError(
        f"{flag} must be a number such as 250000 or 1.5M, or a share of the whole between 0 and 1 "
        f"such as 0.5x or 50%, got {text!r}"
    )


def read_rise(flag: str, text: str) -> float:
    """A relative rise: `0.1` or `10%`.

    Raises:
        UserError: It is none.
    """
    number, unit = _number(text, "%?")
    if number == math.inf:
        raise UserError(f"{flag} must be a rise such as 0.1 or 10%, got {text!r}")
    return number / 100 if unit else number


def read_ratio(text: str, flag: str = "--ratio") -> float | dict[str, float]:
    """A ratio of channels in [0, 1), or such ratios by name or shell pattern of a coupling.

    Raises:
        UserError: It is neither.
    """
    if "=" in text:
        pairs = read_pairs(flag, text.split(","), text)
        return {name: _share(flag, value) for name, value in pairs.items()}
    return _share(flag, text)


def read_count(flag: str, name: str, text: str) -> int:
    """A whole number from 1 on, one of several in an option's text.

    Raises:
        UserError: It is none, or too large.
    """
    number = int(text) if re.fullmatch(r"\d{1,18}", text) else 0
    if number < 1:
        raise UserError(f"{flag}: {name} must be a whole number >= 1, got {text!r}")
    in_range(f"{flag}: {name}", number, 1)
    return number


def _number(text: str, units: str) -> tuple[float, str]:
    """A number and its unit; an infinite one where the text is neither."""
    match = re.fullmatch(rf"(\d+\.?\d*|\.\d+)\s*({units})", text.strip())
    return (float(match[1]), match[2]) if match else (math.inf, "")


def _share(flag: str, text: str) -> float:
    number, unit = _number(text, "%?")
    value = number / 100 if unit else number
    if not 0 <= value < 1:
        raise UserError(f"{flag} must lie in [0, 1), such as 0.7 or 70%, got {text!r}")
    return value
