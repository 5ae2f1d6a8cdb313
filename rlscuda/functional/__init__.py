"""Operators as functions: forms of arguments, types of errors, docstrings over `torch.ops.rlscuda`.

The operators check their arguments when they run; traced without values, they are not checked.
Nothing here records gradients: inputs are detached, matrices change in place. Those of a step that
is no update of a matrix are called by the optimizer alone.
"""

from rlscuda.functional.banks import rls_filter_bank_
from rlscuda.functional.patches import patch_mean, patch_sample, patch_sketch
from rlscuda.functional.updates import (
    rls_flush_,
    rls_ridge_,
    rls_update_,
    rls_update_held_,
)

__all__ = [
    "patch_mean",
    "patch_sample",
    "patch_sketch",
    "rls_filter_bank_",
    "rls_flush_",
    "rls_ridge_",
    "rls_update_",
    "rls_update_held_",
]
