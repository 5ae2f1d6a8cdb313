"""What `gpu_check.sh` must know before there is an extension, in two lines.

The card's architecture; and its name, the hash of the kernel sources and the versions, as the
inside of a JSON object.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform

import torch

from benchmarks.common.sources import tree_hash

PACKAGES = ("torch", "numpy", "ninja", "pybind11", "setuptools", "pytest", "pytest-benchmark")


def arch(capability: tuple[int, int]) -> str:
    """As TORCH_CUDA_ARCH_LIST has it: from 9.0 on with what is the card's own."""
    major, minor = capability
    return f"{major}.{minor}" + "a" * (major >= 9)


def facts(device: str) -> str:
    """The fields that every line of the journal ends with."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    record = {"device": device, "kernels": tree_hash(), "versions": versions}
    return json.dumps(record)[1:-1]


if __name__ == "__main__":
    print(arch(torch.cuda.get_device_capability()))
    print(facts(torch.cuda.get_device_name()))
