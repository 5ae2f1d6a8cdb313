"""Checks a wheel as users get it: what it holds, and that it runs in bare environments.

    python tests/package/wheel_check.py dist/rlscuda-*.whl
    python tests/package/wheel_check.py dist/rlscuda-*.whl --torch 2.10.0 2.11.0 2.13.0

Each `--torch` gets an environment of its own, one after the other, which is deleted afterwards:
torch, the wheel and pytest, then `load_check.py` and tests of the operators and of the optimizer.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 10_000_000
TAG = r"rlscuda-(?P<version>[\d.]+)-cp3\d+-cp3\d+-(?P<tags>manylinux_2_[\w.]+_x86_64)\.whl"
PLACES = rb"(?<![\w.~/-])/(?:home|root|tmp|work|opt|mnt|srv|project|__w|usr/local)/[\w./+-]+"
TESTS = [
    "tests/ops/test_rls_update.py",
    "tests/ops/steps",
    "tests/ops/patches/test_patch_ops.py",
    "tests/optim/steps/test_spectral.py",
    "tests/optim/steps/test_skips.py",
    "tests/optim/models/test_state.py",
    "tests/optim/rates/test_groups.py",
    "tests/streaming/test_rls_filter.py",
]


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel, each in a line; none where it can be published."""
    name = re.fullmatch(TAG, wheel.name)
    if name is None:
        return [f"the name must be that of a manylinux wheel, got {wheel.name}"]
    found = []
    if wheel.stat().st_size >= MOST_BYTES:
        found.append(f"must be below {MOST_BYTES:,} bytes, got {wheel.stat().st_size:,}")
    with zipfile.ZipFile(wheel) as archive:
        files = {file: archive.read(file) for file in archive.namelist() if file[-1] != "/"}
    info = f"rlscuda-{name['version']}.dist-info"
    if strangers := {file.partition("/")[0] for file in files} - {"rlscuda", info}:
        found.append(f"must hold rlscuda and {info} alone, got {sorted(strangers)}")
    if f"{info}/licenses/LICENSE" not in files:
        found.append(f"{info}/licenses/LICENSE is missing")
    for line in (f"Version: {name['version']}", "License-Expression: Apache-2.0", "torch>=2.10"):
        if line.encode() not in files.get(f"{info}/METADATA", b""):
            found.append(f"METADATA must say {line!r}")
    libraries = [file for file in files if file.endswith(".so")]
    if len(libraries) != 1 or not libraries[0].startswith("rlscuda/_C."):
        found.append(f"must hold one library, rlscuda/_C, got {libraries}")
    for file, data in files.items():
        places = sorted({place.decode() for place in re.findall(PLACES, data)})
        found += [f"{file} names a place of the machine: {place}" for place in places]
    oldest = min(map(int, re.findall(r"manylinux_2_(\d+)_", name["tags"])))
    symbols = re.findall(rb"GLIBC_2\.(\d+)", b"".join(files[file] for file in libraries))
    if (newest := max(map(int, symbols), default=0)) > oldest:
        found.append(f"is tagged for glibc 2.{oldest}, needs symbols of 2.{newest}")
    return found


def run_in_bare_environment(wheel: Path, torch: str) -> None:
    """Installs torch and the wheel beside nothing else but pytest, and runs the tests there."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wheel_check_") as name:
        folder = Path(name)
        python = folder / "env" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={torch}", wheel, "pytest", "padasip"], check=True)
        unbuilt = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=unbuilt)
        shutil.copy(ROOT / "pyproject.toml", folder)
        installed = time.monotonic()
        subprocess.run([python, "tests/package/load_check.py"], cwd=folder, check=True)
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        subprocess.run(tests, cwd=folder, check=True)
    seconds = f"{installed - begun:.0f} s to install, {time.monotonic() - installed:.0f} s to test"
    print(f"{wheel.name} passes in torch {torch}: {seconds}", flush=True)


def main() -> None:
    """Checks one wheel; leaves with what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    if found := faults(wheel):
        sys.exit("\n".join(f"{wheel.name}: {fault}" for fault in found))
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, nothing wrong", flush=True)
    for version in arguments.torch:
        run_in_bare_environment(wheel, version)


if __name__ == "__main__":
    main()
