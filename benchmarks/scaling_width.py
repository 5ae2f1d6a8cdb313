"""Time and memory of a step by width, depth, batch and rank: `python -m benchmarks.scaling_width`.

Networks are linear layers of one width n without bias, ReLU between them; each of the four is
varied alone. Timed are the optimizer's step and the whole training step (forward, backward, step),
in the thread's own time on one thread, the optimizers taking turns, so that others on the machine
cost little but caches. State is what lies between two steps; the peak is that, the weights, and
what one training step adds: gradients, activations, temporary matrices; it is read from torch's
allocations, or where a step is slow from the resident memory, since large tensors are mapped alone.

Exponents are fitted over the upper half of a range, on logarithms. Each finished case is written,
and a case that is in the results of the same kernels is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW, Muon

from benchmarks.common import environment
from benchmarks.common.harness import growth, live_bytes
from benchmarks.learning.report import markdown
from rlscuda import RLSOptimizer

RESULT = Path(__file__).resolve().parent / "results" / "scaling_width.json"
PLOT = RESULT.with_suffix(".png")
BASELINE = "AdamW"
OURS = ("RLS spectral", "RLS adaptive")
# of the spectral form's blocks of 64 rows: FLOP over n² of products, over n of inverse roots, whose
# products are symmetric
BLOCKS, ROOTS = 3 * 64, 9 * 64**2


@dataclass(frozen=True)
class Case:
    """One network and minibatch."""

    width: int = 1024
    depth: int = 2
    batch: int = 128
    rank: int = 16


SERIES = {
    "width": [Case(width=2**k) for k in range(6, 14)],
    "depth": [Case(width=512, depth=2**k) for k in range(5)],
    "batch": [Case(batch=2**k) for k in range(4, 13)],
    "rank": [Case(rank=2**k) for k in range(9)],
}
OPTIMIZERS = {
    "RLS spectral": lambda model, case: RLSOptimizer(model, rank=case.rank),
    "RLS adaptive": lambda model, case: RLSOptimizer(model, form="adaptive", rank=case.rank),
    "AdamW": lambda model, case: AdamW(model.parameters(), fused=True),
    "Muon": lambda model, case: Muon(model.parameters()),
}


class Lane:
    """A network, its optimizer and a minibatch; calling it makes a training step."""

    def __init__(self, name: str, case: Case):
        torch.manual_seed(0)
        n, layers = case.width, []
        for _ in range(case.depth):
            layers += [nn.Linear(n, n, bias=False), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])
        self.optimizer = OPTIMIZERS[name](self.model, case)
        self.x, self.y = torch.randn(2, case.batch, n)

    def __call__(self) -> tuple[float, float]:
        """Seconds of the optimizer's step, and of the whole training step."""
        start = time.thread_time()
        (self.model(self.x) - self.y).square().mean().backward()
        middle = time.thread_time()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.thread_time()
        return end - middle, end - start

    def held(self) -> int:
        """Bytes of the optimizer that stay between two steps."""
        tensors = [t for state in self.optimizer.state.values() for t in state.values()]
        tensors += getattr(self.optimizer, "_workspace", {}).values()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors if isinstance(t, torch.Tensor)
        }  # fmt: skip
        return sum(storages.values())


def measure(case: Case, seconds: float, most: int) -> dict[str, dict[str, float]]:
    """Times and bytes of a case by optimizer; of a slow optimizer by its second step alone.

    Args:
        case: What is trained.
        seconds: After which no further round begins; a training step of more is slow.
        most: Rounds at most.
    """
    lanes = {name: Lane(name, case) for name in OPTIMIZERS}
    slow = {name for name, lane in lanes.items() if lane()[1] > seconds}  # it makes its state, too
    slow.discard(BASELINE)  # all the others are ratios to it
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in lanes}
    grown = growth if slow else live_bytes
    peaks = {
        name: grown(lambda name=name, lane=lane: samples[name].append(lane()))
        for name, lane in lanes.items()
    }
    samples |= {name: [] for name in lanes if name not in slow}  # a profile slows down
    names, begun, rounds = [name for name in lanes if name not in slow], time.thread_time(), 0
    while rounds < most and (not rounds or time.thread_time() - begun < seconds):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            samples[name].append(lanes[name]())
        rounds += 1
    base, weights, found = samples[BASELINE], 4 * case.depth * case.width**2, {}
    usual = statistics.median(whole for _, whole in base)
    for name, lane in lanes.items():
        own, held, peak = [whole for _, whole in samples[name]], lane.held(), peaks[name]
        theirs = [usual] * len(own) if name in slow else [whole for _, whole in base]
        found[name] = {
            "step": _round(statistics.median(step for step, _ in samples[name])),
            "whole": _round(statistics.median(own)),
            "ratio": _round(statistics.median(a / b for a, b in zip(own, theirs, strict=True))),
            "steps": len(own),
            "state": held,
            "peak": None if peak is None else weights + held + peak,
        }
    return found


