"""What an import says where torch is too old, or the extension is missing, foreign or broken."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlscuda
from rlscuda import _loading

IMPORT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in str(finder)]
sys.path.insert(0, {folder!r})
import torch
torch.__version__ = {version!r}
import rlscuda
"""


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cu126", "1.13.1", "2.1.0a0+git1234567"])
def test_an_older_torch_is_refused(version):
    with pytest.raises(ImportError, match=f"2.10 or newer, got {re.escape(version)}"):
        _loading.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234567", "2.100.0", "3.0", "10.1"])
def test_a_newer_torch_is_taken(version):
    _loading.check_torch(version)


def spoil(extension: Path, fault: str) -> None:
    if fault == "missing":
        extension.unlink()
    elif fault == "foreign":
        extension.rename(extension.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    elif fault == "broken":
        extension.write_bytes(b"no library")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", r"not built for Python 3\.\d+: in .* is none; .*pip install -e \. builds it"),
        ("foreign", r"not built for Python 3\.\d+: in .* is _C\.cpython-39-.*\.so;"),
        ("broken", rf"does not load in torch {re.escape(torch.__version__)}: .*_C\..*"),
        ("old torch", r"needs torch 2\.10 or newer, got 2\.9\.1: pip install -U torch"),
    ],
)
def test_an_import_says_in_one_line_what_is_missing(fault, reason, tmp_path):
    unbuilt = shutil.ignore_patterns("__pycache__")
    package = shutil.copytree(Path(rlscuda.__file__).parent, tmp_path / "rlscuda", ignore=unbuilt)
    spoil(next(path for path in package.glob("_C.*") if path.suffix != ".pyi"), fault)
    version = "2.9.1" if fault == "old torch" else torch.__version__
    script = IMPORT.format(folder=str(tmp_path), version=str(version))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match(f"ImportError: rlscuda.*{reason}", done.stderr.splitlines()[-1]), done.stderr
