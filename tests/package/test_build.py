"""The source distribution, read-only trees, and what a build says where something is missing.

setup.py runs against stand-ins of torch and pybind11: nothing is compiled here.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
TORCH = """
import os
__version__ = os.environ["TORCH_VERSION"]
if "READ_ONLY" in os.environ:
    os.access = lambda path, mode: False
"""
PYBIND11 = """
import os
def get_include(): return "pybind11"
if "NO_PYBIND11" in os.environ:
    raise ModuleNotFoundError(name="pybind11")
"""
CPP_EXTENSION = """
from setuptools import Extension as CppExtension
from setuptools.command.build_ext import build_ext
def include_paths(): return ["torch/include"]
class BuildExtension(build_ext):
    def build_extension(self, ext):
        assert "SOURCE_HASH" in open(ext.include_dirs[-1] + "/build_info.h").read()
        self.mkpath(self.build_temp)
        open(self.build_temp + "/object.o", "w")
"""


@pytest.fixture
def tree(tmp_path):
    """The files of the source tree, without what was built in it, beside the stand-ins."""
    built = shutil.ignore_patterns(
        "*.so", "*.pyc", "__pycache__", ".*", "build", "dist", "*.egg-info"
    )
    shutil.copytree(ROOT, tmp_path / "tree", ignore=built)
    stand_ins = tmp_path / "stand_ins"
    (stand_ins / "torch" / "utils").mkdir(parents=True)
    (stand_ins / "torch" / "__init__.py").write_text(TORCH)
    (stand_ins / "torch" / "utils" / "cpp_extension.py").write_text(CPP_EXTENSION)
    (stand_ins / "pybind11.py").write_text(PYBIND11)
    return tmp_path / "tree"


def setup_py(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    defaults = {"RLSCUDA_CUDA": "0", "TORCH_VERSION": "2.10.0", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = (
        {**os.environ, "PYTHONPATH": f"{tree.parent / 'stand_ins'}"} | defaults | environment
    )
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_sdist_holds_every_source_and_needs_no_compiler(tree, tmp_path):
    wanted = {p for p in files(tree) if p.startswith(("csrc", "rlscuda", "tests"))}
    wanted |= {"setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    wanted |= {"Makefile", "CITATION.cff"}
    assert any(p.endswith(".h") for p in wanted) and any(p.endswith(".cu") for p in wanted)
    done = setup_py(tree, "sdist", "-d", str(tmp_path), CXX="no_compiler", TORCH_VERSION="2.100")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted <= held
    assert not [name for name in held if name.startswith("build") or name.endswith(".pyc")]


def test_a_read_only_tree_is_built_elsewhere(tree, tmp_path):
    before = files(tree)
    build = ["bdist_wheel", "-d", str(tmp_path)]
    assert setup_py(tree, *build, "--skip-build", READ_ONLY="1").returncode == 0
    done = setup_py(tree, "egg_info", "build_ext", READ_ONLY="1")
    assert done.returncode == 0, done.stderr
    assert files(tree) == before


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no_compiler"}, "needs a C.. compiler .*, got .*no_compiler.*not found"),
        ({"CXX": "c++ -include no_such.h"}, "needs C.*20 .*, got .*no_such.h"),
        ({"CXX": "c++ -fsyntax-only -xc++ - #"}, "needs Python's headers .*, got .*Python.h"),
        ({"TORCH_VERSION": "2.9.1"}, "needs torch 2.10 or newer, got 2.9.1"),
        ({"NO_PYBIND11": "1"}, "needs pybind11, which is not installed"),
        ({"RLSCUDA_CUDA": "1", "PATH": ""}, "RLSCUDA_CUDA=1 needs nvcc"),
    ],
    ids=["compiler", "language", "headers", "torch", "pybind11", "nvcc"],
)
def test_what_is_missing_is_said_in_one_line(tree, environment, reason):
    command = "egg_info" if "PATH" in environment else "build"
    done = setup_py(tree, command, **environment)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(f".*{reason}.*\n", done.stderr)
