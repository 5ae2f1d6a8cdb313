"""The report of a pruning: on the terminal and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlscuda.cli.common.texts import one_line
from rlscuda.cli.report.folder import write_document
from rlscuda.cli.report.page import render_page
from rlscuda.cli.report.record import PruneRecord
from rlscuda.cli.report.svg import draw_svg
from rlscuda.cli.report.words import (
    caption_of_gains,
    gain_rows,
    headline,
    stage_table,
    subtitle,
)
from rlscuda.files.atomic import write_text


def write_report(folder: Path, record: PruneRecord, options: dict[str, Any]) -> None:
    """Writes report.html and, last, report.json.

    Args:
        folder: Where.
        record: What happened.
        options: How it was asked for, for report.json.
    """
    write_text(folder / "report.html", render_page(record, draw_svg(record)))
    write_document(folder / "report.json", {"options": options, **record.to_dict()})


def print_report(record: PruneRecord, console: Console) -> None:
    """Prints accuracies and gains as tables."""
    head, stages = stage_table(record)
    accuracies = Table("network", title_justify="left")
    gains = Table("gained", caption=caption_of_gains(record), caption_justify="left")
    short = [name.replace("validation", "val") for name in head]  # a terminal has 80 columns
    for table, names, rows in (
        (accuracies, short, stages),
        (gains, ["whole", "final", "gain"], gain_rows(record)),
    ):
        for name in names:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
    console.print()
    console.print(one_line(headline(record)), style="bold", soft_wrap=True)
    console.print(one_line(subtitle(record)), soft_wrap=True)
    console.print()
    console.print(accuracies)
    console.print()
    console.print(gains)
