"""Build of the extension `rlscuda._C`; metadata lives in pyproject.toml.

Environment switches:
    RLSCUDA_CUDA=auto|0|1    build the CUDA sources: if nvcc is found, never, always (default auto)
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
OPS = [
    "factors_agree",
    "nonfinite",
    "patch_mean",
    "patch_sample",
    "patch_sketch",
    "rls_filter",
    "rls_update",
]
OPS += ["weight_step"]
CPU_SOURCES = [f"csrc/{op}.cpp" for op in ["library", *OPS]]
CPU_SOURCES += [f"csrc/cpu/{op}_cpu.cpp" for op in OPS]
CUDA_SOURCES = ["csrc/cuda/runtime.cu"]
ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 8.6 8.9 9.0+PTX").replace(";", " ")


def source_hash() -> str:
    """The hash of every kernel source, by which a stale benchmark result is recognised."""
    sources = sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in {".cpp", ".h", ".cu"})
    parts = [f"{p.relative_to(ROOT).as_posix()}\0".encode() + p.read_bytes() for p in sources]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def cuda_home() -> Path | None:
    """The toolkit of the nvcc on the PATH, or None where CUDA is not to be built."""
    switch = os.environ.get("RLSCUDA_CUDA", "auto")
    if switch not in {"auto", "0", "1"}:
        raise SystemExit(f"RLSCUDA_CUDA must be auto, 0 or 1, got {switch!r}")
    nvcc = shutil.which("nvcc")
    if switch == "1" and nvcc is None:
        raise SystemExit("RLSCUDA_CUDA=1 needs nvcc on the PATH, and none was found")
    if switch == "0" or nvcc is None:
        return None
    # nvcc may be a wrapper script: its dry run names its own toolkit
    dryrun = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    text = subprocess.run(dryrun, capture_output=True, text=True, check=True).stderr
    return Path(text.split("TOP=")[1].splitlines()[0]).resolve()


def extension():
    """The one extension module: operators on the stable ABI of torch 2.10, and its Python side."""
    cuda = cuda_home()
    defines = ["-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    generated = ROOT / "build" / "generated"
    generated.mkdir(parents=True, exist_ok=True)
    facts = {"SOURCE_HASH": source_hash(), "CUDA_ARCHS": ARCHS if cuda else ""}
    lines = [f'#define RLSCUDA_{name} "{value}"\n' for name, value in facts.items()]
    lines += ["#define RLSCUDA_WITH_CUDA\n"] if cuda else []
    (generated / "build_info.h").write_text("".join(lines))
    gencode = []
    for arch in ARCHS.split():
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
        gencode += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    cxx = ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", f"-ffile-prefix-map={ROOT}=."]
    nvcc = ["-O3", "--cudart=static", *gencode]
    ext = cpp_extension.CppExtension(
        "rlscuda._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc"), str(generated)],
        extra_compile_args={"cxx": cxx + defines, "nvcc": nvcc + defines},
        extra_link_args=["-Wl,--no-as-needed", "-Wl,-s"],
    )
    ext.libraries = ["torch", "torch_cpu"]
    if cuda:
        cpp_extension.CUDA_HOME = str(cuda)  # torch sets it only where it is itself a CUDA build
        places = ("lib64", "lib", "targets/x86_64-linux/lib")
        ext.library_dirs += [str(cuda / place) for place in places]
        ext.libraries += ["cudart_static", "rt", "dl"]
    return ext


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
