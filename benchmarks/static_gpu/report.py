"""The tables of predictions: loops, cases, whole steps."""

from __future__ import annotations

from typing import Any

from benchmarks.learning.report import markdown
from benchmarks.static_gpu.expectation import figures

FIRST, SECOND = "H200", "A100"
STEP = "step "


def report(document: dict) -> str:
    """The Markdown of a results document."""
    rows = document["rows"]
    parts = [
        "Loops over data; on H200 / on A100 where they differ. In bold a finding.",
        _loops(rows),
        "Predicted microseconds, what bounds them, and how the launch fills the GPU:",
        _cases([r for r in rows if not r["case"].startswith(STEP)]),
        f"The optimizer's own launches in one training step, {FIRST}:",
        _steps([r for r in rows if r["case"].startswith(STEP)]),
        f"Predictions, nothing measured. {document['compiler']}; "
        f"kernels {document['source_hash']}.",
    ]
    return "\n\n".join(part.rstrip() for part in parts)


def _pair(a: Any, b: Any) -> str:
    return str(a) if a == b or b is None else f"{a} / {b}"


def _loops(rows: list[dict[str, Any]]) -> str:
    loops = figures(rows)["loops"]
    found = {(r["device"], f"{r['stream']}: {r['kernel']}"): r["findings"] for r in rows}
    lines = [[
        "loop: kernel", "load, B", "store, B", "instructions a byte", "registers", "shared, B",
        "blocks an SM", "in flight an SM, KiB", "findings",
    ]]  # fmt: skip
    for name, first in loops[FIRST].items():
        second = loops.get(SECOND, {}).get(name, {})
        cells = [
            _pair(first.get(key, ""), second.get(key))
            for key in ("load", "store", "per_byte", "registers", "shared", "blocks_per_sm")
        ]
        flying = [f"{x['in_flight'] / 1024:.3g}" if x else None for x in (first, second)]
        kinds = [k for k in found[FIRST, name] if k != "issue"]
        cells += [_pair(*flying), ", ".join(f"**{k}**" for k in kinds)]
        lines.append([f"{name.replace('rls::', '')}", *cells])
    return markdown(lines)


def _cases(rows: list[dict[str, Any]]) -> str:
    others = {(r["case"], r["kernel"]): r for r in rows if r["device"] == SECOND}
    lines = [[
        "case", "kernel", "MB moved", "blocks x threads", "waves", "last wave",
        f"{FIRST}, µs", f"{SECOND}, µs",
    ]]  # fmt: skip
    for r in (r for r in rows if r["device"] == FIRST):
        other = others.get((r["case"], r["kernel"]))
        lines.append([
            r["case"], r["kernel"].replace("rls::", ""), f"{r['bytes'] / 1e6:.3g}",
            f"{r['blocks']:,} x {r['threads']}", f"{r['waves']:.2f}", f"{100 * r['tail']:.0f} %",
            _time(r), _time(other) if other else "",
        ])  # fmt: skip
    return markdown(lines)


def _time(row: dict[str, Any]) -> str:
    text = f"{row['microseconds']:.3g}, {row['bound']}"
    return f"**{text}**" if row["bound"] == "issue" else text


def _steps(rows: list[dict[str, Any]]) -> str:
    lines = [["network: form", "launches", "µs", "of these at the launch floor", "longest"]]
    for case in dict.fromkeys(r["case"] for r in rows):
        here = [r for r in rows if r["case"] == case]
        longest = max(here, key=lambda r: r["microseconds"])
        kernel = longest["kernel"].replace("rls::", "")
        lines.append([
            case.removeprefix(STEP), str(len(here)), f"{sum(r['microseconds'] for r in here):.3g}",
            str(sum(r["bound"] == "launch" for r in here)),
            f"{kernel}: {_time(longest)}",
        ])  # fmt: skip
    return markdown(lines)