def _round(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def exponent(xs: list[float], ys: list[float]) -> float | None:
    """The slope of log y over log x in the upper half of the range of x; None of fewer than two."""
    middle = math.sqrt(min(xs) * max(xs))
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys) if x >= middle * (1 - 1e-9)]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points)).slope


def crossing(xs: list[float], ys: list[float]) -> float | None:
    """Where y passes 1 for the last time, between two x on logarithms; None if nowhere."""
    points, found = [(math.log(x), math.log(y)) for x, y in zip(xs, ys)], None
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if (y0 <= 0) != (y1 <= 0):
            found = math.exp(x0 - y0 * (x1 - x0) / (y1 - y0))
    return found


def work(case: Case) -> dict[str, float]:
    """FLOP by the formulas: of forward and backward, and of each step; AdamW's are no products."""
    n, L, B, r = case.width, case.depth, case.batch, case.rank
    factored = n > 4 * B  # where a CPU multiplies P by the factors of G instead of G
    return {
        "training": (6 * L - 2) * B * n**2,
        "RLS spectral": L * (2 * n**3 + (BLOCKS + 4 * r) * n**2 + ROOTS * n),
        "RLS adaptive": L * ((4 * B * n**2 if factored else 2 * n**3) + 4 * r * n**2),
        "AdamW": L * 12 * n**2,
        "Muon": L * 30 * n**3,
    }


def run(path: Path, only: list[str]) -> None:
    """Measures every case that the results lack, and writes them after each."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = environment.built_hash()
    if document.get("environment", {}).get("source_hash") != now:
        facts = environment.machine() | environment.versions() | {"source_hash": now}
        date = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
        document = {"environment": facts | {"date": date}, "rows": []}
    done = {json.dumps(row["case"]) for row in document["rows"]}
    for series in only:
        for case in SERIES[series]:
            if json.dumps(asdict(case)) in done:
                continue
            load = environment.machine()["load_at_start"]
            began = time.perf_counter(), time.thread_time()
            row = {"case": asdict(case), "load": load}
            row["optimizers"] = measure(case, 3.0, 30)
            row["seconds"] = [_round(time.perf_counter() - began[0]),
                              _round(time.thread_time() - began[1])]  # fmt: skip
            done.add(json.dumps(row["case"]))
            document["rows"].append(row)
            body = ",\n    ".join(json.dumps(r) for r in document["rows"])
            head = json.dumps({"environment": document["environment"]}, indent=1)[:-2]
            path.write_text(f'{head},\n "rows": [\n    {body}\n ]\n}}\n', encoding="utf-8")
            print(row["case"], row["seconds"], {k: v["step"] for k, v in row["optimizers"].items()},
                  flush=True)  # fmt: skip


class Results:
    """A results document, read by series."""

    def __init__(self, document: dict):
        self.by_case = {Case(**row["case"]): row["optimizers"] for row in document["rows"]}

    def cases(self, series: str) -> list[Case]:
        """Those of a series that were run."""
        return [case for case in SERIES[series] if case in self.by_case]

    def values(self, series: str, name: str, what: str) -> list[float]:
        """One figure of an optimizer along a series; `rest` is forward and backward."""
        found = [self.by_case[case][name] for case in self.cases(series)]
        return [r["whole"] - r["step"] if what == "rest" else r[what] for r in found]

    def ratios(self, series: str, name: str, what: str) -> list[float]:
        """A figure of an optimizer over AdamW's."""
        base = self.values(series, BASELINE, what)
        return [a / b for a, b in zip(self.values(series, name, what), base)]


def report(document: dict) -> str:
    """The tables, and where the step costs more than it must."""
    results = Results(document)
    parts = [_of_width(results), _of_exponents(results), _ends(results), _basis(document)]
    return "\n".join(parts)


def _of_width(results: Results) -> str:
    names = [name for name in OPTIMIZERS if name != BASELINE]
    head = ["width", *(f"{name}: step" for name in OPTIMIZERS)]
    head += [f"{name}: training step" for name in names] + [f"{name}: peak" for name in names]
    rows = [head]
    for i, case in enumerate(results.cases("width")):
        row = [f"{case.width:,}"]
        row += [_time(results.by_case[case][name]["step"]) for name in OPTIMIZERS]
        for what in ("ratio", "peak"):
            over = {n: results.values("width", n, "ratio") for n in names}
            over = over if what == "ratio" else {n: results.ratios("width", n, what) for n in names}
            row += [f"{over[name][i]:.2f} ×" for name in names]
        rows.append(row)
    return (
        "Two layers, 128 rows; the training step and the peak of memory are multiples of fused "
        f"AdamW's.\n\n{markdown(rows)}"
    )


