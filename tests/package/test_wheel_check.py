"""What `wheel_check.py` finds wrong with a wheel, one planted fault at a time."""

import re
import runpy
import zipfile
from pathlib import Path

import pytest

faults = runpy.run_path(str(Path(__file__).with_name("wheel_check.py")))["faults"]
INFO, LIBRARY = "rlscuda-1.2.3.dist-info", "rlscuda/_C.cpython-311-x86_64-linux-gnu.so"
METADATA = b"Version: 1.2.3\nLicense-Expression: Apache-2.0\nRequires-Dist: torch>=2.10\n"
FILES = {
    "rlscuda/__init__.py": b"import torch\n",
    LIBRARY: b"\x7fELF ./csrc/library.cpp GLIBC_2.14 GLIBC_2.28",
    f"{INFO}/METADATA": METADATA,
    f"{INFO}/licenses/LICENSE": b"Apache License",
}


def wheel(folder, files, tags="manylinux_2_28_x86_64"):
    path = folder / f"rlscuda-1.2.3-cp311-cp311-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "tags", ["manylinux_2_28_x86_64", "manylinux_2_28_x86_64.manylinux_2_34_x86_64"]
)
def test_nothing_is_wrong(tags, tmp_path):
    assert faults(wheel(tmp_path, FILES, tags)) == []


@pytest.mark.parametrize(
    ("changed", "tags", "reason"),
    [
        ({}, "linux_x86_64", "must be that of a manylinux wheel"),
        ({}, "manylinux_2_27_x86_64.manylinux_2_28_x86_64", "glibc 2.27, needs symbols of 2.28"),
        ({LIBRARY: b"GLIBC_2.34"}, None, "glibc 2.28, needs symbols of 2.34"),
        ({LIBRARY: b"x" * 10_000_000}, None, "must be below 10,000,000 bytes, got 10,"),
        ({LIBRARY: b"\0/tmp/tree/checks.h\0"}, None, "of the machine: /tmp/tree/checks.h"),
        ({"rlscuda/a.py": b"'/home/user/data'"}, None, "rlscuda/a.py names a place of the machine"),
        ({"rlscuda.libs/libcudart.so": b""}, None, "must hold rlscuda and .* alone"),
        ({"tests/test_a.py": b""}, None, "alone, got .'tests'."),
        ({LIBRARY: None}, None, "must hold one library, rlscuda/_C, got .."),
        ({f"{INFO}/licenses/LICENSE": None}, None, "licenses/LICENSE is missing"),
        ({f"{INFO}/METADATA": b"Version: 1.2.4"}, None, "METADATA must say 'Version: 1.2.3'"),
    ],
    ids=[
        "tag",
        "tags",
        "glibc",
        "size",
        "path",
        "script",
        "library",
        "tests",
        "none",
        "licence",
        "version",
    ],
)
def test_a_fault_is_found(changed, tags, reason, tmp_path):
    files = {name: data for name, data in (FILES | changed).items() if data is not None}
    found = "\n".join(faults(wheel(tmp_path, files, tags or "manylinux_2_28_x86_64")))
    assert re.search(reason, found), found
