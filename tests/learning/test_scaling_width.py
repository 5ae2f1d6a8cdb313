"""The benchmark of width: its fits, its formulas, its lanes, its report."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("benchmarks.common.environment", reason="needs the source tree")
from benchmarks import scaling_width as width
from benchmarks.distributed.counting import PRODUCTS
from benchmarks.scaling_width import Case, crossing, exponent, work


def test_an_exponent_is_that_of_the_upper_half():
    xs = [2.0**k for k in range(6, 14)]
    ys = [1.0 + 5e-9 * x**3 for x in xs]
    assert exponent(xs, [7 * x**2.5 for x in xs]) == pytest.approx(2.5)
    assert exponent(xs, ys) > 2.9 > exponent(xs[:4], ys[:4])
    bent = [x if x < 700 else 700 * (x / 700) ** 2 for x in xs]
    assert exponent(xs, bent) == pytest.approx(2)  # the lower half has no say
    assert exponent([1.0, 4.0], [1.0, 2.0]) is None


def test_a_crossing_lies_between_two_points():
    xs = [16.0, 64.0, 256.0]
    assert crossing(xs, [100 / x for x in xs]) == pytest.approx(100)
    assert crossing(xs, [x / 20 for x in xs]) == pytest.approx(20)
    assert crossing(xs, [2.0, 3.0, 4.0]) is None
    assert crossing([1.0, 4.0, 16.0, 64.0], [2.0, 0.5, 2.0, 0.5]) == pytest.approx(32)  # the last


def test_formulas_are_those_of_the_products():
    """Counted by torch over one step, own operators by theirs; the update of P is no product."""
    from torch.utils.flop_counter import FlopCounterMode

    def raw(count):  # from tensors, not their shapes
        def counted(*arguments, **named):
            return count(*arguments, **named)

        counted._get_raw = True
        return counted

    ours = {packet: raw(count) for packet, count in PRODUCTS.items() if packet is not None}
    case = Case(width=512, depth=2, batch=64)
    for name in ("RLS spectral", "Muon"):
        lane = width.Lane(name, case)
        lane()
        with FlopCounterMode(display=False, custom_mapping=ours) as counter:
            lane()
        said = work(case)["training"] + work(replace(case, rank=0))[name]
        assert counter.get_total_flops() == pytest.approx(said, rel=0.01), name


def test_a_lane_holds_what_its_state_has():
    case = Case(width=32, depth=3, batch=4)
    weights = 4 * 3 * 32**2
    held = {}
    for name in width.OPTIMIZERS:
        lane = width.Lane(name, case)
        step, whole = lane()
        assert 0 < step < whole
        held[name] = lane.held()
    assert held["Muon"] == weights and held["AdamW"] == pytest.approx(2 * weights, rel=0.01)
    assert held["RLS spectral"] >= 2 * weights and held["RLS adaptive"] >= 2 * weights


def test_where_every_step_is_slow_the_baseline_is_measured_all_the_same():
    found = width.measure(Case(width=16, batch=8, rank=2), 0.0, 3)
    assert set(found) == set(width.OPTIMIZERS)
    assert all(row["steps"] == 1 and row["ratio"] > 0 for row in found.values())


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Series of small networks, and a file for their results."""
    base = Case(width=16, batch=8, rank=2)
    series = {
        "width": [replace(base, width=n) for n in (16, 32, 64)],
        "depth": [replace(base, depth=n) for n in (1, 2)],
        "batch": [replace(base, batch=n) for n in (4, 8, 16)],
        "rank": [replace(base, rank=n) for n in (1, 2, 4)],
    }
    monkeypatch.setattr(width, "SERIES", series)
    threads = torch.get_num_threads()
    yield tmp_path / "scaling_width.json"
    torch.set_num_threads(threads)


def test_an_interrupted_run_goes_on(small, monkeypatch, capsys):
    measured = []

    def measure(case, seconds, most):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case)
        return {name: {"step": 1.0} for name in width.OPTIMIZERS}

    monkeypatch.setattr(width, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        width.run(small, ["width"])
    assert [row["case"]["width"] for row in json.loads(small.read_text())["rows"]] == [16, 32]
    measured.clear()
    monkeypatch.setattr(width.environment, "built_hash", lambda: "of other kernels")
    with pytest.raises(KeyboardInterrupt):
        width.run(small, ["width"])  # starts anew
    assert len(measured) == 2


def test_the_report_has_every_series(small, tmp_path):
    width.run(small, list(width.SERIES))
    document = json.loads(small.read_text())
    assert len(document["rows"]) == 3 + 1 + 2 + 2  # the base is in all series
    text = width.report(document)
    lines = text.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith(("| 16", "| 32", "| 64"))]
    for series in width.SERIES:
        assert sum(line.startswith(f"| {series}, ") for line in lines) == 1 + (series == "width")
    assert sum(line.startswith("- **RLS") for line in lines) == 4
    assert f"kernels {document['environment']['source_hash']}" in lines[-1]
    width.plot(document, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    for row in document["rows"]:
        for figures in row["optimizers"].values():
            assert 0 < figures["step"] < figures["whole"] and figures["steps"] > 1
            assert figures["peak"] is None or figures["peak"] > figures["state"] > 0
        assert row["optimizers"]["AdamW"]["ratio"] == 1
