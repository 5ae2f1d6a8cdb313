"""What a GPU took beside what was predicted of it: `python -m benchmarks.gpu.report check.jsonl`.

Predictions are those of `results/static_gpu.json`, where it exists: every record in it, however
deep, that has a `case` and `microseconds`, a number or one by lane; beside a number may stand the
`lane` that it is of, by default ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.sources import ROOT

PREDICTED = ROOT / "benchmarks" / "results" / "static_gpu.json"
OURS = "ours"
Key = tuple[str, str]  # case, lane


def records(node: Any) -> Iterator[dict]:
    """Every record of a document that has a case and a time."""
    if isinstance(node, dict):
        if "case" in node and "microseconds" in node:
            yield node
        else:
            node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from records(child)


def predictions(path: Path) -> dict[Key, float]:
    """Microseconds by case and lane; none where the file is missing or no JSON."""
    if not path.is_file():
        print(f"nothing predicted: there is no {path.name}")
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"nothing predicted: {path.name} is no JSON: {error}")
        return {}
    found = {}
    for record in records(document):
        times = record["microseconds"]
        times = times if isinstance(times, dict) else {record.get("lane", OURS): times}
        for lane, value in times.items():
            value = value.get("best") if isinstance(value, dict) else value
            if isinstance(value, (int, float)):
                found[record["case"], lane] = float(value)
    return found


def lines(cases: list[dict], predicted: dict[Key, float]) -> list[str]:
    """A line for each lane of each case that was timed, and what was predicted but not timed."""
    out = [f"{'case: lane':60} {'measured':>12} {'predicted':>12} {'ratio':>7}"]
    left = dict(predicted)
    for record in cases:
        first = next(iter(record["microseconds"]))
        for lane, times in record["microseconds"].items():
            key = record["case"], lane
            if lane == first and key not in left:
                key = record["case"], OURS
            text = f"{record['case']}: {lane}"[:60]
            line = f"{text:60} {times['best']:9.4g} µs"
            if key in left:
                said = left.pop(key)
                line += f" {said:9.4g} µs {times['best'] / said:7.2f}"
            out.append(line)
        targets = {k: r for k, r in record["ratios"].items() if "target" in r}
        for pair, ratio in targets.items():
            verdict = "reached" if ratio["median"] <= ratio["target"] else "MISSED"
            out.append(f"    {pair} = {ratio['median']:g}, target {ratio['target']:g}: {verdict}")
    out += [
        f"predicted, not timed: {case}: {lane}, {left[case, lane]:.4g} µs" for case, lane in left
    ]
    return out


def main(journal: Path) -> None:
    """Prints the comparison of what a journal has so far; its last line may be cut short."""
    cases = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "case" in record:
            cases.append(record)
    print("\n".join(lines(cases, predictions(PREDICTED))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
