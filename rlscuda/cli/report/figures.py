"""The figures of a pruning: layer widths, saliency spectra, accuracy against size, course."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rlscuda.cli.common.drawing import CUT, FAINT, GONE, INK, KEPT, MUTED, PAPER, REGAINED
from rlscuda.cli.common.texts import shortened
from rlscuda.cli.report.record import PruneRecord, Stage
from rlscuda.optional import optional

WIDTH = 9.0  # inches
MOST_SPECTRA = 24
_COLUMNS = 4
_LONGEST = 24  # characters of the name above a small figure
_DASHED: dict[str, Any] = {"linewidth": 0.8, "linestyle": (0, (3, 2))}
_LOOKS: dict[str, dict[str, Any]] = {  # of the stages
    "whole": {"marker": "o", "color": INK, "markersize": 8, "label": "whole"},
    "pruned": {"marker": "v", "color": CUT, "markersize": 8.5, "label": "just pruned"},
    "recovered": {"marker": "o", "color": KEPT, "markersize": 8, "label": "after training on"},
    "recovering": {"marker": "o", "color": GONE, "markersize": 8, "label": "training on, not back"},
    "rolled back": {"marker": "s", "color": MUTED, "markersize": 7, "label": "rolled back"},
    "final": {"marker": "D", "color": REGAINED, "markersize": 8, "label": "in the end"},
}
_POINT: dict[str, Any] = {"markeredgecolor": PAPER, "linestyle": "none"}
Part = tuple[str, float, Callable[[Any, PruneRecord], None]]  # name, inches high, how to draw


def parts(record: PruneRecord) -> list[Part]:
    """The figures that a pruning has, in their order."""
    widths, spectra = len(record.widths), len(spectra_shown(record))
    found: list[Part] = [("accuracy", 3.3, draw_accuracy)]
    if record.epochs:
        found.append(("course", 4.2, draw_course))
    if widths:
        found.append(("widths", 0.75 + 0.36 * widths, draw_widths))
    if spectra:
        found.append(("spectra", 0.45 + 1.75 * math.ceil(spectra / _COLUMNS), draw_spectra))
    return found


def draw_widths(figure: Any, record: PruneRecord) -> None:
    """A bar for each coupling: its units before, pale, and those that stay, in front."""
    axis = figure.subplots()
    widths = record.widths
    places = range(len(widths))
    most = max(width.before for width in widths)
    axis.barh(places, [w.before for w in widths], height=0.62, color=GONE)
    axis.barh(places, [w.after for w in widths], height=0.62, color=KEPT)
    for place, width in zip(places, widths):
        axis.text(
            width.before + 0.012 * most, place, f"{width.before} → {width.after}",
            va="center", color=INK,
        )  # fmt: skip
    axis.set_yticks(places, [shortened(width.name, 40) for width in widths])
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.set_xlim(0, 1.14 * most)
    axis.set_ylim(len(widths) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("channels or nodes: removed (pale) and kept")


def spectra_shown(record: PruneRecord) -> list[str]:
    """The couplings whose spectra are drawn: all, or the most costly ones, in their order."""
    dearest = sorted(record.spectra, key=lambda name: -record.spent(name))[:MOST_SPECTRA]
    return [name for name in record.spectra if name in dearest]


def draw_spectra(figure: Any, record: PruneRecord) -> None:
    """Small multiples: what each removal cost or would have cost, in order, and the cut."""
    ticker = optional("matplotlib.ticker", "cli")
    names = spectra_shown(record)
    columns = min(_COLUMNS, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    floor = _floor([c for n in names for segment in record.spectrum(n) for c in segment.cost])
    for place, (name, axis) in enumerate(zip(names, axes.flat)):
        for segment in record.spectrum(name):
            cost = [max(value, floor) for value in segment.cost]
            x = range(segment.start + 1, segment.start + 1 + len(cost))
            cut = segment.removed
            line: dict[str, Any] = {"linewidth": 1.8}
            if len(cost) <= 8:
                line |= {"marker": "o", "markersize": 3.5}
            axis.plot(x[:cut], cost[:cut], color=CUT, **line)
            if segment.last:
                axis.plot(x[cut:], cost[cut:], color=KEPT, **line)
            axis.axvline(segment.start + cut + 0.5, color=MUTED, **_DASHED)
        axis.set_title(shortened(name, _LONGEST))
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(3, integer=True))
        axis.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(_power))
        axis.tick_params(length=0)
        if place % columns == 0:
            axis.set_ylabel("cost")
        if place + columns >= len(names):
            axis.set_xlabel("removals")


def draw_accuracy(figure: Any, record: PruneRecord) -> None:
    """Validation accuracy against the share of parameters and of FLOPs that is left."""
    ticker = optional("matplotlib.ticker", "cli")
    axes = figure.subplots(1, 2, sharey=True)
    stages, whole = record.stages, record.stages[0]
    accuracy = [100 * stage.val_accuracy for stage in stages]
    for axis, key in zip(axes, ("parameters", "flops")):
        share = [100 * getattr(s, key) / max(1, getattr(whole, key)) for s in stages]
        axis.plot(share, accuracy, color=FAINT, linewidth=1.4, zorder=1)
        for stage, x, y in zip(stages, share, accuracy):
            axis.plot([x], [y], **_LOOKS[stage.kind], **_POINT)
        axis.axhline(accuracy[0], color=MUTED, zorder=0, **_DASHED)
        axis.set_xscale("log")
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if t >= min(share) * 0.8]
        axis.set_xticks(ticks, [f"{tick} %" for tick in ticks])
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_xlim(min(share) / 1.25, 125)
        axis.tick_params(length=0)
        axis.set_xlabel(f"{'FLOPs' if key == 'flops' else key} left")
        if len(stages) <= 3:
            _label_points(axis, stages, share, accuracy)
    axes[0].set_ylabel("validation accuracy (%)")
    low, high = min(accuracy), max(accuracy)
    margin = max(0.12 * (high - low), 0.25)
    axes[0].set_ylim(low - 1.6 * margin, min(100.6, high + 1.6 * margin))
    line = optional("matplotlib.lines", "cli").Line2D
    kinds = {stage.kind for stage in stages}
    handles = [line([], [], **look, **_POINT) for kind, look in _LOOKS.items() if kind in kinds]
    axes[1].legend(handles=handles, loc="lower right")


def draw_course(figure: Any, record: PruneRecord) -> None:
    """By epoch: validation accuracy, with the drop of each pruning, and the share left."""
    ticker = optional("matplotlib.ticker", "cli")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    epochs = record.epochs
    x = [row["epoch"] for row in epochs]
    ends = [x[0] - 1, *x]  # what a row says of the size holds for its whole epoch
    upper.plot(x, [_percent(row["val_accuracy"]) for row in epochs], color=KEPT, linewidth=1.8,
               marker="o", markersize=5, markeredgecolor=PAPER)  # fmt: skip
    for row in epochs:
        if row.get("changed_val_accuracy") is not None:
            points = [_percent(row["val_accuracy"]), _percent(row["changed_val_accuracy"])]
            upper.plot([row["epoch"]] * 2, points, color=CUT, linewidth=1.2)
            upper.plot([row["epoch"]], points[1:], marker="v", color=CUT, markersize=7,
                       markeredgecolor=PAPER)  # fmt: skip
    upper.set_ylabel("validation accuracy (%)")
    looks = (("parameters", KEPT, "-", "parameters"), ("flops", REGAINED, (0, (4, 2)), "FLOPs"))
    for key, colour, line, label in looks:
        share = [100 * row[key] / max(1, epochs[0][key]) for row in (epochs[0], *epochs)]
        style = {"color": colour, "linestyle": line, "linewidth": 1.8, "label": label}
        lower.step(ends, share, where="pre", **style)
    lower.set_ylim(0, 108)
    lower.set_ylabel("left (%)")
    lower.set_xlabel("epoch")
    lower.legend(loc="lower left", ncols=2)
    lower.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for axis in (upper, lower):
        axis.tick_params(length=0)


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


def _floor(costs: Sequence[float]) -> float:
    """The least cost that a logarithmic axis shows: dead units cost nothing, or rounding."""
    positive = [c for c in costs if c > 0 and math.isfinite(c)]
    return max(min(positive), 1e-8 * max(positive)) if positive else 1e-12


def _power(value: float, _: object = None) -> str:
    """A tick of a logarithmic axis in plain characters, which every font has."""
    exponent = round(math.log10(value)) if value > 0 else 0
    if -2 <= exponent <= 2:
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _label_points(axis: Any, stages: Sequence[Stage], x: list[float], y: list[float]) -> None:
    """Accuracy beside each of a few points: above, but below what fell."""
    for stage, place, value in zip(stages, x, y):
        below = stage.kind == "pruned"
        axis.annotate(
            f"{value:.2f}", (place, value), (0, -9 if below else 9), textcoords="offset points",
            ha="center", va="top" if below else "bottom", color=INK,
        )  # fmt: skip
