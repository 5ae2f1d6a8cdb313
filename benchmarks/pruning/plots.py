"""Tables and plot of the pruning benchmark's results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.pruning.methods.channels import BASELINES, METHODS, RECOVERIES
from benchmarks.pruning.networks import CASES

SEEDS = 3
Key = tuple[str, float, str, str | None]  # case, ratio, method, recovery
Runs = dict[Key, list[dict]]
OURS = ("sketch", "own", "in_turn")  # in the plot
COLORS = {"sketch": "C3", "own": "C1", "in_turn": "C8", "taylor": "C0", "l2": "C2", "l1": "C4"}
COLORS |= {"hessian": "C5", "bn_scale": "C6", "random": "0.6"}


def grouped(results: Path) -> Runs:
    """The runs of a results file by network, ratio, method and recovery, the tuned ones alone.

    Raises:
        ValueError: Two methods left one network at one ratio with different layers.
    """
    records = json.loads(results.read_text(encoding="utf-8"))["runs"]
    trials: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in records:
        if "validation" in r["accuracy"]:
            trial = r["accuracy"]["validation"], -r["lr"]  # of equal ones the lower rate
            trials.setdefault((r["case"], r["recovery"]), []).append(trial)
    rates = {place: -max(found)[1] for place, found in trials.items()}
    groups: dict[Key, dict[int, dict]] = {}
    widths: dict[tuple[str, float], list[int]] = {}
    for r in records:
        place = r["case"], r["ratio"]
        if r["widths"] != widths.setdefault(place, r["widths"]):
            raise ValueError(f"{r['method']} leaves layers of {r['widths']} channels at {place}, "
                             f"others {widths[place]}")  # fmt: skip
        if r["recovery"] is None or r["lr"] == rates.get((r["case"], r["recovery"])):
            groups.setdefault((*place, r["method"], r["recovery"]), {})[r["seed"]] = r
    return {key: list(by_seed.values()) for key, by_seed in groups.items()}


def shown(runs: Runs) -> list[str]:
    """The networks whose whole accuracy has been read."""
    return [case for case in CASES if accuracy(runs, (case, 0.0, "whole", None)) is not None]


def accuracy(runs: Runs, key: Key) -> float | None:
    """Mean test accuracy over the seeds; None unless all of them were run."""
    values = [r["accuracy"]["test"] for r in runs.get(key, [])]
    return statistics.mean(values) if len(values) == SEEDS else None


def share(runs: Runs, case: str, ratio: float) -> float:
    """FLOPs left, of the whole network's."""
    flops = next(v[0]["flops"] for k, v in runs.items() if k[:2] == (case, ratio))
    return flops / runs[case, 0.0, "whole", None][0]["flops"]


def _table(runs: Runs, columns: Sequence[tuple[str, Callable[[str, float], str]]]) -> str:
    """Networks and ratios down, columns across.

    A column without an entry is left out, and a row with fewer than two: it compares nothing.
    """
    places = [
        (case, ratio)
        for case in shown(runs)
        for ratio in CASES[case].ratios
        if accuracy(runs, (case, ratio, OURS[0], None)) is not None
    ]
    cells = {title: [cell(*place) for place in places] for title, cell in columns}
    cells = {title: texts for title, texts in cells.items() if any(texts)}
    lines = ["| network (whole) | channels, FLOPs left | " + " | ".join(cells) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(cells))
    previous = None
    for row, (case, ratio) in enumerate(places):
        if sum(bool(texts[row]) for texts in cells.values()) < 2:
            continue
        whole = accuracy(runs, (case, 0.0, "whole", None))
        name = f"{CASES[case].title} ({whole:.1f})" if case != previous else ""
        previous = case
        left = f"{1 - ratio:.0%}, {share(runs, case, ratio):.0%}"
        lines.append(f"| {name} | {left} | " + " | ".join(t[row] for t in cells.values()) + " |")
    return "\n".join(lines)


def _bold(texts: dict[str, float | None], method: str) -> str:
    """The figure of one method, bold where it is the best of all."""
    value = texts.get(method)
    if value is None:
        return ""
    best = max(v for v in texts.values() if v is not None)
    return f"**{value:.1f}**" if round(value, 1) == round(best, 1) else f"{value:.1f}"


