"""The plot of a run: loss and validation accuracy, by epoch and by second of training."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from rlscuda.cli.common.drawing import CUT, INK, KEPT, REGAINED, drawing
from rlscuda.cli.common.texts import shortened
from rlscuda.cli.train.optimizers import LABELS
from rlscuda.files.atomic import write_atomically
from rlscuda.optional import optional

_LOOKS: dict[str, dict[str, Any]] = {
    "rls": {"color": CUT, "marker": "o"},
    "sgd": {"color": KEPT, "marker": "s"},
    "adam": {"color": REGAINED, "marker": "^"},
}
_SOLID: dict[str, Any] = {"linewidth": 2.0, "markeredgecolor": "white"}  # of validation
_DASHED: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (4, 2))}  # of training
_LONGEST = 100  # characters of the title


def plot_run(
    path: Path, title: str, rows: list[dict[str, Any]], test_accuracy: dict[str, float]
) -> None:
    """Draws a run into a PNG, atomically.

    Args:
        path: The file.
        title: What was trained on what.
        rows: The rows of `metrics.json`.
        test_accuracy: Of each optimizer, in [0, 1], for the legend; may be empty.
    """
    histories: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        histories.setdefault(row["optimizer"], []).append(row)
    with drawing(**{"font.size": 11}) as pyplot:
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.4), sharex="col", sharey="row")
        for column, (key, label) in enumerate(
            (("epoch", "epoch"), ("seconds", "seconds of training"))
        ):
            for name, history in histories.items():
                _draw(axes[0][column], axes[1][column], name, history, key)
            axes[1][column].set_xlabel(label)
        _label_axes(axes, rows)
        _add_legends(figure, list(histories), test_accuracy)
        figure.suptitle(
            shortened(title, _LONGEST), x=0.015, ha="left", fontsize=14, fontweight="bold"
        )
        figure.tight_layout(rect=(0, 0, 1, 0.95))
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=160)
        pyplot.close(figure)
    write_atomically(path, lambda stream: stream.write(image.getvalue()))


def _draw(accuracy_axis, loss_axis, name: str, history: list[dict[str, Any]], key: str) -> None:
    """One optimizer's accuracy above, its losses below."""
    x = [row[key] for row in history]
    solid = {**_LOOKS[name], **_SOLID, "markersize": 5 if len(history) <= 30 else 0}
    accuracy_axis.plot(x, [100 * row["val_accuracy"] for row in history], **solid)
    loss_axis.plot(x, [row["val_loss"] for row in history], **solid)
    losses = [row["train_loss"] for row in history]
    loss_axis.plot(x, losses, color=solid["color"], **_DASHED)


def _label_axes(axes, rows: list[dict[str, Any]]) -> None:
    ticker = optional("matplotlib.ticker", "cli")
    accuracy, loss = axes[0][0], axes[1][0]
    accuracy.set_ylabel("validation accuracy (%)")
    loss.set_ylabel("cross-entropy")
    losses = [row[key] for row in rows for key in ("train_loss", "val_loss")]
    if losses and all(math.isfinite(value) and value > 0 for value in losses):
        loss.set_yscale("log")
        plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
        few = max(losses) < 300 * min(losses)
        loss.yaxis.set_major_formatter(plain)
        loss.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5) if few else ()))
        loss.yaxis.set_minor_formatter(plain)
    loss.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes[1][1].set_xlim(left=0)


def _add_legends(figure, names: list[str], test_accuracy: dict[str, float]) -> None:
    """The optimizers to the left, the kinds of lines to the right."""
    line = optional("matplotlib.lines", "cli").Line2D
    tests = {name: f"   test {100 * value:.2f} %" for name, value in test_accuracy.items()}
    optimizers = [
        line([], [], label=LABELS[name] + tests.get(name, ""), **_LOOKS[name], **_SOLID)
        for name in names
    ]
    kinds = [
        line([], [], color=INK, label="validation", **_SOLID),
        line([], [], color=INK, label="training", **_DASHED),
    ]
    figure.legend(handles=optimizers, loc="upper left", bbox_to_anchor=(0.008, 0.962), ncols=3)
    figure.legend(handles=kinds, loc="upper right", bbox_to_anchor=(0.992, 0.962), ncols=2)
