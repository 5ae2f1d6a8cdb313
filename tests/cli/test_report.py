"""The report of a pruning: a page that parses, needs nothing else and says what must be said."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from rlscuda.cli.report.figures import MOST_SPECTRA, spectra_shown
from rlscuda.cli.report.folder import ReportFolder
from rlscuda.cli.report.page import render_page
from rlscuda.cli.report.record import PruneRecord, Stage
from rlscuda.cli.report.svg import draw_svg
from rlscuda.cli.report.words import gain_rows, subtitle, times
from rlscuda.cli.report.writing import write_report
from rlscuda.pruning.report import CouplingChange, PruneReport
from rlscuda.pruning.running.measure import Gains, Measurement

GAINS = Gains(
    Measurement(1000, 64 * 40_000, 2**20, 0.012, 64, "cpu"),
    Measurement(250, 64 * 10_000, 2**19, 0.004, 64, "cpu"),
)


def change(name: str, before: int, removed: int, **values) -> CouplingChange:
    cost = [10.0 ** (place - before) for place in range(before - 1)]
    made = {"before": before, "after": before - removed, "removed": list(range(removed))}
    return CouplingChange(**{"name": name, "members": [name], "cost": cost, **made, **values})


def report(*changes: CouplingChange, **values) -> PruneReport:
    plain = {
        "importance": "saliency",
        "selection": "greedy",
        "source": "own",
        "disagreement": {"fc1": 0.125},
        "uncompensated": {"deep": "each channel has a filter of its own"},
        "refused": {"head<x>": "its outputs are the classes & stay"},
        "kept_inputs": None,
        "gains": GAINS,
    }
    return PruneReport(couplings=list(changes), **{**plain, **values})


def entry(done: PruneReport, outcome: str = "recovered") -> dict:
    return {"ratio": 0.5, "outcome": outcome, "losses": [0.3], "report": done.to_dict()}


def record(**values) -> PruneRecord:
    plain = {
        "title": "tiny on <blocks>",
        "optimizer": "rls",
        "stages": [
            Stage("whole", 0, 1000, 40_000.0, 0.2, 0.9712, 0.9701),
            Stage("pruned", 1, 250, 10_000.0, 0.4, 0.9034, 0.9023),
            Stage("recovered", 1, 250, 10_000.0, 0.3, 0.9556, 0.9545),
        ],
        "rounds": [entry(report(change("conv1", 6, 4), change("fc1", 40, 10)))],
        "gains": GAINS,
        "files": {"pruned.safetensors": "the network"},
    }
    return PruneRecord(**{**plain, **values})


def scheduled() -> PruneRecord:
    first = entry(report(change("conv1", 6, 2), change("fc1", 40, 10)))
    second = entry(report(change("conv1", 4, 2), change("fc1", 30, 10)))
    failed = entry(report(change("conv1", 2, 1), change("fc1", 20, 10)), "rolled back")
    rows = [
        {"epoch": 1, "val_accuracy": 0.9, "parameters": 1000, "flops": 40_000,
         "changed_val_accuracy": 0.8},
        {"epoch": 2, "val_accuracy": math.nan, "parameters": 500, "flops": 20_000},
    ]  # fmt: skip
    stages = [
        Stage("whole", 0, 1000, 40_000, 0.2, 0.9),
        Stage("pruned", 1, 500, 20_000, 0.4, 0.8),
        Stage("recovered", 1, 500, 20_000, 0.2, 0.9),
        Stage("pruned", 2, 250, 10_000, 0.4, 0.7),
        Stage("rolled back", 3, 250, 10_000, 0.3, 0.88),
        Stage("final", 3, 250, 10_000, 0.3, 0.89, 0.88),
    ]
    return record(rounds=[first, second, failed], stages=stages, epochs=rows)


class Page(HTMLParser):
    """Checks that every element is closed in its place, and keeps the text and the tables."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page() -> Page:
    whole = record()
    return Page(render_page(whole, draw_svg(whole)))


def test_the_page_says_what_was_gained_and_what_it_cost(page):
    assert ["parameters", "1,000", "250", "4.0× fewer"] in page.rows
    assert ["FLOPs an image", "40.0 k", "10.0 k", "4.0× fewer"] in page.rows
    assert ["latency, 64 images", "12.0 ms", "4.00 ms", "3.0× faster"] in page.rows
    assert ["whole", "1,000", "0.2000", "97.12 %", "97.01 %"] in page.rows
    assert ["pruned", "250", "0.4000", "90.34 %", "90.23 %"] in page.rows
    assert ["recovered", "250", "0.3000", "95.56 %", "95.45 %"] in page.rows
    assert ["conv1", "6", "2", "66.67 %", "0.00111"] in page.rows
    assert "tiny on <blocks>: 30.4 % of its channels removed" in page.text


def test_the_page_says_what_was_left_alone_and_why(page):
    assert ["head<x>", "not pruned", "its outputs are the classes & stay"] in page.rows
    assert ["deep", "not compensated", "each channel has a filter of its own"] in page.rows
    assert ["fc1", "0.125"] in page.rows


def test_the_page_needs_nothing_else(page):
    assert page.references and all(reference.startswith("#") for reference in page.references)
    known = set(page.ids)
    assert len(page.ids) == len(known), "two elements have one identifier"
    assert {reference[1:] for reference in page.references} <= known