def pruned_table(runs: Runs) -> str:
    """Accuracy as pruned, without training."""

    def cell(method: str) -> Callable[[str, float], str]:
        def text(case: str, ratio: float) -> str:
            found = {m: accuracy(runs, (case, ratio, m, None)) for m in METHODS}
            return _bold(found, method)

        return text

    return _table(runs, [(METHODS[m].title, cell(m)) for m in METHODS])


def recovered_table(runs: Runs) -> str:
    """Accuracy after one epoch of recovery, by each optimizer of a method; – where not run."""

    def cell(method: str) -> Callable[[str, float], str]:
        def text(case: str, ratio: float) -> str:
            found = {
                f"{m} {kind}": accuracy(runs, (case, ratio, m, kind))
                for m in METHODS
                for kind in METHODS[m].recovery
            }
            parts = [_bold(found, f"{method} {kind}") for kind in METHODS[method].recovery]
            return " / ".join(part or "–" for part in parts) if any(parts) else ""

        return text

    def scratch(case: str, ratio: float) -> str:
        value = accuracy(runs, (case, ratio, "scratch", None))
        return "" if value is None else f"{value:.1f}"

    columns = [(METHODS[m].title, cell(m)) for m in METHODS if METHODS[m].recovery]
    return _table(runs, [*columns, ("from new weights", scratch)])


def report(results: Path) -> str:
    """The markdown tables of a results file."""
    runs = grouped(results)
    rates = {
        (key[0], key[3]): values[0]["lr"] for key, values in runs.items() if key[3] is not None
    }
    chosen = "; ".join(
        f"{title} "
        + ", ".join(f"{rates[c, kind]:g} ({CASES[c].title})" for c in CASES if (c, kind) in rates)
        for kind, (title, _) in RECOVERIES.items()
    )
    return (
        "Test accuracy %, mean of the seeds, as pruned, without any training:\n\n"
        f"{pruned_table(runs)}\n\n"
        "After one epoch: ours with the optimizer that was pruned along and restarted, and after a "
        "slash with a new RLSOptimizer; the others with a new RLSOptimizer, and after a slash with "
        "Adam; and the same architecture trained from new weights for as many epochs as the whole "
        "network:"
        f"\n\n{recovered_table(runs)}\n\n"
        f"Learning rates chosen for that epoch: {chosen}."
    )


def plot(results: Path, path: Path) -> None:
    """Draw accuracy against FLOPs: one column a network, as pruned and after one epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = grouped(results)
    cases = shown(runs)
    figure, axes = pyplot.subplots(
        2, len(cases), figsize=(3.4 * len(cases), 7), squeeze=False, sharex="col"
    )
    for column, case in enumerate(cases):
        for axis, recovered in zip(axes[:, column], (False, True), strict=True):
            _panel(axis, runs, case, recovered)
        axes[0][column].set_title(CASES[case].title)
        axes[1][column].set_xlabel("FLOPs left, % of the whole network")
    axes[0][0].set_ylabel("as pruned: test accuracy %")
    axes[1][0].set_ylabel("after one epoch: test accuracy %")
    entries = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="lower center", ncols=6, frameon=False, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis, runs: Runs, case: str, recovered: bool) -> None:
    """One network, as pruned or recovered: a line a method, the best recovery of each."""
    whole = accuracy(runs, (case, 0.0, "whole", None))
    axis.axhline(whole, color="0.3", lw=1, ls="--", label="whole network")
    ratios = CASES[case].ratios
    for method in (*BASELINES, *OURS):
        kinds = METHODS[method].recovery if recovered else (None,)
        points = []
        for ratio in ratios:
            values = [
                value
                for kind in kinds
                if (value := accuracy(runs, (case, ratio, method, kind))) is not None
            ]
            if values:
                points.append((100 * share(runs, case, ratio), max(values)))
        if points:
            wide = method == OURS[0]
            axis.plot(
                *zip(*points, strict=True), "o-" if method in OURS else "s-", color=COLORS[method],
                ms=8 if wide else 4, lw=3 if wide else 1.2, label=METHODS[method].title,
            )  # fmt: skip
    if recovered:
        found = [(r, accuracy(runs, (case, r, "scratch", None))) for r in ratios]
        points = [(100 * share(runs, case, r), value) for r, value in found if value is not None]
        if points:
            axis.plot(*zip(*points, strict=True), "kx", ms=7, label="trained from new weights")
    axis.set_xscale("log")
    ticks = [100 * share(runs, case, r) for r in ratios if any(k[:2] == (case, r) for k in runs)]
    axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
