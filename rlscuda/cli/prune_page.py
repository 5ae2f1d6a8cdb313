"""The report of a pruning as one HTML page that needs nothing else: no script, font or network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

import torch

import rlscuda
from rlscuda.cli.prune_figures import MOST_SPECTRA, spectra_shown
from rlscuda.cli.prune_record import PruneRecord
from rlscuda.cli.prune_words import (
    caption_of_gains,
    gain_rows,
    headline,
    percent,
    source_in_words,
    subtitle,
    times,
)
from rlscuda.cli.texts import html


def render_page(record: PruneRecord, figures: Mapping[str, str]) -> str:
    """The page.

    Args:
        record: what happened.
        figures: of :func:`rlscuda.cli.prune_images.draw_svg`.
    """
    css = files("rlscuda.cli").joinpath("report.css").read_text(encoding="utf-8")
    title = html(headline(record))
    body = [
        f"<header><h1>{title}</h1>",
        f'<p class="lead">{html(_sentence(subtitle(record)))}</p>',
        _tiles(record),
        "</header>",
        _section("What was gained", _gains(record)),
        _section("Accuracy against size", _accuracy(record, figures["accuracy"])),
    ]
    if "course" in figures:
        body.append(_section("By epoch", _course(record, figures["course"])))
    body.append(_section("Layer widths", _widths(record, figures["widths"])))
    if "spectra" in figures:
        body.append(_section("Saliency spectra", _spectra(record, figures["spectra"])))
    body += [_matrices(record), _exceptions(record), _files(record), _footer()]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{html(title)}</h2>\n{content}\n</section>"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, caption: str = ""
) -> str:
    """A table whose first `words` columns are text, the others numbers, to the right."""

    def cells(row: Sequence[str], head: bool) -> str:
        parts = []
        for column, cell in enumerate(row):
            tag = "th" if head or column == 0 else "td"
            scope = ' scope="col"' if head else ' scope="row"' if column == 0 else ""
            kind = ' class="number"' if column >= words else ""
            parts.append(f"<{tag}{scope}{kind}>{html(cell)}</{tag}>")
        return "<tr>" + "".join(parts) + "</tr>"

    lines = [cells(row, False) for row in rows]
    above = f"<caption>{html(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{above}<thead>{cells(head, True)}</thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _figure(svg: str, name: str, caption: str) -> str:
    labelled = svg.replace("<svg", f'<svg role="img" aria-label="{html(name)}"', 1)
    return (
        f'<figure><div class="scroll">{labelled}</div>'
        f"<figcaption>{html(caption)}</figcaption></figure>"
    )


def _tiles(record: PruneRecord) -> str:
    """The four numbers that one looks for first."""
    ratios, first, last = record.gains.ratios, record.stages[0], record.stages[-1]
    tested = first.test_accuracy is not None and last.test_accuracy is not None
    kind = "test" if tested else "validation"
    before, after = (s.test_accuracy if tested else s.val_accuracy for s in (first, last))
    change = f"{100 * ((after or 0.0) - (before or 0.0)):+.2f}".replace("-", "−")
    tiles = [
        (f"{kind} accuracy", percent(after), f"{percent(before)} whole, {change} points"),
        ("parameters", times(ratios["parameters"], "fewer", "more"),
         f"{record.gains.before.parameters:,} → {record.gains.after.parameters:,}"),
        ("FLOPs", times(ratios["flops"], "fewer", "more"), gain_rows(record)[1][2] + " an image"),
        ("latency", times(ratios["latency_seconds"], "faster", "slower"),
         f"{record.gains.before.batch_size} images, {record.gains.before.device}"),
    ]  # fmt: skip
    cells = [
        f"<div><dt>{html(name)}</dt><dd>{html(value)}<small>{html(small)}</small></dd></div>"
        for name, value, small in tiles
    ]
    return '<dl class="figures">\n' + "\n".join(cells) + "\n</dl>"


def _gains(record: PruneRecord) -> str:
    caption = caption_of_gains(record)
    return _table(("", "whole", "final", "gain"), gain_rows(record), caption=caption)


def _accuracy(record: PruneRecord, svg: str) -> str:
    tested = any(stage.test_accuracy is not None for stage in record.stages)
    head = ["", "parameters", "validation loss", "validation accuracy"]
    rows = []
    for stage in record.stages:
        name = stage.label if len(record.rounds) > 1 else stage.kind
        row = [name, f"{stage.parameters:,}", f"{stage.val_loss:.4f}", percent(stage.val_accuracy)]
        rows.append(row + [percent(stage.test_accuracy)] * tested)
    note = "The validation images made every choice"
    note += "; the test images were read once, at the end." if tested else "."
    return (
        _table(head + ["test accuracy"] * tested, rows)
        + _figure(svg, "validation accuracy against the parameters and FLOPs left", note)
    )  # fmt: skip


def _course(record: PruneRecord, svg: str) -> str:
    rows = []
    for number, done in enumerate(record.rounds, 1):
        losses = done["losses"]
        last = f"{losses[-1]:.4f}" if losses else "–"
        rows.append((str(number), done["outcome"], percent(done["ratio"]), str(len(losses)), last))
    head = ("round", "outcome", "channels gone", "epochs since", "validation loss")
    caption = "Each fall is a pruning, before any training on; the steps show what it left."
    return _figure(svg, "validation accuracy and size by epoch", caption) + _table(head, rows, 2)


def _widths(record: PruneRecord, svg: str) -> str:
    rows = [
        (width.name, f"{width.before:,}", f"{width.after:,}",
         percent(1 - width.after / width.before), f"{record.spent(width.name):.3g}")
        for width in record.widths
    ]  # fmt: skip
    head = ("channels of", "before", "after", "removed", "cost by its own account")
    caption = (
        "Channels that live and die together, such as those added in a residual network, are one "
        "line, named after the layer that makes them."
    )
    return (
        _figure(svg, "layer widths before and after", caption)
        + f"<details><summary>as a table</summary>{_table(head, rows)}</details>"
    )


def _spectra(record: PruneRecord, svg: str) -> str:
    unit = "in units of the importance"
    if record.last_report["importance"] == "saliency":
        unit = "as a share of the variance of the outputs that the channels feed"
    caption = (
        f"The cost of each removal, {unit}, in the order of removal: red what was removed, blue "
        "what stayed, with the cut between them. A curve that is still low at its cut could have "
        "lost more; one that is steep there lost enough."
    )
    shown = spectra_shown(record)
    if len(shown) < sum(bool(record.spectrum(width.name)) for width in record.widths):
        caption += f" The {MOST_SPECTRA} on which most was spent are shown."
    return _figure(svg, "cost of removals by coupling", caption)


def _matrices(record: PruneRecord) -> str:
    """Where the matrices came from, and how far they are from a calibration."""
    report = record.last_report
    if report["source"] == "none":
        return ""
    text = f"<p>Read from {html(source_in_words(report['source']))}.</p>"
    if report["disagreement"]:
        rows = [(name, f"{value:.3g}") for name, value in report["disagreement"].items()]
        caption = (
            "how far each matrix is from an exact calibration: for small values the relative "
            "difference a direction of the input, up to a common factor"
        )
        text += _table(("layer", "disagreement"), rows, caption=caption)
    return _section("Inverse autocorrelation matrices", text)


def _exceptions(record: PruneRecord) -> str:
    """What could not be pruned, or not be compensated, and why."""
    reasons: dict[tuple[str, str], str] = {}
    for report in (entry["report"] for entry in record.rounds):
        for key, kind in (("refused", "not pruned"), ("uncompensated", "not compensated")):
            reasons |= {(name, kind): reason for name, reason in report[key].items()}
    if not reasons:
        text = "Every coupling was a candidate, and "
        text += "every layer that lost inputs was" if record.compensate else "no layer was to be"
        text += " compensated."
        return _section("Left alone", f"<p>{text}</p>")
    rows = [(name, kind, reason) for (name, kind), reason in reasons.items()]
    return _section("Left alone", _table(("what", "", "why"), rows, 3))


def _files(record: PruneRecord) -> str:
    if not record.files:
        return ""
    rows = list(record.files.items())
    return _section("Files", _table(("file", "what it is"), rows, 2) + _loading(record))


def _loading(record: PruneRecord) -> str:
    model = next((name for name in record.files if name.endswith(".safetensors")), None)
    if model is None:
        return ""
    code = (
        "from rlscuda.pruning.files.saving import load_pruned",
        f'model = load_pruned(make_whole_model, "{model}")',
    )
    return f"<pre>{chr(10).join(map(html, code))}</pre>"


def _footer() -> str:
    versions = f"rlscuda {rlscuda.__version__}, torch {torch.__version__}"
    return f"<footer>{html(versions)}. The same figures are in <code>report.png</code>.</footer>"
