"""Cells of tables: a figure stays on one line, a long text is not set right."""

from __future__ import annotations

import re

from docutils import nodes

LONGEST = 30  # letters of what is kept on one line


def mark_cells(app, doctree: nodes.document) -> None:
    """Gives cells of figures the class `number`, and takes `text-right` from those of text."""
    for cell in doctree.findall(nodes.entry):
        text = cell.astext()
        if len(text) <= LONGEST and re.match(r"[+−-]?[\d.]", text):
            cell["classes"].append("number")
        elif len(text) > LONGEST and "text-right" in cell["classes"]:
            cell["classes"].remove("text-right")


def setup(app) -> dict:
    """Connects it."""
    app.connect("doctree-read", mark_cells)
    return {"parallel_read_safe": True}
