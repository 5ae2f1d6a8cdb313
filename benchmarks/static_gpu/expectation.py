"""What the code is expected to be, and what has become worse.

expected.json has the figures of each loop by GPU, the launches and predicted microseconds of each
case by kernel, and for each finding the reason why it stands. `--update` writes the figures anew
and keeps the reasons; a finding without a reason is a complaint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).with_name("expected.json")
NO_REASON = ""
MORE_IS_WORSE = {"per_byte": 0.05, "registers": 0, "shared": 0, "launches": 0, "microseconds": 0.05}
LESS_IS_WORSE = {"load": 0, "store": 0, "in_flight": 0, "blocks_per_sm": 0}
_OF_A_LOOP = ("load", "store", "per_byte", "registers", "shared", "in_flight", "blocks_per_sm")

Figures = dict[str, dict[str, dict[str, float]]]


def figures(rows: Iterable[dict[str, Any]]) -> dict[str, Figures]:
    """The figures of all loops by GPU, and of all cases by kernel, on the first GPU."""
    loops: Figures = {}
    cases: Figures = {}
    first = None
    for row in rows:
        first = first or row["device"]
        if "load" in row:
            name = f"{row['stream']}: {row['kernel']}"
            found = {key: row[key] for key in _OF_A_LOOP if row[key] is not None}
            known = loops.setdefault(row["device"], {}).setdefault(name, found)
            for key in found:
                known[key] = (min if key in LESS_IS_WORSE else max)(known[key], found[key])
        if row["device"] == first:
            kernels = cases.setdefault(row["case"], {})
            of = kernels.setdefault(row["kernel"], {"launches": 0, "microseconds": 0.0})
            of["launches"] += 1
            of["microseconds"] = float(f"{of['microseconds'] + row['microseconds']:.4g}")
    return {"loops": loops, "cases": cases}


def reasons(rows: Iterable[dict[str, Any]], known: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The findings of all rows by stream, each with its known reason."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        for kind in row["findings"]:
            reason = known.get(row["stream"], {}).get(kind, NO_REASON)
            found.setdefault(row["stream"], {})[kind] = reason
    return found


def complaints(expected: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Kernel, figure, expected and found, of all that is worse, new or gone."""
    found, bad = figures(rows), []
    for part in ("loops", "cases"):
        for place in sorted(expected[part].keys() | found[part].keys()):
            bad += _compare(place, expected[part].get(place, {}), found[part].get(place, {}))
    now = reasons(rows, expected["findings"])
    for stream in sorted(now.keys() | expected["findings"].keys()):
        before = expected["findings"].get(stream, {})
        for kind in sorted(now.get(stream, {}).keys() | before.keys()):
            if kind not in now.get(stream, {}):
                bad.append(f"{stream}: finding {kind}: expected, found none: run with --update")
            elif not before.get(kind):
                bad.append(f"{stream}: finding {kind}: expected none, or a reason in expected.json")
    return bad


def _compare(place: str, expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    bad = []
    for kernel in sorted(expected.keys() | found.keys()):
        name = f"{place}: {kernel}"
        if kernel not in found:
            bad.append(f"{name}: expected, found none")
        elif kernel not in expected:
            bad.append(f"{name}: found, expected none: run with --update")
        else:
            for key in sorted(expected[kernel].keys() | found[kernel].keys()):
                a, b = expected[kernel].get(key), found[kernel].get(key)
                if _worse(key, a, b):
                    bad.append(f"{name}: {key}: expected {a}, found {b}")
    return bad


def _worse(key: str, expected: float | None, found: float | None) -> bool:
    if expected is None or found is None:
        return True
    if key in LESS_IS_WORSE:
        return found < expected
    return found > expected * (1 + MORE_IS_WORSE[key])


def read() -> dict[str, Any]:
    """The committed expectation."""
    return json.loads(EXPECTED.read_text(encoding="utf-8"))


def write(rows: list[dict[str, Any]], compiler: str) -> None:
    """The expectation that these rows of a compiler are, with the reasons that are known."""
    known = read()["findings"] if EXPECTED.exists() else {}
    document = {"compiler": compiler, **figures(rows), "findings": reasons(rows, known)}
    EXPECTED.write_text(as_text(document), encoding="utf-8")


def as_text(expectation: dict[str, Any]) -> str:
    """The file: a line for each loop of a GPU, for each case, for each stream with findings."""
    depth = {"compiler": 0, "loops": 2, "cases": 1, "findings": 1}
    parts = (f' "{part}": {as_lines(expectation[part], d, " ")}' for part, d in depth.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def as_lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON with a line for each object at a depth, so that a change is seen where it is."""
    if depth == 0 or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    if isinstance(value, dict):
        begin, end = "{}"
        items = [
            f"{json.dumps(key, ensure_ascii=False)}: {as_lines(v, depth - 1, inner)}"
            for key, v in value.items()
        ]
    else:
        begin, end = "[]"
        items = [as_lines(v, depth - 1, inner) for v in value]
    text = f"{begin}\n" + ",\n".join(inner + item for item in items) + f"\n{indent}{end}"
    return text + ("" if indent else "\n")
