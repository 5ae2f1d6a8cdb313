"""The plot of a run: loss and validation accuracy, by epoch and by second of training."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from rlscuda.cli.extras import require
from rlscuda.cli.texts import drawing, shortened
from rlscuda.files.atomic import write_atomically

LABELS = {"rls": "RLS", "sgd": "SGD + momentum", "adam": "Adam"}
COLOURS = {"rls": "#D1495B", "sgd": "#30638E", "adam": "#3C9D7B"}  # told apart by the colour-blind
MARKERS = {"rls": "o", "sgd": "s", "adam": "^"}
_LONGEST = 100  # characters of the title
INK, FAINT = "#22272E", "#D8DEE4"


def plot_run(
    path: Path, title: str, rows: list[dict[str, Any]], test_accuracy: dict[str, float]
) -> None:
    """Draw a run into a PNG, atomically.

    Args:
        path: the file.
        title: what was trained on what.
        rows: the rows of ``metrics.json``.
        test_accuracy: of each optimizer, in [0, 1], for the legend; may be empty.
    """
    histories: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        histories.setdefault(row["optimizer"], []).append(row)
    with drawing(_style()) as pyplot:
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.4), sharex="col", sharey="row")
        for column, (key, label) in enumerate(
            (("epoch", "epoch"), ("seconds", "seconds of training"))
        ):
            for name, history in histories.items():
                _draw(axes[0][column], axes[1][column], name, history, key)
            axes[1][column].set_xlabel(label)
        _finish(figure, axes, title, histories, test_accuracy)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=160)
        pyplot.close(figure)
    write_atomically(path, lambda stream: stream.write(image.getvalue()))


def _draw(accuracy_axis, loss_axis, name: str, history: list[dict[str, Any]], key: str) -> None:
    """One optimizer's accuracy above, its losses below."""
    x = [row[key] for row in history]
    style = {"color": COLOURS[name], "markersize": 5 if len(history) <= 30 else 0}
    solid = {**style, "marker": MARKERS[name], "markeredgecolor": "white", "linewidth": 2.0}
    accuracy_axis.plot(x, [100 * row["val_accuracy"] for row in history], **solid)
    loss_axis.plot(x, [row["val_loss"] for row in history], **solid)
    loss_axis.plot(
        x, [row["train_loss"] for row in history], linestyle=(0, (4, 2)), linewidth=1.4, **style
    )


def _finish(figure, axes, title: str, histories: dict, test_accuracy: dict[str, float]) -> None:
    """Labels, scales, legends."""
    lines = require("matplotlib.lines")
    ticker = require("matplotlib.ticker")
    axes[0][0].set_ylabel("validation accuracy (%)")
    axes[1][0].set_ylabel("cross-entropy")
    losses = [
        row[key]
        for history in histories.values()
        for row in history
        for key in ("train_loss", "val_loss")
    ]
    if losses and all(math.isfinite(loss) and loss > 0 for loss in losses):
        axes[1][0].set_yscale("log")
        plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
        axes[1][0].yaxis.set_major_formatter(plain)
        few = max(losses) < 300 * min(losses)
        axes[1][0].yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5) if few else ()))
        axes[1][0].yaxis.set_minor_formatter(plain)
    axes[1][0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes[1][1].set_xlim(left=0)
    handles = []
    for name in histories:
        label = LABELS[name]
        if name in test_accuracy:
            label += f"   test {100 * test_accuracy[name]:.2f} %"
        handles.append(
            lines.Line2D([], [], color=COLOURS[name], marker=MARKERS[name], linewidth=2.0,
                         markeredgecolor="white", label=label)
        )  # fmt: skip
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.008, 0.962), ncols=3)
    dashes = [("validation", "-", 2.0), ("training", (0, (4, 2)), 1.4)]
    figure.legend(
        handles=[
            lines.Line2D([], [], color=INK, linestyle=style, linewidth=width, label=label)
            for label, style, width in dashes
        ],
        loc="upper right",
        bbox_to_anchor=(0.992, 0.962),
        ncols=2,
    )
    figure.suptitle(shortened(title, _LONGEST), x=0.015, ha="left", fontsize=14, fontweight="bold")
    figure.tight_layout(rect=(0, 0, 1, 0.95))


def _style() -> dict[str, Any]:
    return {
        "font.size": 11,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#8C959F",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.8,
        "xtick.color": "#57606A",
        "ytick.color": "#57606A",
        "legend.frameon": False,
    }
