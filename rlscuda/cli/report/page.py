"""The report of a pruning as one HTML page that needs nothing else: no script, font or network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import rlscuda
from rlscuda.cli.common.texts import one_line
from rlscuda.cli.report.figures import MOST_SPECTRA, spectra_shown
from rlscuda.cli.report.record import PruneRecord
from rlscuda.cli.report.words import (
    SOURCES,
    caption_of_gains,
    gain_rows,
    headline,
    percent,
    stage_table,
    subtitle,
    times,
)

Rows = list[tuple[str, ...]]
ENVIRONMENT = Environment(
    loader=PackageLoader("rlscuda.cli.report", "."),
    autoescape=True,
    finalize=lambda value: value if isinstance(value, Markup) else one_line(value),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(record: PruneRecord, figures: Mapping[str, str]) -> str:
    """The page.

    Args:
        record: What happened.
        figures: Of `draw_svg`.
    """
    lead = subtitle(record)
    return ENVIRONMENT.get_template("report.html").render(
        record=record,
        report=record.last_report,
        figures={name: Markup(svg) for name, svg in figures.items()},
        headline=headline(record),
        lead=lead[:1].upper() + lead[1:],
        tiles=_tiles(record),
        gains=gain_rows(record),
        caption_of_gains=caption_of_gains(record),
        stages=stage_table(record),
        rounds=_round_rows(record),
        widths=_width_rows(record),
        left_out=_spectra_left_out(record),
        most_spectra=MOST_SPECTRA,
        sources=SOURCES,
        exceptions=_exception_rows(record),
        model=next((name for name in record.files if name.endswith(".safetensors")), None),
        versions=f"rlscuda {rlscuda.__version__}, torch {torch.__version__}",
    )


def _tiles(record: PruneRecord) -> Rows:
    """The four numbers that one looks for first: name, value, remark."""
    ratios, first, last = record.gains.ratios, record.stages[0], record.stages[-1]
    tested = first.test_accuracy is not None and last.test_accuracy is not None
    kind = "test" if tested else "validation"
    before, after = (s.test_accuracy if tested else s.val_accuracy for s in (first, last))
    change = f"{100 * ((after or 0.0) - (before or 0.0)):+.2f}".replace("-", "−")
    whole, final = record.gains.before, record.gains.after
    return [
        (f"{kind} accuracy", percent(after), f"{percent(before)} whole, {change} points"),
        ("parameters", times(ratios["parameters"], "fewer", "more"),
         f"{whole.parameters:,} → {final.parameters:,}"),
        ("FLOPs", times(ratios["flops"], "fewer", "more"), gain_rows(record)[1][2] + " an image"),
        ("latency", times(ratios["latency_seconds"], "faster", "slower"),
         f"{whole.batch_size} images, {whole.device}"),
    ]  # fmt: skip


def _round_rows(record: PruneRecord) -> Rows:
    rows: Rows = []
    for number, done in enumerate(record.rounds, 1):
        losses = done["losses"]
        last = f"{losses[-1]:.4f}" if losses else "–"
        rows.append((str(number), done["outcome"], percent(done["ratio"]), str(len(losses)), last))
    return rows


def _width_rows(record: PruneRecord) -> Rows:
    return [
        (width.name, f"{width.before:,}", f"{width.after:,}",
         percent(1 - width.after / width.before), f"{record.spent(width.name):.3g}")
        for width in record.widths
    ]  # fmt: skip


def _spectra_left_out(record: PruneRecord) -> bool:
    return len(spectra_shown(record)) < sum(bool(record.spectrum(w.name)) for w in record.widths)


def _exception_rows(record: PruneRecord) -> Rows:
    """What could not be pruned, or not be compensated, and why."""
    reasons: dict[tuple[str, str], str] = {}
    for report in (entry["report"] for entry in record.rounds):
        for key, kind in (("refused", "not pruned"), ("uncompensated", "not compensated")):
            reasons |= {(name, kind): reason for name, reason in report[key].items()}
    return [(*key, reason) for key, reason in reasons.items()]
