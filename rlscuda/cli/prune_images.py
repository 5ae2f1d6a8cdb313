"""The figures as SVG for the page, in the colours of its theme, and all on one sheet as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from rlscuda.cli import prune_figures as figures
from rlscuda.cli.prune_record import PruneRecord
from rlscuda.cli.prune_words import gain_rows, headline, subtitle
from rlscuda.cli.texts import drawing, shortened

_THEMED = {
    figures.INK: "ink",
    figures.MUTED: "muted",
    figures.FAINT: "faint",
    figures.PAPER: "paper",
    figures.KEPT: "kept",
    figures.GONE: "gone",
    figures.CUT: "cut",
    figures.REGAINED: "regained",
}
_LONGEST = 88  # characters of the headline
Part = tuple[str, float, Callable[[Any, PruneRecord], None]]  # name, inches high, how to draw


def parts(record: PruneRecord) -> list[Part]:
    """The figures that this pruning has, in their order."""
    found: list[Part] = [("accuracy", 3.3, figures.draw_accuracy)]
    if record.epochs:
        found.append(("course", 4.2, figures.draw_course))
    found.append(("widths", figures.widths_height(record), figures.draw_widths))
    if figures.spectra_shown(record):
        found.append(("spectra", figures.spectra_height(record), figures.draw_spectra))
    return found


def draw_svg(record: PruneRecord) -> dict[str, str]:
    """Each figure as an SVG element whose colours are the page's custom properties."""
    drawn = {}
    for name, height, draw in parts(record):
        style = {**figures.STYLE, "svg.fonttype": "none", "svg.hashsalt": name}
        with drawing(style) as pyplot:
            figure = pyplot.figure(figsize=(figures.WIDTH, height), layout="constrained")
            draw(figure, record)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
            pyplot.close(figure)
        drawn[name] = _themed(stream.getvalue(), name)
    return drawn


def _themed(svg: str, name: str) -> str:
    """The bare element: identifiers of its own, sized by the page, colours and fonts from it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"<[^>]*>", lambda tag: _themed_tag(tag[0], name), svg)  # text stays as it is


def _themed_tag(tag: str, name: str) -> str:
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", tag)
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'href="#', f'href="#{name}-', tag)
    tag = re.sub(r"url\(#", f"url(#{name}-", tag)
    for colour, variable in _THEMED.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return tag


def draw_png(record: PruneRecord) -> bytes:
    """Headline, figures and the table of gains on one sheet."""
    drawn = parts(record)
    rows = gain_rows(record)
    heights = [0.75, *(height + 0.45 for _, height, _ in drawn), 0.5 + 0.27 * (len(rows) + 1)]
    with drawing({**figures.STYLE, "axes.titlesize": 10}) as pyplot:
        figure = pyplot.figure(figsize=(figures.WIDTH, sum(heights)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12)
        pieces = figure.subfigures(len(heights), 1, height_ratios=heights)
        head = shortened(headline(record), _LONGEST)
        pieces[0].text(0.012, 0.62, head, fontsize=15, fontweight="bold", va="center")
        pieces[0].text(0.012, 0.2, subtitle(record), color=figures.MUTED, va="center")
        for piece, (name, _, draw) in zip(pieces[1:], drawn):
            piece.suptitle(TITLES[name], x=0.012, ha="left", fontsize=11.5, fontweight="bold")
            draw(piece, record)
        _draw_table(pieces[-1], rows)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
        pyplot.close(figure)
    return image.getvalue()


TITLES = {
    "accuracy": "Accuracy against size",
    "course": "By epoch",
    "widths": "Layer widths",
    "spectra": "Saliency spectra: the cost of each removal, in order",
}


def _draw_table(figure: Any, rows: list[tuple[str, str, str, str]]) -> None:
    """The gains in four aligned columns."""
    figure.suptitle("What was gained", x=0.012, ha="left", fontsize=11.5, fontweight="bold")
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(len(rows) + 0.6, -0.4)
    for line, cells in enumerate([("", "whole", "final", "gain"), *rows]):
        for column, (x, cell) in enumerate(zip((0.005, 0.56, 0.78, 1.0), cells)):
            axis.text(x, line, cell, ha="left" if column == 0 else "right", va="center",
                      color=figures.MUTED if line == 0 else figures.INK)  # fmt: skip
    axis.hlines(0.5, 0, 1, color=figures.FAINT, linewidth=1)
