"""`benchmarks/gpu_check.sh` without a GPU: its dry run, and what a kill leaves of its journal.

For the journal a stand-in takes the place of Python and of compute-sanitizer.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

dry_run = pytest.importorskip("benchmarks.gpu.dry_run", reason="needs the source tree")
report = pytest.importorskip("benchmarks.gpu.report")
ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$*" in
  *gpu.probe*) printf '9.0a\\n"device": "stand-in"\\n' ;;
  *"$FAILS"*) exit 3 ;;
  *"$HANGS"*) sleep 20 ;;
esac
"""
SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift 2; done  # options and their values
exec "$@"
"""


@pytest.mark.parametrize("stage", ["prove", "measure"])
def test_the_dry_run_finds_nothing(stage):
    command = ["bash", "benchmarks/gpu_check.sh", stage, "--dry-run"]
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "\n0 findings" in run.stdout, run.stdout + run.stderr


def test_the_dry_run_finds_what_is_wrong():
    good = {"command": ["python3", "-m", "pytest", "-p", "no:benchmark", "tests/ops/test_cuda.py"]}
    assert dry_run.wrong(good) == []
    bad = {"command": ["python3", "-m", "pytest", "-p", "no_such", "tests/ops/test_gone.py"]}
    assert dry_run.wrong(bad) == [
        "there is no tests/ops/test_gone.py",
        "there is no module no_such",
    ]
    assert dry_run.wrong({"command": ["python3", "-m", "benchmarks.gone"]})
    steps = [{"lane": lane, "limit": 10 + lane} for lane in (0, 0, 1, 2, 2)]
    assert dry_run.seconds(steps) == 10 + 10 + 12 + 12
    assert dry_run.alternatives("a and (b or c) or d") == ["a and ( b or c )", "d"]
    names = ["test_a[1-x]", "test_b[1-y]"]
    assert dry_run.chosen("a and (x or y) or b and x", names) == names[:1]
    assert dry_run.chosen("not (a or z)", names) == names[1:]


def test_the_dry_run_reads_and_counts_the_tests():
    tests = "tests/ops/steps/test_nonfinite.py"
    pytest_of = ["python3", "-m", "pytest", "-p", "no:benchmark", tests]
    fine = {"step": "fine", "command": [*pytest_of, "-k", "float32 or not float64"]}
    dead = {"step": "dead", "command": [*pytest_of, "-k", "float32 or no_such"]}
    found = dry_run.unchosen([fine, dead])
    assert found == ["dead: 'no_such' chooses no test"]


@pytest.fixture
def machine(tmp_path):
    """The environment of a machine whose Python does nothing, and $OUT."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out")}
    return {**os.environ, **variables, "FAILS": "nothing", "HANGS": "nothing"}


def lines(machine):
    text = (Path(machine["OUT"]) / "check.jsonl").read_text()
    assert text.endswith("\n")
    records = [json.loads(line) for line in text.splitlines()]
    assert all(r["device"] == "stand-in" and r["seconds"] >= 0 for r in records)
    return {(r["step"], r["status"]): r for r in records}


def check(machine, stage):
    command = ["bash", ROOT / "benchmarks" / "gpu_check.sh", stage]
    return subprocess.run(command, env=machine, capture_output=True, text=True)


@pytest.mark.parametrize("stage", ["prove", "measure"])
def test_every_step_is_in_the_journal(machine, stage):
    done = check(machine, stage)
    steps = [step["step"] for step in dry_run.plan(stage)]
    assert done.returncode == 0, done.stdout
    found = lines(machine)
    assert {step for step, status in found if status == "ok"} == set(steps)
    assert all(f"{step} " in done.stdout for step in steps)


def test_a_step_that_fails_does_not_stop_the_others(machine):
    done = check({**machine, "FAILS": "tests/streaming"}, "prove")
    found = lines(machine)
    assert done.returncode == 1 and found["operators", "failed"]["exit"] == 3
    assert ("test_cuda", "ok") in found and ("racecheck", "ok") in found


def test_without_a_library_nothing_else_is_tried(machine):
    done = check({**machine, "FAILS": "gpu.library"}, "prove")
    assert done.returncode == 1
    assert {step for step, _ in lines(machine)} == {"device", "build"}


def test_a_kill_leaves_what_was_done(machine):
    command = ["bash", ROOT / "benchmarks" / "gpu_check.sh", "prove"]
    process = subprocess.Popen(
        command, env={**machine, "HANGS": "tests/streaming"}, start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    journal = Path(machine["OUT"]) / "check.jsonl"
    try:
        until = time.monotonic() + 60
        while not (journal.is_file() and '"racecheck", "status": "ok"' in journal.read_text()):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = lines(machine)
    assert ("build", "ok") in found and ("memcheck", "ok") in found
    assert ("operators", "started") in found and ("operators", "ok") not in found


def test_predictions_stand_beside_what_was_measured(tmp_path, capsys):
    path = tmp_path / "static_gpu.json"
    for text in (None, "{", "{}", '{"rows": []}'):
        if text is not None:
            path.write_text(text)
        assert report.predictions(path, "NVIDIA H200") == {}
        assert "nothing predicted" in capsys.readouterr().out
    rows = [
        {"case": case, "device": device, "microseconds": time}
        for device, case, time in [
            ("H200", "update n = 512", 1.5), ("H200", "update n = 512", 2.5),
            ("A100", "update n = 512", 9.0), ("H200", "held n = 512", 2.0),
        ]
    ]  # fmt: skip
    path.write_text(json.dumps({"rows": rows}))
    predicted = report.predictions(path, "NVIDIA H200")
    assert predicted == {"update n = 512": 4.0, "held n = 512": 2.0}
    ratio = {"ours / floor": {"median": 1.5, "best": 1.5, "target": 1.2}}
    times = {name: {"best": 6.0, "median": 7.0} for name in ("ours", "floor", "held")}
    case = {"case": "n = 512", "microseconds": times, "ratios": ratio}
    head, ours, floor, held, target = report.lines([case], predicted)
    assert ours.split()[-3:] == ["4", "µs", "1.50"] and held.endswith("3.00")
    assert floor.split()[-2:] == ["6", "µs"] and target.endswith("MISSED")