def _of_exponents(results: Results) -> str:
    rows = [["varied", *(f"{name}: measured, formula" for name in OPTIMIZERS)]]
    for series in SERIES:
        cases = results.cases(series)
        xs = [float(getattr(case, series)) for case in cases]
        cells = []
        for name in OPTIMIZERS:
            measured = exponent(xs, results.values(series, name, "step"))
            formula = exponent(xs, [work(case)[name] for case in cases])
            cells.append("" if measured is None else f"{measured:.2f}, {formula:.2f}")
        rows.append([f"{series}, {min(xs):,.0f} to {max(xs):,.0f}", *cells])
    xs = [float(case.width) for case in results.cases("width")]
    held = [exponent(xs, results.values("width", name, "state")) for name in OPTIMIZERS]
    rows.append(["width, bytes of state", *(f"{value:.2f}, 2.00" for value in held)])
    return (
        f"Exponents of the optimizer's step over the upper half of each range.\n\n{markdown(rows)}"
    )


def _ends(results: Results) -> str:
    lines = []
    batches, widths = ([float(getattr(c, s)) for c in results.cases(s)] for s in ("batch", "width"))
    for name in OURS:
        step, rest = (results.values("batch", name, what) for what in ("step", "rest"))
        sums = [work(case) for case in results.cases("batch")]
        measured = crossing(batches, [a / b for a, b in zip(step, rest)])
        formula = crossing(batches, [w[name] / w["training"] for w in sums])
        dear = crossing(batches, [r / 1.5 for r in results.values("batch", name, "ratio")])
        lines.append(
            f"**{name}, n = 1,024**: the step costs more than forward and backward "
            f"{_below(measured)} (by the formulas {_below(formula)}), and the training step is "
            f"more than 1.5 times AdamW's {_below(dear)}"
        )
    for name in OURS:
        step, muon = (results.values("width", n, "step") for n in (name, "Muon"))
        over, peak = (results.ratios("width", name, what)[-1] for what in ("state", "peak"))
        lines.append(
            f"**{name}, {widths[-1]:,.0f} wide**: the step takes {step[-1] / muon[-1]:.2f} times "
            f"Muon's; the state {over:.2f} times AdamW's bytes, the peak {peak:.2f} times"
        )
    return "".join(f"- {line}.\n" for line in lines)


def _below(batch: float | None) -> str:
    return "at no batch of these" if batch is None else f"below {batch:,.0f} rows"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _basis(document: dict) -> str:
    facts = document["environment"]
    loads = [row["load"] for row in document["rows"]]
    return (
        f"{facts['cpu']}, one thread, its own time; load of the machine {min(loads)} to "
        f"{max(loads)} meanwhile; torch {facts['torch']}; kernels {facts['source_hash']}; "
        f"{facts['date'][:10]}."
    )


def plot(document: dict, path: Path) -> None:
    """Time and memory along width, depth, batch and rank, on logarithms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grey = "#808080"  # which reads on white and on black
    colours = dict(zip(OPTIMIZERS, ("#e0533d", "#d99a1c", "#3f8fd2", "#3ca66b")))
    style = {"axes.facecolor": "none", "text.color": grey, "legend.frameon": False}
    style |= dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), grey
    )
    results = Results(document)
    panels = [(series, "step") for series in SERIES] + [("width", "whole"), ("width", "peak")]
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
        for axis, (series, what) in zip(axes.flat, panels):
            xs = [float(getattr(case, series)) for case in results.cases(series)]
            scale = 2**-20 if what == "peak" else 1e3
            for name in OPTIMIZERS:
                ys = [scale * y for y in results.values(series, name, what)]
                slope = exponent(xs, ys)
                text = name if slope is None else f"{name}: {slope:.2f}"
                axis.loglog(xs, ys, ".-", color=colours[name], label=text)
            titles = {"step": "optimizer's step, ms", "whole": "training step, ms"}
            axis.set(xlabel=series, ylabel=titles.get(what, "peak memory, MiB"))
            flat = series in ("batch", "rank")
            axis.margins(y=0.5 if flat else 0.1)
            axis.minorticks_off()
            axis.set_xticks(xs, [f"{x:,.0f}" for x in xs], rotation=45, fontsize=7)
            axis.grid(color=grey, alpha=0.25)
            axis.legend(fontsize=7, loc="lower right" if flat else "upper left")
        figure.savefig(path, dpi=110, transparent=True)
        pyplot.close(figure)


def main() -> None:
    """Runs what is lacking, prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", nargs="*", choices=SERIES, default=list(SERIES))
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--report", action="store_true", help="only print the tables and draw")
    args = parser.parse_args()
    if not args.report:
        torch.set_num_threads(1)
        run(args.results, args.series)
    document = json.loads(args.results.read_text(encoding="utf-8"))
    print(report(document))
    plot(document, args.plot)


if __name__ == "__main__":
    main()
