"""What a GPU took beside what was predicted of it: `python -m benchmarks.gpu.report check.jsonl`.

Predictions are the rows of `results/static_gpu.json`, where it exists: a launch each, with its
`case`, `device` and `microseconds`. The launches of a case are added up.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.common.sources import ROOT

PREDICTED = ROOT / "benchmarks" / "results" / "static_gpu.json"
# how the operator of a lane is called there, around the name of the case
NAMES = {
    "ours": "update {}",
    "held": "held {}",
    "mean": "mean {}",
    "sketch, r = 1": "sketch {}",
    "sample, r = 16": "sample {}, r = 16",
}


def predictions(path: Path, device: str) -> dict[str, float]:
    """Microseconds by case on a device; none, and a word why, where there are no such rows."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        print(f"nothing predicted: {path.name} has no rows ({type(error).__name__})")
        return {}
    found: dict[str, float] = defaultdict(float)
    for row in rows:
        if row["device"] in device:
            found[row["case"]] += row["microseconds"]
    if not found:
        print(f"nothing predicted: {path.name} has no rows of {device}")
    return dict(found)


def lines(cases: list[dict], predicted: dict[str, float]) -> list[str]:
    """A line for each lane of each case that was timed, and for each target."""
    out = [f"{'case: lane':60} {'measured':>12} {'predicted':>12} {'ratio':>7}"]
    for record in cases:
        for lane, times in record["microseconds"].items():
            text = f"{record['case']}: {lane}"[:60]
            line = f"{text:60} {times['best']:9.4g} µs"
            said = predicted.get(NAMES.get(lane, "").format(record["case"]))
            if said is not None:
                line += f" {said:9.4g} µs {times['best'] / said:7.2f}"
            out.append(line)
        for pair, ratio in record["ratios"].items():
            if "target" in ratio:
                verdict = "reached" if ratio["median"] <= ratio["target"] else "MISSED"
                target = f"target {ratio['target']:g}: {verdict}"
                out.append(f"    {pair} = {ratio['median']:g}, {target}")
    return out


def main(journal: Path) -> None:
    """Prints the comparison of what a journal has so far; its last line may be cut short."""
    cases, device = [], ""
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        device = record.get("device") or device
        if "case" in record:
            cases.append(record)
    print("\n".join(lines(cases, predictions(PREDICTED, device))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
