"""Build of the extension `rlscuda._C`; metadata lives in pyproject.toml.

Environment switches:
    RLSCUDA_CUDA=auto|0|1    build the CUDA kernels: if nvcc is found, never, always (default auto)
    TORCH_CUDA_ARCH_LIST     architectures to compile for (default 8.0 8.6 8.9 9.0+PTX)
    MAX_JOBS                 parallel compile jobs
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pybind11
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
CPU_SOURCES = [
    "csrc/library.cpp",
    "csrc/rls_update.cpp",
    "csrc/cpu/rls_update_cpu.cpp",
    "csrc/rls_filter.cpp",
    "csrc/cpu/rls_filter_cpu.cpp",
]
CUDA_SOURCES = ["csrc/cuda/runtime.cu"]


def source_hash() -> str:
    """The hash of every kernel source, by which a stale benchmark result is recognised."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in {".cpp", ".h", ".cu", ".cuh"}:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def cuda_home() -> Path | None:
    """The toolkit of the nvcc on the PATH, or None where CUDA is not to be built."""
    switch = os.environ.get("RLSCUDA_CUDA", "auto")
    if switch not in {"auto", "0", "1"}:
        raise SystemExit(f"RLSCUDA_CUDA must be auto, 0 or 1, got {switch!r}")
    nvcc = None if switch == "0" else shutil.which("nvcc")
    if nvcc is None:
        if switch == "1":
            raise SystemExit("RLSCUDA_CUDA=1 needs nvcc on the PATH, and none was found")
        return None
    # nvcc may be a wrapper script on the PATH: it knows its own toolkit best
    dryrun = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    text = subprocess.run(dryrun, capture_output=True, text=True, check=True).stderr
    return Path(text.split("TOP=")[1].splitlines()[0]).resolve()


def gencode_flags() -> list[str]:
    """One -gencode a requested architecture; `+PTX` adds the forward-compatible form."""
    flags = []
    for arch in (
        os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 8.6 8.9 9.0+PTX").replace(";", " ").split()
    ):
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extension():
    """The one extension module: stable-ABI ops and the pybind11 module."""
    cuda = cuda_home()
    defines = [
        "-DNDEBUG",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f'-DRLSCUDA_SOURCE_HASH="{source_hash()}"',
    ]
    cxx = [
        "-O3",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-psabi",
        f"-ffile-prefix-map={ROOT}=.",
        *defines,
    ]
    if cuda:
        cxx.append("-DRLSCUDA_WITH_CUDA")
    ext = cpp_extension.CppExtension(
        "rlscuda._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        extra_compile_args={
            "cxx": cxx,
            "nvcc": ["-O3", "--cudart=static", *defines, *gencode_flags()],
        },
        extra_link_args=["-Wl,--no-as-needed", "-Wl,-s"],
    )
    ext.libraries = ["torch", "torch_cpu"]
    if cuda:
        cpp_extension.CUDA_HOME = str(cuda)  # torch sets it only where it is itself a CUDA build
        ext.library_dirs += [
            str(cuda / sub) for sub in ("lib64", "lib", "targets/x86_64-linux/lib")
        ]
        ext.libraries += ["cudart_static", "rt", "dl"]
    return ext


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
