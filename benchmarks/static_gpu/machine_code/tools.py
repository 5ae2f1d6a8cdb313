"""The machine code of the kernels: what `check_compile.py` has compiled, taken apart.

cuobjdump and nvdisasm come with NVIDIA's toolkit or in packages of their own (the extra `sass`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.environment import ROOT
from benchmarks.static_gpu.machine_code.sass import Function, parse

sys.path.append(str(ROOT / "tests" / "cuda_on_cpu"))
from check_compile import compiled, short_names  # noqa: E402

_PLACES = ("nvidia/*/bin", "triton/backends/nvidia/bin")  # in a folder of packages
_SYSTEM = {"sm_90": 1024}  # bytes that cuobjdump adds to shared memory where there is any
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) .*?SHARED:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """One kernel, compiled for one architecture.

    Attributes:
        name: `patch_mean: patch_mean_sums_kernel<float, 4>`, as in the budget.
        source: Its file.
        function: Its instructions.
        registers: Of a thread.
        shared: Bytes of static shared memory of a block.
    """

    name: str
    source: Path
    function: Function
    registers: int
    shared: int


def find(tool: str) -> str:
    """The path of one of NVIDIA's tools: on the PATH, beside nvcc, or in an installed package.

    Raises:
        FileNotFoundError: It is nowhere.
    """
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parent] if nvcc else []
    packages = [p for place in _PLACES for entry in sys.path for p in Path(entry).glob(place)]
    for folder in [None, *beside, Path("/usr/local/cuda/bin"), *packages]:
        found = shutil.which(tool) if folder is None else shutil.which(tool, path=str(folder))
        if found:
            return found
    raise FileNotFoundError(
        f"{tool} is not on the PATH, beside nvcc or in an installed package: "
        f'pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or the extra "rlscuda[sass]"'
    )


def _run(*command: str, folder: str | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
    return result.stdout


def kernels(arch: str) -> dict[str, Kernel]:
    """All kernels by name, for an architecture such as sm_90.

    Raises:
        FileNotFoundError: A tool is missing, or the architecture is not compiled for.
    """
    cuobjdump, nvdisasm = find("cuobjdump"), find("nvdisasm")
    found: dict[str, Kernel] = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        compiled_object = compiled(source)
        with tempfile.TemporaryDirectory() as folder:
            _run(cuobjdump, "-xelf", arch, str(compiled_object), folder=folder)
            cubins = list(Path(folder).glob("*.cubin"))
            if len(cubins) != 1:
                raise FileNotFoundError(f"{source.name} is not compiled for {arch}")
            text = _run(nvdisasm, "-gi", "-c", str(cubins[0]))
            usage = _run(cuobjdump, "-res-usage", str(cubins[0]))
        if ".section\t.text" not in text:  # a file without kernels
            continue
        takes = {
            name: (int(r), max(0, int(s) - _SYSTEM.get(arch, 0)))
            for name, r, s in _USAGE.findall(usage)
        }
        functions = parse(text)
        names = short_names([f.name for f in functions])
        for name, function in zip(names, functions):
            name = f"{source.stem}: {name}"
            found[name] = Kernel(name, source, function, *takes[function.name])
    return found
