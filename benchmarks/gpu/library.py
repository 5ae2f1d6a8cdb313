"""The extension for the card: the one that is there, the one in $LIBRARY, or one that is built now.

Whichever it is lies then in rlscuda/, and where $OUT is a folder, in it too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common.sources import ROOT

PACKAGE = ROOT / "rlscuda"
CHECK = """
import os, sys, rlscuda
from benchmarks.common.environment import built_hash, tree_hash
info = rlscuda.build_info()
print({name: info[name] for name in ("source_hash", "cuda", "cuda_archs")}, "of", tree_hash())
sys.exit(built_hash() != tree_hash() or info["cuda_archs"] != os.environ["TORCH_CUDA_ARCH_LIST"])
"""


def fits() -> bool:
    """Whether the extension in the tree is that of its sources, for the architecture asked for."""
    return subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT).returncode == 0


def main() -> int:
    """Finds or builds the extension; 0 where it fits in the end."""
    given, out = os.environ.get("LIBRARY"), os.environ.get("OUT")
    fitting = fits()
    if not fitting and given:
        if not Path(given).is_file():
            print(f"LIBRARY must be a file, got {given!r}: building instead")
        else:
            shutil.copy2(given, PACKAGE)
            fitting = fits()
    if not fitting:
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(build, cwd=ROOT, check=True, env={**os.environ, "RLSCUDA_CUDA": "1"})
        if not fits():
            return 1
    if out and Path(out).is_dir():
        suffix = "cpython-{}{}".format(*sys.version_info[:2])
        for library in PACKAGE.glob(f"_C.{suffix}*.so"):
            shutil.copy2(library, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
