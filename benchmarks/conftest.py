"""The `race` fixture: times lanes against one another and writes benchmarks/results/<name>.json.

A file `bench_<name>_cuda.py` times on a GPU and writes <name>.cuda.json; without one it is skipped.

Results are written when every benchmark of a file has run and passed; a partial run (`-k`, `::`,
`--benchmark-disable`) shows its figures and leaves the file alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.common import environment, harness, shapes
from benchmarks.gpu.journal import RECORD

RESULTS = Path(__file__).parent / "results"
_LINE = "race"
_MACHINE = pytest.StashKey[dict]()
_CEILINGS = pytest.StashKey[dict[str, dict]]()  # by device
# Every file forms one results document, after its stem without `bench_`.
_documents: dict[str, list[dict]] = {}
_incomplete: set[str] = set()


def _name(path: Path) -> str:
    stem = path.stem.removeprefix("bench_")
    return f"{stem.removesuffix('_cuda')}.cuda" if stem.endswith("_cuda") else stem


def _device(name: str) -> str:
    return "cuda" if name.endswith(".cuda") else "cpu"


def pytest_configure(config):
    # One pytest-benchmark round is a round of the whole race: its own table would say nothing.
    config.option.benchmark_quiet = True
    config.stash[_MACHINE] = environment.machine()
    config.stash[_CEILINGS] = {}


def pytest_deselected(items):
    _incomplete.update(_name(item.path) for item in items)


def pytest_collection_modifyitems(config, items):
    if any("::" in argument for argument in config.args):
        _incomplete.update(_name(item.path) for item in items)


def pytest_runtest_logreport(report):
    if report.outcome != "passed":
        _incomplete.add(_name(Path(report.location[0])))


def pytest_report_teststatus(report):
    lines = [text for key, text in report.user_properties if key == _LINE]
    if report.when == "call" and report.passed and lines:
        return "passed", "".join(f"\n{line}" for line in lines), "PASSED"
    return None


@pytest.fixture(scope="session")
def built() -> None:
    """Ends the run where the extension is not that of the tree."""
    built, tree = environment.built_hash(), environment.tree_hash()
    if built != tree:
        pytest.exit(
            f"the extension was built from other kernel sources ({built}) than those in the tree "
            f"({tree}): build it again, e.g. pip install -e . --no-build-isolation",
            returncode=2,
        )


@pytest.fixture
def ceilings(request, built) -> dict[str, float]:
    """Copy bandwidth [GB/s] and GEMM rate [GFLOP/s] of the file's device, measured in this run."""
    device, known = _device(_name(request.node.path)), request.config.stash[_CEILINGS]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device not in known:
        known[device] = harness.ceilings(device)
    return known[device]


@pytest.fixture
def race(benchmark, request, ceilings) -> Callable[..., harness.Race]:
    """A function that times one case.

    Its arguments: `case`, a name; `lanes`, callables by name, the first being ours; `targets`, the
    largest ratio to reach by `"lane / lane"`; `ratios`, further
    pairs `"lane / lane"` to report, by default ours to every other;
    `traffic`, bytes, adds the lane `shapes.FLOOR`, a copy of as many bytes; `facts`, whatever else
    belongs to the case; `rounds`, `sample_seconds`, `every`, `work`: see `harness.Race`.
    """
    file = request.node.path
    device = _device(_name(file))

    def run(
        case: str,
        lanes: dict[str, harness.Lane],
        *,
        targets: dict[str, float] | None = None,
        ratios: list[str] | None = None,
        traffic: float | None = None,
        facts: dict | None = None,
        rounds: int = 20,
        sample_seconds: float = 2e-3,
        every: dict[str, int] | None = None,
        work: dict[str, float] | None = None,
    ) -> harness.Race:
        targets = targets or {}
        if traffic is not None:
            lanes = {**lanes, shapes.FLOOR: harness.copy_lane(traffic, device)}
        contest = harness.Race(lanes, sample_seconds, every, work, harness.waiting(device))
        benchmark.pedantic(contest.round, rounds=rounds)
        first, *others = lanes
        pairs = [*targets, *(ratios or (f"{first} / {name}" for name in others))]
        record = {"case": case, **({"facts": facts} if facts else {})}
        record["rounds"] = contest.rounds
        record["microseconds"] = {
            name: {k: _round(v * 1e6) for k, v in contest.seconds(name).items()} for name in lanes
        }
        record["ratios"] = {
            pair: {k: _round(v) for k, v in contest.ratio(*pair.split(" / ")).items()}
            | ({"target": targets[pair]} if pair in targets else {})
            for pair in dict.fromkeys(pairs)
        }
        benchmark.extra_info.update(record)
        _documents.setdefault(_name(file), []).append(record)
        if benchmark.disabled:
            _incomplete.add(_name(file))
        request.node.user_properties += [(_LINE, _line(record)), (RECORD, record)]
        return contest

    run.ceilings = ceilings
    return run


def _round(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _line(record: dict) -> str:
    times = ", ".join(f"{k} {v['best']:g} us" for k, v in record["microseconds"].items())
    shown = [
        f"{pair} = {r['median']:.3g} (best {r['best']:.3g}"
        + (f", target {r['target']:g})" if "target" in r else ")")
        for pair, r in record["ratios"].items()
    ]
    return f"{record['case']}: {times}; {'; '.join(shown)}"


def pytest_sessionfinish(session, exitstatus):
    """Writes the results of every file that ran as a whole."""
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # interrupted
        _incomplete.update(_documents)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for name, records in _documents.items():
        if name in _incomplete:
            reporter.write_line(f"\n{name}: not the whole file ran and passed, results not written")
            continue
        measured = session.config.stash[_CEILINGS][_device(name)]
        document = {
            "schema": shapes.SCHEMA,
            "name": name,
            "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
            "source_hash": environment.built_hash(),
            "machine": session.config.stash[_MACHINE],
            "versions": environment.versions(),
            "ceilings": {k: _round(v) for k, v in measured.items()},
        }
        head = json.dumps(document, indent=2, ensure_ascii=False).removesuffix("\n}")
        body = ",\n".join(f"    {json.dumps(record, ensure_ascii=False)}" for record in records)
        RESULTS.mkdir(exist_ok=True)
        text = f'{head},\n  "cases": [\n{body}\n  ]\n}}\n'
        (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
