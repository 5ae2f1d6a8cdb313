"""The specification of every operator in plain PyTorch, exact in float64.

Written for reading: explicit inverses and loops over groups, nothing in place. The compiled
operators are tested against these functions, and a reader may take them as the definition.
"""

from rlscuda.reference.banks import rls_filter_bank
from rlscuda.reference.filter import rls_filter
from rlscuda.reference.patches import patch_mean, patch_rows, patch_sample, patch_sketch
from rlscuda.reference.ridge import HeldRidge, information_update
from rlscuda.reference.updates import (
    AdaptiveStep,
    HeldBack,
    SpectralStep,
    adaptive_weight_step,
    block_rls_update,
    nesterov,
    rls_update,
    running_power,
    spectral_direction,
    spectral_root,
    spectral_scale,
    spectral_weight_step,
    trusted,
    weight_step,
)

__all__ = [
    "AdaptiveStep",
    "HeldBack",
    "HeldRidge",
    "SpectralStep",
    "adaptive_weight_step",
    "block_rls_update",
    "information_update",
    "nesterov",
    "patch_mean",
    "patch_rows",
    "patch_sample",
    "patch_sketch",
    "rls_filter",
    "rls_filter_bank",
    "rls_update",
    "running_power",
    "spectral_direction",
    "spectral_root",
    "spectral_scale",
    "spectral_weight_step",
    "trusted",
    "weight_step",
]
