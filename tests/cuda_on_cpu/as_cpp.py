"""Builds the extension under sanitizers, CUDA kernels as C++ if wanted; see README.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from torch.utils import cpp_extension

HERE = Path(__file__).parent.resolve()
SHARED = re.compile(r"__shared__ ([\w:<> ]+?) (\w+)((?:\[[^\]]+\])*);")
DYNAMIC = re.compile(r"extern __shared__ (?:alignas\(\d+\) )?([\w:]+) (\w+)\[\];")

PLAIN = "-O1 -g1 -std=c++20 -fPIC -fvisibility=hidden -Wno-psabi -Wno-attributes"
SANITIZED = (
    f"{PLAIN} -Wall -Wno-unknown-pragmas -Werror -fno-strict-aliasing -fno-omit-frame-pointer "
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -ffp-contract=off"
)


def as_cpp(source: str) -> str:
    """CUDA source with its shared variables, which C++ cannot declare, taken from the engine."""
    source = DYNAMIC.sub(r"\1* \2 = static_cast<\1*>(cuda_on_cpu::dynamic_shared());", source)
    source = SHARED.sub(r"auto& \2 = cuda_on_cpu::shared<\1\3>();", source)
    code = re.sub("//.*", "", source)
    if "__shared__" in code or "<<<" in code:
        raise SystemExit("a shared variable or a launch has a form that as_cpp.py does not know")
    return source


def put(path: Path, text: str) -> None:
    """Writes a file unless it has that text, so that only what changed is compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def environment(target: Path, asan: str) -> dict[str, str]:
    """The environment variables under which what `build` has built runs."""
    preloaded = [  # the second so that the first finds what it wraps, C++'s throw
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": f"detect_leaks=0:{asan}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(target),
        "OMP_NUM_THREADS": "1",
    }


def build(root: Path, target: Path, cuda: bool = True) -> None:
    """Builds the package at `root` into `target`/rlscuda, and copies the tests beside it.

    Args:
        root: The repository.
        target: Where the build goes.
        cuda: Whether tensors count as those of a CUDA device, and the kernels for it are the ones
            that are sanitized. Without, it is all of the CPU's half.
    """
    for source in (root / "csrc").rglob("*.*"):
        text = source.read_text()
        if source.parent.name == "cuda":
            text = f'#line 1 "{source.relative_to(root)}"\n' + as_cpp(text)
        put(target / source.relative_to(root), text)
    for name in ("cuda_runtime.h", "engine.cpp"):
        put(target / "engine" / name, (HERE / name).read_text())
    info = {"SOURCE_HASH": '"cuda_on_cpu"', "CUDA_ARCHS": '""'}
    put(
        target / "generated" / "build_info.h",
        "".join(f"#define RLSCUDA_{name} {value}\n" for name, value in info.items()),
    )
    for stale in [*(target / "rlscuda").rglob("*.py"), *(target / "tests").rglob("*.py")]:
        stale.unlink()
    tests = [
        p for name in ("support", "ops", "fuzz") for p in (root / "tests" / name).rglob("*.py")
    ]
    for source in [*(root / "rlscuda").rglob("*.py"), root / "tests" / "conftest.py", *tests]:
        put(target / source.relative_to(root), source.read_text())
    shutil.copy(root / "pyproject.toml", target)

    includes = ["engine", "csrc", "csrc/cuda", "generated", pybind11.get_include()]
    includes += [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    host = [p for p in (root / "csrc").glob("*.cpp") if p.name != "cuda_call.cpp"]
    host += (root / "csrc" / "cpu").glob("*.cpp")
    sources = {str(p.relative_to(root)): "plain" if cuda else "sanitized" for p in sorted(host)}
    defines = "-DNDEBUG -DTORCH_TARGET_VERSION=0x020a000000000000"
    if cuda:
        kernels = (root / "csrc" / "cuda").glob("*.cu")
        sources |= {str(p.relative_to(root)): "sanitized" for p in sorted(kernels)}
        sources["engine/engine.cpp"] = "plain"
        defines += " -DRLSCUDA_WITH_CUDA"
    flags = defines + "".join(
        f" -isystem {i}" if i.startswith("/") else f" -I{i}" for i in includes
    )
    lines = []
    for rule, options in (("plain", PLAIN), ("sanitized", SANITIZED)):
        lines += [
            f"rule {rule}",
            f"  command = g++ {options} {flags} -MMD -MF $out.d -x c++ -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    libraries = " ".join(f"-L{p} -Wl,-rpath,{p}" for p in cpp_extension.library_paths())
    lines += [
        "rule link",
        "  command = g++ -shared -fsanitize=address,undefined $in -o $out "
        f"-Wl,--no-as-needed {libraries} -ltorch -ltorch_cpu",
    ]
    lines += [f"build objects/{name}.o: {rule} {name}" for name, rule in sources.items()]
    objects = " ".join(f"objects/{name}.o" for name in sources)
    module = "rlscuda/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    lines += [f"build {module}: link {objects}", ""]
    put(target / "build.ninja", "\n".join(lines))
    ninja = [sys.executable, "-m", "ninja", "--quiet"]
    if subprocess.run(ninja, cwd=target).returncode:
        raise SystemExit("the build under sanitizers failed")
