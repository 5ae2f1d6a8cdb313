"""Build of the extension `rlscuda._C`; metadata lives in pyproject.toml. Environment switches.

RLSCUDA_CUDA=auto|0|1    build the CUDA sources: if nvcc is found, never, always (default auto)
TORCH_CUDA_ARCH_LIST     architectures to compile for (default 8.0 8.6 8.9 9.0+PTX)
MAX_JOBS                 parallel compile jobs
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

try:
    import pybind11
    import torch
    from setuptools import setup
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(f"building rlscuda needs {error.name}, which is not installed") from None
found = re.match(r"(\d+)\.(\d+)", torch.__version__)  # as numbers: "2.9" is before "2.10"
if tuple(map(int, found.groups())) < (2, 10):
    raise SystemExit(f"building rlscuda needs torch 2.10 or newer, got {torch.__version__}")

ROOT = Path(__file__).parent.resolve()
PATCHES = ["patch_mean", "patch_sample", "patch_sketch"]
OPS = ["complete_products", "nesterov", "nonfinite", *PATCHES, "rls_bank", "rls_held", "rls_update"]
OPS += ["spectral_root", "weight_step"]
ON_CPU = ["factors_agree", "rls_filter", "spectral_direction"]
FILES = [name for op in [*ON_CPU, *OPS] for name in (op, f"cpu/{op}_cpu")]
FILES += ["cpu/rls_complex_filter_cpu", "cpu/rls_complex_update_cpu", "cpu/rls_root_filter_cpu"]
FILES += ["cpu/rls_calls_cpu"]
CPU_SOURCES = [f"csrc/{name}.cpp" for name in ["library", *FILES]]
CUDA_SOURCES = ["csrc/cuda_call.cpp", *(f"csrc/cuda/{op}.cu" for op in ["runtime", *OPS])]
ARCHS = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0 8.6 8.9 9.0+PTX")  # torch reads it


def check_compiler() -> None:
    """Says in one line what a build lacks to compile C++20 against Python."""
    code = "#include <Python.h>\n#include <bit>\nstatic_assert(std::bit_cast<int>(1.f) != 1);\n"
    flags = f'-std=c++20 -fsyntax-only -I"{sysconfig.get_path("include")}" -xc++ -'
    command = f"LC_ALL=C {os.environ.get('CXX', 'c++')} {flags}"  # CXX as torch reads it
    run = subprocess.run(command, shell=True, input=code, capture_output=True, text=True)
    if run.returncode and not {"sdist", "egg_info", "dist_info"} & set(sys.argv):
        why = re.search(r".*(error|not found).*|$", run.stderr)[0]
        lack = "Python's headers (python3-dev)" if "Python.h" in why else "C++20 (as of g++ 11)"
        lack = "a C++ compiler (g++ 11, or CXX=...)" if run.returncode == 127 else lack
        raise SystemExit(f"building rlscuda needs {lack}, got {why!r}")


def source_hash() -> str:
    """The hash of all kernel sources but their comments and spaces, which dates a benchmark."""
    sources = sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in {".cpp", ".h", ".cu"})
    parts = [p.name.encode() + re.sub(rb"//.*|\s+", b"", p.read_bytes()) for p in sources]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def cuda_home() -> Path | None:
    """The toolkit of the nvcc on the PATH, or None where CUDA is not to be built."""
    switch, nvcc = os.environ.get("RLSCUDA_CUDA", "auto"), shutil.which("nvcc")
    if switch not in {"auto", "0", "1"}:
        raise SystemExit(f"RLSCUDA_CUDA must be auto, 0 or 1, got {switch!r}")
    if switch == "1" and nvcc is None:
        raise SystemExit("RLSCUDA_CUDA=1 needs nvcc on the PATH, and none was found")
    if switch == "0" or nvcc is None:
        return None
    # nvcc may be a wrapper script: its dry run names its own toolkit
    dryrun = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull]
    text = subprocess.run(dryrun, capture_output=True, text=True, check=True).stderr
    if (version := int(re.search(r"__CUDACC_VER_MAJOR__=(\d+)", text)[1])) < 12:  # without C++20
        raise SystemExit(f"nvcc must be 12 or newer (or RLSCUDA_CUDA=0), got {version}")
    return Path(re.search(r"TOP=(.*)", text)[1]).resolve()


def extension(generated: Path):
    """The one extension module: operators on the stable ABI of torch 2.10, and its Python side."""
    cuda = cuda_home()
    defines = ["-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    defines += ["-DRLSCUDA_WITH_CUDA"] if cuda else []
    info = f'#define RLSCUDA_SOURCE_HASH "{source_hash()}"\n'
    info += f'#define RLSCUDA_CUDA_ARCHS "{ARCHS if cuda else ""}"\n'
    generated.mkdir(parents=True, exist_ok=True)
    (generated / "build_info.h").write_text(info)
    # messages name files from where their #include starts, not by where they lie on this machine
    places = [ROOT, cpp_extension.include_paths()[0], pybind11.get_include()]
    both = ["-O3", "-std=c++20"]  # which torch before 2.13 does not ask for itself
    cxx = [*both, "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    cxx += [f"-ffile-prefix-map={place}=." for place in places]
    ext = cpp_extension.CppExtension(
        "rlscuda._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc"), str(generated)],
        extra_compile_args={"cxx": cxx + defines, "nvcc": [*both, "--cudart=static", *defines]},
        extra_link_args=["-Wl,--no-as-needed", "-Wl,-s"],
    )
    ext.libraries = ["torch", "torch_cpu", *(["cudart_static", "rt", "dl"] if cuda else [])]
    if cuda:
        cpp_extension.CUDA_HOME = str(cuda)  # torch sets it only where it is itself a CUDA build
        ext.library_dirs += [str(cuda / p) for p in ("lib64", "lib", "targets/x86_64-linux/lib")]
    return ext


check_compiler()
base = str(ROOT / "build") if os.access(ROOT, os.W_OK) else tempfile.mkdtemp()
folders = {"build": {"build_base": base}, "egg_info": {"egg_base": base}}
commands = {"build_ext": cpp_extension.BuildExtension}
setup(ext_modules=[extension(Path(base, "generated"))], cmdclass=commands, options=folders)
