"""The figures as SVG for the page, in the colours of its theme."""

from __future__ import annotations

import io
import re

from rlscuda.cli.common import drawing as look
from rlscuda.cli.report import figures
from rlscuda.cli.report.record import PruneRecord

_THEMED = {
    getattr(look, name.upper()): f"var(--{name})"
    for name in ("ink", "muted", "faint", "paper", "kept", "gone", "cut", "regained")
}


def draw_svg(record: PruneRecord) -> dict[str, str]:
    """Each figure as an SVG element whose colours are the page's custom properties."""
    drawn = {}
    for name, height, draw in figures.parts(record):
        with look.drawing(**{"svg.fonttype": "none", "svg.hashsalt": name}) as pyplot:
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
    for side in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"<[^>]*>", lambda tag: _themed_tag(tag[0], name), svg)  # text stays as it is


def _themed_tag(tag: str, name: str) -> str:
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", tag)
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", tag)
    for colour, variable in _THEMED.items():
        tag = tag.replace(colour, variable)
    return tag
