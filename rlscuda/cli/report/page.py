"""The report of a pruning as one HTML page that needs nothing else: no script, font or network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import rlscuda
from rlscuda.cli.common.texts import one_line
from rlscuda.cli.report import words
from rlscuda.cli.report.figures import spectra_shown
from rlscuda.cli.report.record import PruneRecord

ENVIRONMENT = Environment(
    loader=PackageLoader("rlscuda.cli.report", "."),
    autoescape=True,
    finalize=lambda value: value if isinstance(value, Markup) else one_line(value),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(record: PruneRecord, figures: Mapping[str, str]) -> str:
    """The page, of the template `report.html`.

    Args:
        record: What happened.
        figures: Of `draw_svg`.
    """
    return ENVIRONMENT.get_template("report.html").render(
        record=record,
        words=words,
        figures={name: Markup(svg) for name, svg in figures.items()},
        shown=spectra_shown(record),
        model=next((name for name in record.files if name.endswith(".safetensors")), None),
        versions=f"rlscuda {rlscuda.__version__}, torch {torch.__version__}",
    )
