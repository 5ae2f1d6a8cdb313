"""The report of a pruning: on the terminal and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlscuda.cli.prune_files import write_document
from rlscuda.cli.prune_images import draw_png, draw_svg
from rlscuda.cli.prune_page import render_page
from rlscuda.cli.prune_record import PruneRecord
from rlscuda.cli.prune_words import caption_of_gains, gain_rows, headline, percent, subtitle
from rlscuda.cli.texts import one_line
from rlscuda.files.atomic import write_atomically, write_text


def write_report(folder: Path, record: PruneRecord, options: dict[str, Any]) -> None:
    """Write report.html, report.png and, last, report.json.

    Args:
        folder: where.
        record: what happened.
        options: how it was asked for, for report.json.
    """
    write_text(folder / "report.html", render_page(record, draw_svg(record)))
    image = draw_png(record)
    write_atomically(folder / "report.png", lambda stream: stream.write(image))
    write_document(folder / "report.json", {"options": options, **record.to_dict()})


def print_report(record: PruneRecord, console: Console) -> None:
    """Print accuracies and gains as tables."""
    console.print()
    console.print(one_line(headline(record)), style="bold", soft_wrap=True)
    console.print(one_line(subtitle(record)), soft_wrap=True)
    console.print()
    console.print(_accuracies(record))
    console.print()
    console.print(_gains(record))


def _accuracies(record: PruneRecord) -> Table:
    tested = any(stage.test_accuracy is not None for stage in record.stages)
    table = Table("network", title_justify="left")
    for name in ("parameters", "val loss", "val accuracy", *["test accuracy"] * tested):
        table.add_column(name, justify="right")
    for stage in record.stages:
        cells = [f"{stage.parameters:,}", f"{stage.val_loss:.4f}", percent(stage.val_accuracy)]
        name = stage.label if len(record.rounds) > 1 else stage.kind
        table.add_row(name, *cells, *[percent(stage.test_accuracy)] * tested)
    return table


def _gains(record: PruneRecord) -> Table:
    table = Table("gained", caption=caption_of_gains(record), caption_justify="left")
    for name in ("whole", "final", "gain"):
        table.add_column(name, justify="right")
    for row in gain_rows(record):
        table.add_row(*row)
    return table
