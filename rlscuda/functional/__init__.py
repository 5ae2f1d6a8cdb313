"""The operators as functions: argument checks and docstrings over `torch.ops.rlscuda`.

Nothing here records gradients: inputs are detached, matrices and weights change in place.
"""

from rlscuda.functional.patches import patch_mean, patch_sample, patch_sketch
from rlscuda.functional.updates import (
    factors_agree,
    nonfinite,
    rls_flush_,
    rls_update_,
    rls_update_held_,
)

__all__ = [
    "factors_agree",
    "nonfinite",
    "patch_mean",
    "patch_sample",
    "patch_sketch",
    "rls_flush_",
    "rls_update_",
    "rls_update_held_",
]
