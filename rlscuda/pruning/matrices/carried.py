"""`CarriedMatrices`: matrices that were made before, for a pruner that is given no data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlscuda.pruning.matrices.tracker import SketchTracker, Track


class CarriedMatrices(SketchTracker):
    """Matrices of an earlier training or calibration, as the `tracker` of an `RLSPruner`.

    They follow each pruning as those of any tracker do, and no forward: what the model learns
    afterwards they do not know.

    Args:
        model: The model, or another with layers of the same names and inputs, as one that was
            fine-tuned since.
        matrices: [groups, n, n] by layer name, as `own_matrices`, `calibrate` and
            `SketchTracker.matrices` give them, with a column of a layer's bias or without; copied.

    Raises:
        TypeError: `model` is no module, or a matrix no tensor of floating-point numbers.
        ValueError: A layer is not in the model, cannot have a matrix or has another input, or a
            matrix is not finite, symmetric and positive definite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> CarriedMatrices(model, {"2": torch.eye(4)[None]}).layers
        ('2',)
    """

    kind = "carried"
    _others = True

    def __init__(self, model: nn.Module, matrices: Mapping[str, Tensor]):
        if not matrices:
            raise ValueError("matrices must be those of at least one layer, got none")
        super().__init__(model, layers=list(matrices), dtype=torch.float64)
        self.detach()
        for name, P in matrices.items():
            layer = self._layers[name]
            check_spd(name, P)
            n = layer.columns
            fits = n, n + (layer.bias_parameter is not None)
            if P.shape[0] != layer.groups or P.shape[1] not in fits:
                raise ValueError(
                    f"the matrix of {name!r} must be {[layer.groups, n, n]} by the model, + 1 for "
                    f"a bias of its own, got {list(P.shape)}"
                )
            layer.bias = P.shape[1] == n + 1
            P = P.detach().to(layer.weight.device, torch.float64, copy=True)
            self._tracks[name] = Track(P, torch.ones_like(P[:, 0, 0]), 1)


def check_spd(name: str, P: object) -> None:
    """Checks the matrix of a layer.

    Raises:
        TypeError: It is no tensor of floating-point numbers.
        ValueError: It is not [groups, n, n], finite, symmetric and positive definite.
    """
    if not isinstance(P, Tensor) or not P.is_floating_point():
        got = P.dtype if isinstance(P, Tensor) else type(P).__name__
        raise TypeError(f"the matrix of {name!r} must be a floating-point tensor, got {got}")
    if P.dim() != 3 or P.shape[1] != P.shape[2] or not P.numel():
        raise ValueError(f"the matrix of {name!r} must be [groups, n, n], got {list(P.shape)}")
    P = P.detach().double()
    finite = bool(torch.isfinite(P).all())
    if not finite or not torch.equal(P, P.mT) or torch.linalg.cholesky_ex(P).info.any():
        raise ValueError(
            f"the matrix of {name!r} must be finite, symmetric and positive definite, which it "
            "is not"
        )