def test_the_page_has_no_script_and_both_themes():
    text = render_page(record(), draw_svg(record()))
    assert "<script" not in text and "@import" not in text and "@font-face" not in text
    assert re.findall(r"https?://(?!www\.w3\.org/)", text) == []
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("make", [record, scheduled])
def test_the_figures_are_svg_in_the_colours_of_the_page(make):
    figures = draw_svg(make())
    assert list(figures) == (
        ["accuracy", "widths", "spectra"] if make is record
        else ["accuracy", "course", "widths", "spectra"]
    )  # fmt: skip
    for svg in figures.values():
        element = ElementTree.fromstring(svg)
        assert element.get("width") is None and element.get("viewBox")
        assert "var(--ink)" in svg or "var(--muted)" in svg
        assert re.findall(r"(?:fill|stroke): #(?!000000)\w+", svg) == []


def test_rounds_add_up_and_what_was_rolled_back_does_not_count():
    whole = scheduled()
    assert [(w.name, w.before, w.after) for w in whole.widths] == [("conv1", 6, 2), ("fc1", 40, 20)]
    segments = whole.spectrum("conv1")
    assert [(s.start, s.removed, s.last) for s in segments] == [(0, 2, False), (2, 2, True)]
    text = Page(render_page(whole, draw_svg(whole)))
    assert ["3", "rolled back", "50.00 %", "1", "0.3000"] in text.rows
    assert ["rolled back, round 3", "250", "0.3000", "88.00 %", "–"] in text.rows


def test_a_pruning_whose_only_round_was_rolled_back_kept_all():
    whole = record(rounds=[entry(report(change("conv1", 6, 4)), "rolled back")])
    assert [(w.before, w.after) for w in whole.widths] == [(6, 6)]
    assert whole.ratio == 0
    render_page(whole, draw_svg(whole))


def test_costs_that_a_logarithm_cannot_show():
    costs = [0.0, -1e-18, 1e-30, 0.5, math.nan]
    whole = record(rounds=[entry(report(change("a", 6, 2, cost=costs)))])
    assert "spectra" in draw_svg(whole)
    dead = record(rounds=[entry(report(change("a", 3, 1, cost=[0.0, 0.0])))])
    assert "spectra" in draw_svg(dead)


def test_of_many_spectra_the_costly_ones_are_shown_in_their_order():
    changes = [change(f"layer{i}", 4, 3 if i % 2 else 1) for i in range(2 * MOST_SPECTRA)]
    whole = record(rounds=[entry(report(*changes))])
    assert spectra_shown(whole) == [f"layer{i}" for i in range(1, 2 * MOST_SPECTRA, 2)]
    assert f"The {MOST_SPECTRA} on which most was spent" in render_page(whole, draw_svg(whole))


def test_a_report_without_matrices_has_no_word_of_them():
    plain = report(change("a", 4, 2), importance="l2", selection="one-shot", source="none",
                   disagreement=None, uncompensated={}, refused={})  # fmt: skip
    whole = record(rounds=[entry(plain)], compensate=False)
    text = render_page(whole, draw_svg(whole))
    assert "autocorrelation" not in text
    assert "Every coupling was a candidate" in text


@pytest.mark.parametrize(
    ("compensate", "text"),
    [(True, "every layer that lost inputs was"), (False, "no layer was to be")],
)
def test_a_report_says_whether_weights_were_changed(compensate, text):
    plain = report(change("a", 4, 2), uncompensated={}, refused={})
    whole = record(rounds=[entry(plain)], compensate=compensate)
    page = render_page(whole, draw_svg(whole))
    assert f"Every coupling was a candidate, and {text} compensated." in page
    assert subtitle(whole).endswith(", nothing compensated") != compensate
    assert whole.to_dict()["compensate"] is compensate


def test_the_files_of_a_report(tmp_path):
    whole = record()
    write_report(tmp_path, whole, {"ratio": "0.7"})
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["format"] == "rlscuda-prune" and document["options"] == {"ratio": "0.7"}
    assert document["ratios"]["parameters"] == 4
    assert document["stages"][1] == dataclasses.asdict(whole.stages[1])
    assert ReportFolder(tmp_path).existing() == [
        tmp_path / f"report.{kind}" for kind in ("html", "json")
    ]


def test_a_sheet_that_earlier_versions_wrote_goes_with_its_report(tmp_path):
    for name in ("report.json", "report.png"):
        (tmp_path / name).write_text("earlier")
    with ReportFolder(tmp_path).replaced() as new:
        write_report(new, record(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_report_can_be_made_again_from_its_values():
    whole = report(change("conv1", 6, 4), kept_inputs=[0, 2])
    assert PruneReport.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1, "the same"), (1.25, "1.25× fewer"), (4, "4.0× fewer"), (0.5, "2.0× more")],
)
def test_ratios_in_words(ratio, text):
    assert times(ratio, "fewer", "more") == text


def test_gains_are_given_for_one_image():
    one = Gains(*(dataclasses.replace(m, batch_size=1) for m in (GAINS.before, GAINS.after)))
    assert gain_rows(record(gains=one))[2][0] == "peak memory, one image"
