"""The share of parameters that is left of many architectures when half of every coupling goes.

Of each network, with random weights, the channels are traced, half of the units of every coupling
are removed, and what is left is run in eval and training mode; torch-pruning removes half of every
layer's channels beside it. Each runs in a process of its own, under a limit of time.

    python -m benchmarks.architectures.table --workers 1          # run, or go on where it stopped
    python -m benchmarks.architectures.table --report             # the table of the results
    python -m benchmarks.architectures.table --networks 'timm: *' # some of them; --anew
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import resource
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import environment, grid
from benchmarks.learning.report import markdown

LIMIT = 120  # seconds of a process
SIDES = ("ours", "theirs")
LIBRARIES = ("torch-pruning", "torchvision", "timm", "transformers")


def one(network: str, side: str) -> dict[str, Any]:
    """What comes of one network in this process."""
    import torch

    from benchmarks.architectures import collection, pruners

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with collection.importable():
        model, example = collection.networks()[network]()
    found = getattr(pruners, side)(model, example)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found | {"gib": memory}


def run_job(job: dict, args: argparse.Namespace) -> str:
    """One network by one side, from the journal or measured."""
    record = grid.finish(job, args, _measured)
    what = record.get("failed") or f"{record['left']:.3f} left, {record['seconds']:.1f} s"
    return f"{job['network']}, {job['side']}: {what}"


def _measured(job: dict, args: argparse.Namespace) -> dict:
    command = [sys.executable, "-m", __spec__.name, "--one", job["network"], job["side"]]
    try:
        done = subprocess.run(
            command, cwd=environment.ROOT, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return job | {"failed": f"not done in {LIMIT} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return job | {"failed": last[:300]}
    return job | json.loads(done.stdout.strip().splitlines()[-1])


def report(path: Path) -> str:
    """The table of a results file, in Markdown."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    of = {(r["network"], r["side"]): r for r in runs}
    lines = [["architecture", "parameters", "left", "torch-pruning", "couplings", "seconds",
              "peak, GB", "refused"]]  # fmt: skip
    for network in dict.fromkeys(r["network"] for r in runs):
        own, other = (of.get((network, side), {}) for side in SIDES)
        cells = [_left(own), _left(other)]
        if "left" in own:
            lines.append([
                network, f"{own['parameters'] / 1e6:.1f} M", *cells, str(own["couplings"]),
                f"{own['seconds']:.0f}", f"{own['gib'] * 1.0737:.1f}", _refused(own["refused"]),
            ])  # fmt: skip
        else:
            lines.append([network, "", *cells, "", "", "", ""])
    return markdown(lines)


def _left(record: dict) -> str:
    """A share, or why there is none."""
    if "left" in record:
        return f"{record['left']:.3f}".removeprefix("0")
    reason = record.get("failed", "")
    return "" if not reason else reason if reason.startswith("not done") else _short(reason, 60)


def _refused(refused: dict[str, str]) -> str:
    """How many couplings, and the most frequent reason."""
    if not refused:
        return ""
    reasons = [re.sub(r" \(.*|:.*|'.*", "", reason) for reason in refused.values()]
    frequent = max(dict.fromkeys(reasons), key=reasons.count)
    return f"{len(refused)}: {_short(frequent, 90)}"


def _short(text: str, most: int) -> str:
    text = re.sub(r"\s+", " ", text).replace("|", "/")
    return text if len(text) <= most else text[: most - 1] + "…"


def main() -> None:
    """Run the benchmark, then print its table."""
    parser = grid.parser(__doc__, "architectures")
    parser.add_argument("--networks", help="shell pattern of those to run")
    parser.add_argument("--anew", action="store_true", help="forget what the journal has of them")
    parser.add_argument("--side", choices=SIDES, help="only ours, or torch-pruning's")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    if not args.report:
        from benchmarks.architectures import collection

        names = fnmatch.filter(collection.networks(), args.networks or "*")
        sides = [args.side] if args.side else SIDES
        if args.anew:
            grid.forget(args.journal, lambda r: r["network"] in names and r["side"] in sides)
        jobs = [{"network": name, "side": side} for side in sides for name in names]
        libraries = {name.replace("-", "_"): version(name) for name in LIBRARIES}
        grid.run(run_job, jobs, args, {"limit": LIMIT}, libraries)
    print(report(args.results))


if __name__ == "__main__":
    main()
