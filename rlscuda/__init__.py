"""Recursive least squares for PyTorch: fused kernels, a drop-in optimizer, streaming filters."""

from typing import TYPE_CHECKING, Any

import torch

from rlscuda._loading import _C, OLDEST_TORCH
from rlscuda.optimizer import RLSOptimizer
from rlscuda.streaming.bank import RLSFilterBank
from rlscuda.streaming.filter import RLSFilter
from rlscuda.streaming.held import HeldMatrix

if TYPE_CHECKING:
    from rlscuda.streaming.regression.regressor import RLSRegressor

__version__ = "0.2.0"
__all__ = [
    "HeldMatrix",
    "RLSFilter",
    "RLSFilterBank",
    "RLSOptimizer",
    "RLSRegressor",
    "build_info",
]


def __getattr__(name: str) -> Any:
    """RLSRegressor when it is asked for: it brings scikit-learn, as heavy as torch to import."""
    if name == "RLSRegressor":
        from rlscuda.streaming.regression.regressor import RLSRegressor

        return RLSRegressor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_info() -> dict:
    """What was built and what runs here.

    Returns:
        `version`; `torch`, the version at hand; `abi`, the oldest torch it runs with; `cuda`, the
        toolkit of the CUDA kernels or None where none were built; `simd`, the level that the CPU
        kernels dispatch to; `threads`; `source_hash`, of the kernel sources.
    """
    cuda = _C.cuda_runtime
    return {
        "version": __version__,
        "torch": torch.__version__,
        "abi": OLDEST_TORCH,
        "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        "cuda_archs": _C.cuda_archs,
        "simd": _C.simd,
        "threads": torch.get_num_threads(),
        "source_hash": _C.source_hash,
    }
