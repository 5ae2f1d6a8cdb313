"""The matrices of an `RLSOptimizer`, turned back into inverse autocorrelation matrices."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.closed_form.formulas import check_matrix, damped_inverse, invert_, symmetrise_
from rlscuda.optim.kinds.recurrent import RECURRENT
from rlscuda.optim.layers import Layer
from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.options import check_number

_LEAST_DAMPING = 1e-12  # of a matrix with drift, whose inverse without any may not exist


def own_matrices(
    optimizer: RLSOptimizer, names: Iterable[str] | None = None, damping: float = 1e-3
) -> dict[str, Tensor]:
    """The inverse autocorrelation matrices that an optimizer has tracked while it trained.

    Without drift and shrinkage (paper and natural form) that is `P` as it is, up to a common
    factor and, where it forgets, the ridge. With drift (spectral and adaptive form) or shrinkage
    `P` is near the root of it and is turned back, see `adaptive_to_inverse` and
    `shrunk_to_inverse`.

    Args:
        optimizer: The optimizer; left as it is.
        names: Qualified names of layers that its RLS rule covers; all that it has made a step with
            by default.
        damping: Relative to the mean power of the layer's input; used where `P` is turned back,
            with drift from 1e-12 up to half the drift's square.

    Returns:
        [groups, n, n] each, on the layer's device, the live `P`, not a copy, where it is used as it
        is and whole, else float64. A common factor of each is arbitrary, and so saliencies from it
        compare within a layer, or relative to the layer's output energy.

    Raises:
        TypeError: `optimizer` is no RLSOptimizer.
        ValueError: A layer is not covered or has made no step yet, or `damping` is negative.
    """
    if not isinstance(optimizer, RLSOptimizer):
        raise TypeError(f"optimizer must be an RLSOptimizer, got {type(optimizer).__name__}")
    check_number("damping", damping, 0)
    registry = optimizer._registry
    if names is None:
        layers = {layer.name: layer for layer in registry.layers.values()}
    else:
        layers = {name: registry.find(name) for name in names}
    found = by_weight(optimizer, damping, {layer.weight for layer in layers.values()})
    for name in () if names is None else layers:
        if layers[name].weight not in found:
            raise ValueError(f"{name!r} has no matrix yet: the optimizer has made no step with it")
    return {name: found[one.weight] for name, one in layers.items() if one.weight in found}


def of_model(
    model: nn.Module, optimizers: Sequence[Optimizer], damping: float
) -> dict[str, Tensor]:
    """The matrices that a model's optimizers have of its layers but recurrent ones, by layer name.

    They are found by their weights, since an optimizer may have been given a part of the model.

    Raises:
        ValueError: There is none yet.
    """
    prunable = [m for m in model.modules() if not isinstance(m, RECURRENT)]
    wanted = {p for m in prunable for p in m.parameters(recurse=False)}
    own: dict[nn.Parameter, Tensor] = {}
    for one in optimizers:
        if isinstance(one, RLSOptimizer):
            own |= by_weight(one, damping, wanted)
    if not own:
        raise ValueError("the optimizer's own matrices are needed: it has made no step yet")
    weights = {name: getattr(m, "weight", None) for name, m in model.named_modules()}
    return {n: own[w] for n, w in weights.items() if isinstance(w, nn.Parameter) and w in own}


def by_weight(
    optimizer: RLSOptimizer, damping: float, weights: Container[nn.Parameter] | None = None
) -> dict[nn.Parameter, Tensor]:
    """The matrix of each covered weight that the optimizer has made a step with, or of some."""
    result: dict[nn.Parameter, Tensor] = {}
    made: dict[tuple[int, int], Tensor] = {}  # layers of one input share P
    optimizer._check_whole()
    for weight, covered in optimizer._registry.covered.items():
        layer, group = covered.layer, covered.group
        state = optimizer.state.get(weight, {})
        if not state.get("step") or (weights is not None and weight not in weights):
            continue
        key = (id(state["P"]), id(group))
        if key in made:
            result[weight] = made[key]
            continue
        P = state["P"] if state["P"].dim() == 3 else state["P"][None]
        drift = group["drift"]
        if drift:
            enough = min(max(damping, _LEAST_DAMPING), drift * drift / 2)
            parts = [adaptive_to_inverse(part, drift, enough)[None] for part in P]
            P = parts[0] if len(parts) == 1 else torch.cat(parts)
        elif group["shrinkage"]:
            options = {k: group[k] for k in ("forgetting", "gain", "shrinkage", "initial_scale")}
            P = torch.stack([shrunk_to_inverse(part, damping=damping, **options) for part in P])
        result[weight] = made[key] = P if layer.blocks == 1 else _assembled(layer, P.double())
    return result


def _assembled(layer: Layer, blocks: Tensor) -> Tensor:
    """The block-diagonal matrix [groups, n, n] of each group, without what fills up a block."""
    whole = [torch.block_diag(*own) for own in blocks.unflatten(0, (layer.groups, -1))]
    return torch.stack(whole)[:, : layer.fan_in, : layer.fan_in]


def adaptive_to_inverse(P: Tensor, drift: float, damping: float) -> Tensor:
    r"""The inverse autocorrelation from the adaptive form's P, whose fixed point is dP + PAP = I.

    So :math:`A = P^{-1} (I - \delta P) P^{-1}`. Directions that never fire have eigenvalues of P at
    the cap :math:`1/\delta`, where A is zero; the damping lowers the drift to
    :math:`d = \delta - damping / \delta`, which adds :math:`(damping / \delta) P^{-1}` to A: no
    less than damping, reached where nothing fires, and next to nothing where A is large. With
    x / (1 - x) in partial fractions one inversion is enough:

    .. math:: (A + \tfrac{damping}{\delta} P^{-1})^{-1} = P (I - d P)^{-1} P
              = d^{-2} \left((I - d P)^{-1} - I - d P\right)

    The optimizer divides inputs by the root of their mean power, so this is the matrix of the
    divided inputs, whose mean power is 1: the true one times that power. A common factor changes
    neither the order of saliencies within a layer, nor compensation, nor a downdate.

    Args:
        P: The adaptive form's matrix [n, n].
        drift: Its drift :math:`\delta` > 0.
        damping: In (0, drift^2), of the mean power of the divided inputs; multiplied by 10 as long
            as eigenvalues of P above the cap, by rounding or a large start, ask for more.

    Returns:
        float64 [n, n], symmetric to the bit, positive definite.

    Raises:
        TypeError: P is no floating-point tensor.
        ValueError: P is not square, not finite, not positive or far above the cap, or `drift` or
            `damping` is out of range.
    """
    check_matrix("P", P)
    if not 0 < drift < math.inf:
        raise ValueError(f"drift must be > 0 and finite, got {drift}")
    if not 0 < damping < drift * drift:
        raise ValueError(f"damping must be in (0, drift^2 = {drift * drift:g}), got {damping}")
    if not (P.diagonal() > 0).all():
        raise ValueError(f"P must have a positive diagonal, got {float(P.diagonal().min()):g}")
    while damping < drift * drift:
        d = drift - damping / drift
        result = P.detach().to(torch.float64, copy=True).mul_(-d)
        result.diagonal().add_(1)
        with suppress(torch.linalg.LinAlgError):
            invert_(result).sub_(P.detach(), alpha=d).diagonal().sub_(1)
            return symmetrise_(result.div_(d * d))
        damping *= 10
    raise ValueError(f"P must have eigenvalues up to 1 / drift = {1 / drift:g}, got larger ones")


def shrunk_to_inverse(
    P: Tensor,
    forgetting: float,
    gain: float,
    shrinkage: float,
    initial_scale: float,
    damping: float,
) -> Tensor:
    r"""The inverse autocorrelation from the P of a form with shrinkage towards :math:`P_0 = pI`.

    Its fixed point :math:`P = (1 - \mu) (\lambda P^{-1} + \kappa A)^{-1} + \mu P_0` is near the
    root of :math:`A^{-1}`, no multiple of it; solved for A, which is then damped and inverted:

    .. math:: \kappa A = (1 - \mu) (P - \mu P_0)^{-1} - \lambda P^{-1}

    Args:
        P: The matrix [n, n].
        forgetting: :math:`\lambda` in (0, 1].
        gain: :math:`\kappa` > 0.
        shrinkage: :math:`\mu` in (0, 1).
        initial_scale: p.
        damping: See `damped_inverse`.

    Returns:
        float64 [n, n], symmetric to the bit, positive definite.

    Raises:
        TypeError: P is no floating-point tensor.
        ValueError: P is not square or finite, or no positive A fits it.
    """
    P = check_matrix("P", P)
    shifted = P.clone()
    shifted.diagonal().sub_(shrinkage * initial_scale)
    A = torch.linalg.inv(shifted).mul_(1 - shrinkage).sub_(torch.linalg.inv(P), alpha=forgetting)
    return damped_inverse(symmetrise_(A.div_(gain)), damping)
