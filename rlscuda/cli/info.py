"""`rlscuda info`: what is installed, what was built, what runs here."""

from __future__ import annotations

import platform

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import rlscuda


def print_info(console: Console) -> None:
    """Prints a table of versions, build and machine."""
    build = rlscuda.build_info()
    cuda = "not built (CPU library only)"
    if build["cuda"]:
        cuda = f"built with nvcc {build['cuda']} for {build['cuda_archs']}"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in (
        ("rlscuda", build["version"]),
        ("torch", f"{build['torch']} (the extension loads in {build['abi']} and later)"),
        ("python", platform.python_version()),
        ("CUDA kernels", cuda),
        ("CUDA devices", ", ".join(devices) or "none seen by torch"),
        ("SIMD level", build["simd"]),
        ("threads", build["threads"]),
        ("kernel sources", build["source_hash"]),
    ):
        table.add_row(Text(key, style="bold"), str(value))
    console.print(table)
