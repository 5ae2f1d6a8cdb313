"""The plot of a study of pre-training: accuracy along the ladder, a panel a rule."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

from rlscuda.cli.common.drawing import CUT, KEPT, drawing
from rlscuda.cli.common.texts import shortened
from rlscuda.files.atomic import write_atomically
from rlscuda.studies.protocol import FAIRNESS
from rlscuda.studies.report import ARMS, Study, curve_of

_COLOURS = dict(zip(ARMS, (CUT, KEPT)))
_LABELS = dict(zip(ARMS, ("pre-trained", "from scratch")))


def plot_study(path: Path, title: str, study: Study) -> None:
    """Draws the curves of both arms into a PNG, atomically: thin a seed, thick their mean.

    Args:
        path: The file.
        title: What network on what.
        study: What was found.
    """
    protocol = study.protocol
    rows = [
        (fairness, recovery)
        for fairness in FAIRNESS
        if fairness in protocol.fairness
        for recovery in protocol.recovery
    ]
    columns = len(protocol.rules)
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(
            len(rows), columns, figsize=(1 + 2.5 * columns, 1 + 2.2 * len(rows)), sharex=True,
            sharey=True, squeeze=False,
        )  # fmt: skip
        for (fairness, recovery), line in zip(rows, axes):
            for rule, axis in zip(protocol.rules, line):
                _draw(axis, study, fairness, rule, recovery)
                axis.set_title(rule)
            after = f", {recovery} epochs after" if recovery else ""
            line[0].set_ylabel(f"{fairness}{after}\ntest accuracy, %")
        for axis in axes[-1]:
            axis.set_xlabel(f"share of {protocol.granularity} removed")
        if axes[0][0].lines:
            axes[0][0].legend(loc="lower left")
        figure.suptitle(shortened(title, 100), x=0.015, ha="left", fontsize=13, fontweight="bold")
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=100)
        pyplot.close(figure)
    write_atomically(path, lambda stream: stream.write(image.getvalue()))


def _draw(axis, study: Study, fairness: str, rule: str, recovery: int) -> None:
    ratios, pairs = study.protocol.ratios, study.pairs(fairness)
    for place, arm in enumerate(ARMS):
        curves = [[100 * a for a in curve_of(pair[place], rule, recovery)] for pair in pairs]
        for curve in curves if len(curves) > 1 else ():
            axis.plot(ratios, curve, color=_COLOURS[arm], linewidth=0.6, alpha=0.6)
        if curves:
            means = [statistics.fmean(values) for values in zip(*curves)]
            axis.plot(ratios, means, color=_COLOURS[arm], linewidth=2, label=_LABELS[arm])
