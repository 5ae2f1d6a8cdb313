"""`rlscuda info`, `rlscuda bench`, and what `import rlscuda` alone needs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.cli import call, subprocess_environment

import rlscuda
from rlscuda.cli import bench


def test_info_says_what_is_built_and_what_runs(capsys):
    status, out, _ = call(capsys, "info")
    build = rlscuda.build_info()
    assert status == 0
    for value in (build["version"], torch.__version__, build["simd"], build["source_hash"]):
        assert str(value) in out
    assert any(
        line.split() == ["threads", str(torch.get_num_threads())] for line in out.split("\n")
    )


@pytest.mark.parametrize(
    ("cuda", "line"), [("13.0", "built with nvcc 13.0 for 8.0 9.0+PTX"), (None, "not built")]
)
def test_info_says_whether_cuda_was_built(capsys, monkeypatch, cuda, line):
    build = {**rlscuda.build_info(), "cuda": cuda, "cuda_archs": "8.0 9.0+PTX"}
    monkeypatch.setattr(rlscuda, "build_info", lambda: build)
    assert line in call(capsys, "info")[1]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like a source checkout; what is run is recorded instead."""
    (tmp_path / "rlscuda").mkdir()
    (tmp_path / "benchmarks" / "chapter").mkdir(parents=True)
    for name in ("bench_one.py", "bench_two.py"):
        (tmp_path / "benchmarks" / "chapter" / name).touch()
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    commands: list[tuple[list[str], object]] = []

    def run(command, cwd, check):
        commands.append((command[1:], cwd))
        return subprocess.CompletedProcess(
            command, 3 if "benchmarks/chapter/bench_two.py" in command else 0
        )

    monkeypatch.setattr(bench.subprocess, "run", run)
    return tmp_path, commands


def test_bench_runs_the_named_benchmarks_and_prints_their_tables(checkout, capsys):
    folder, commands = checkout
    assert call(capsys, "bench", "one")[0] == 0
    assert commands == [
        (["-m", "pytest", "benchmarks/chapter/bench_one.py"], folder),
        (["-m", "benchmarks.tables", "one"], folder),
    ]


def test_bench_stops_when_a_benchmark_fails(checkout, capsys):
    status, _, error = call(capsys, "bench")
    assert status == 2
    files = "benchmarks/chapter/bench_one.py benchmarks/chapter/bench_two.py"
    assert f"{files} failed with exit status 3" in error
    assert len(checkout[1]) == 1


def test_bench_names_the_benchmarks_there_are(checkout, capsys):
    status, _, error = call(capsys, "bench", "three")
    assert status == 1 and "no benchmark 'three': expected one of one, two" in error


def test_bench_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "rlscuda" / "cli" / "bench.py"))
    status, _, error = call(capsys, "bench")
    assert status == 1 and "rlscuda bench needs a source checkout" in error


def test_import_rlscuda_needs_only_torch_and_numpy():
    code = (
        "import sys, rlscuda\n"
        "extras = {'typer', 'rich', 'matplotlib', 'mlxtend', 'PIL', 'torchvision', 'sklearn',\n"
        "          'torch_pruning', 'safetensors', 'onnx'}\n"
        "print(sorted(extras & sys.modules.keys()), 'rlscuda.cli' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[] False"


def test_an_unknown_command_is_a_usage_error(capsys):
    status, _, error = call(capsys, "fly")
    assert status == 2 and "fly" in error
