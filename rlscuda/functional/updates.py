"""Updates of matrices as functions, and fake kernels of all operators but those of patches."""

from __future__ import annotations

import torch
from torch import Tensor

from rlscuda.functional.calls import as_user_error, call, check_tensor, fake
from rlscuda.functional.ridges import (
    as_tensor,
    check_count,
    check_ridge,
    raise_,
    ridge_rows,
    stabilise_,
)

_ops = torch.ops.rlscuda
_rls_update = _ops.rls_update_.default


def _changed(*tensors: Tensor | None) -> None:
    """Tells autograd what an operator has written, so that a graph that needs the old notices."""
    torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def rls_update_(
    P: Tensor,
    s: Tensor,
    forgetting: float = 1.0,
    gain: float = 1.0,
    *,
    decay: float = 1.0,
    diffusion: float = 0.0,
    initial_scale: float = 1.0,
    power: Tensor | None = None,
    health: Tensor | None = None,
    found_inf: Tensor | None = None,
    ridge: float | Tensor = 0.0,
    turn: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    r"""Updates inverse autocorrelation matrices in place by r rows, bit-symmetrically.

    With :math:`U = P S^T` and :math:`H = \lambda I + (\kappa/r) S U`,

    .. math:: P \leftarrow \frac{decay}{\lambda}
              \left(P - \tfrac{\kappa}{r} U H^{-1} U^T\right) + diffusion \cdot I

    which at decay 1 and diffusion 0 is the inverse of :math:`\lambda P^{-1} + (\kappa/r) S^T S`
    (Sherman-Morrison-Woodbury). Where H is not positive definite or not finite, `P` is reset to
    ``initial_scale * I``; where `s` is not finite, `P` is left as it is.

    Of a complex `P` every transpose is conjugated: U = P S^H, and P becomes the inverse of
    :math:`\lambda P^{-1} + (\kappa/r) S^H S`, Hermitian to the bit. The rows of S are then x^H: a
    sample x of `RLSFilter` enters the same P as the row ``x.conj()``.

    Args:
        P: [n, n] or [b, n, n], float32 or float64, contiguous, symmetric positive definite; on the
            CPU complex64 or complex128 too, Hermitian.
        s: Rows [n] or [r, n]; [b, r, n] for batched `P`. Of the dtype of `P`.
        forgetting: Forgetting factor :math:`\lambda` in (0, 1].
        gain: Gain :math:`\kappa` > 0 of the new rows.
        decay: Factor on the updated matrix: 1 - mu for shrinkage mu, 1 - kappa delta for drift.
        diffusion: What is added to its diagonal: mu P_0 for shrinkage, kappa for drift.
        initial_scale: Diagonal of the matrix after a reset.
        power: [b] running mean of the squared input, of the (real) dtype of `P`; updated with
            `gain`, and the rows then count as divided by its square root. What is kept of it takes
            no more than 100 times itself for the mean square of `s`, which bounds what a wild batch
            leaves behind; where the dtype cannot hold that mean square, the update is refused.
        health: float64 counters [7], one for each of `rlscuda._C.health_slots`.
        found_inf: One bool; where it is true, the update is refused.
        ridge: :math:`\rho`, what forgetting leaves at least of the information on a coordinate,
            :math:`P^{-1} \ge \rho I`: a number, or a tensor that expands to [n] or [b, n]; 0 for
            plain forgetting, under which `P` overflows where inputs stay 0. Each coordinate is
            raised once in K updates, the most that forget no more than half, by
            :math:`\rho (\lambda^{-K} - 1)`; no more than ceil(n / K) after any update, and none
            where that is refused.
        turn: Number of this update, an int >= 0 or an int64 tensor [], of which the device reads
            whose turn it is. Only in a series from one number to the next the ridge is kept.

    Returns:
        `u`, of the shape of `s`, the rows S P before the update, and `h`, [] or [b], the mean of
        the diagonal of H, real; NaN where `P` was refused or reset.

    Raises:
        ValueError: A shape, dtype, device or value is not as above.
        TypeError: An argument is not of its type.

    Example:
        >>> P = torch.eye(2)
        >>> u, h = rls_update_(P, torch.tensor([1.0, 2.0]), forgetting=0.5)
        >>> float(h)
        5.5
        >>> P
        tensor([[ 1.6364, -0.7273],
                [-0.7273,  0.5455]])
    """
    ridged = isinstance(ridge, Tensor) or ridge != 0
    if ridged:
        _check_raise(P, ridge, "turn", turn)
    try:
        options = (forgetting, gain, decay, diffusion, initial_scale, power, health, found_inf)
        result = _rls_update(P, s.detach() if s.requires_grad else s, *options)
    except Exception as error:
        check_tensor("P", P)
        check_tensor("s", s)
        if P.is_conj():
            raise ValueError("P must be in memory as it is, got a conjugated view") from None
        raise as_user_error(error) from None
    _changed(P, power, health)
    if not ridged:
        return result
    u, h = result
    return u, stabilise_(P, h, forgetting, ridge, turn, initial_scale, health)


def rls_ridge_(
    P: Tensor,
    ridge: float | Tensor,
    first: int | Tensor = 0,
    count: int | None = None,
    *,
    initial_scale: float = 1.0,
    found_inf: Tensor | None = None,
) -> Tensor:
    r"""Raises the information on some coordinates in place, bit-symmetrically.

    .. math:: P \leftarrow \left(P^{-1} + \sum_j ridge_j\, e_j e_j^T\right)^{-1}

    over `count` coordinates from `first` on, after the last of which comes the first. It is an
    update by rows :math:`\sqrt{ridge_j}\, e_j` that forgets nothing; one by rows of zeros leaves
    `P` as it is.

    Args:
        P: [n, n] or [b, n, n], float32 or float64, contiguous, symmetric positive definite.
        ridge: A number >= 0, or a tensor that expands to [n] or [b, n], which is not looked at.
        first: An int >= 0, or an int64 tensor [], which the device reads.
        count: At most n; None for n.
        initial_scale: Diagonal of the matrix after a reset, where `P` is not positive definite.
        found_inf: One bool; where it is true, `P` is left as it is.

    Returns:
        `h`, [] or [b], the mean of :math:`1 + ridge_j P_{jj}`; NaN where `P` was refused or reset.

    Raises:
        ValueError: A shape, dtype, device or value is not as above.
        TypeError: An argument is not of its type.

    Example:
        >>> P = torch.eye(2)
        >>> float(rls_ridge_(P, 3.0, first=1, count=1))
        4.0
        >>> P
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])
    """
    n = _check_raise(P, ridge, "first", first)
    count = n if count is None else count
    check_count("count", count)
    if not isinstance(count, int) or count > n:
        raise ValueError(f"count must be at most n={n}, got {count}")
    if not count:
        return P.new_ones(P.shape[:-2])
    try:
        rows = ridge_rows(P, as_tensor(P, ridge), first, count, count)
        return raise_(P, rows, initial_scale, found_inf)
    except Exception as error:
        raise as_user_error(error) from None


def _check_raise(P: Tensor, ridge: float | Tensor, name: str, place: int | Tensor) -> int:
    """Checks the arguments of a raise; returns n."""
    check_tensor("P", P)
    if P.dim() not in (2, 3) or P.shape[-1] != P.shape[-2]:
        raise ValueError(f"P must be [n, n] or [b, n, n], got {list(P.shape)}")
    check_ridge(P, ridge)
    check_count(name, place)
    return P.shape[-1]


def rls_update_held_(
    P: Tensor,
    held: Tensor,
    state: Tensor,
    s: Tensor,
    forgetting: float = 1.0,
    gain: float = 1.0,
    *,
    decay: float = 1.0,
    diffusion: float = 0.0,
    initial_scale: float = 1.0,
    power: Tensor | None = None,
    health: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Updates as `rls_update_`, but holds the update back: `P` is read and seldom written.

    The matrix is that of three tensors together, with V the rows of `held` that count,

    .. math:: P_{true} = scale\,(P - V^T V) + shift \cdot I

    and an update appends :math:`\sqrt{(\kappa/r) / scale}\; L^{-1} U`, :math:`H = L L^T`, to V and
    multiplies scale by decay / forgetting. When `held` is full, or scale leaves [1/4, 4], the same
    call applies all of it in one pass over `P`, bit-symmetrically; that is decided on the device,
    so nothing is waited for. A reset writes `P` and drops what was held; a refused update changes
    nothing. `HeldMatrix` owns the three tensors and is the easier way.

    Args:
        P: [n, n] or [b, n, n], float32 or float64, contiguous, as `rls_update_` takes it.
        held: [K, r, n] or [b, K, r, n] of the dtype of `P`: room for K >= 2 updates by r rows, at
            most 64 rows. Contents do not matter where `state` says that nothing is held.
        state: float64 [3] or [b, 3]: scale, shift and the number of updates held; 1, 0, 0 at first.
        s: Rows [r, n], [b, r, n] for batched `P`; [n] where r = 1.
        forgetting: See `rls_update_`, as all that follows.
        gain: Gain.
        decay: Factor on the updated matrix.
        diffusion: What is added to its diagonal.
        initial_scale: Diagonal of the matrix after a reset.
        power: [b] running mean of the squared input.
        health: float64 counters [7].
        found_inf: One bool.

    Returns:
        `u`, the rows P_true s before the update, and `h`, as `rls_update_` does.

    Raises:
        ValueError: A shape, dtype, device or value is not as above or as `rls_update_` takes it.
        TypeError: An argument is not of its type.
    """
    check_tensor("s", s)
    options = (forgetting, gain, decay, diffusion, initial_scale, power, health, found_inf)
    result = call(_ops.rls_update_held_.default, P, held, state, s.detach(), *options)
    _changed(P, held, state, power, health)
    return result


def rls_flush_(P: Tensor, held: Tensor, state: Tensor) -> None:
    """Applies what `rls_update_held_` holds back: `P` becomes the matrix, and nothing is held.

    Args:
        P: [n, n] or [b, n, n].
        held: [K, r, n] or [b, K, r, n].
        state: float64 [3] or [b, 3].

    Raises:
        ValueError: Shapes, dtypes or devices do not fit one another.
        TypeError: An argument is not of its type.
    """
    call(_ops.rls_flush_.default, P, held, state)
    _changed(P, state)


@fake("rls_update_")
def _(P, s, forgetting, gain, decay, diffusion, initial_scale, power, health, found_inf):
    return s.new_empty(s.shape), P.new_empty(P.shape[:-2], dtype=P.dtype.to_real())


@fake("rls_update_held_")
def _(P, held, state, s, forgetting, gain, decay, diffusion, initial_scale, *rest):
    return s.new_empty(s.shape), P.new_empty(P.shape[:-2])


@fake("foreach_rls_update_")
def _(P, s, *rest):
    return P[0].new_empty(sum(p.shape[0] if p.dim() == 3 else 1 for p in P))


@fake("foreach_nesterov_")
def _(grad, grad_bias, average, h, place, groups, rows, momentum):
    sizes = (k * padded * M.shape[1] for k, padded, M in zip(groups, rows, average))
    matrices = sum(groups)
    return h.new_empty(sum(sizes)), h.new_empty(matrices), h.new_empty(matrices)


@fake("foreach_complete_products_")
def _(product, weight, bias, bias_row, grad_bias, groups):
    return product[0].new_empty(2, sum(groups))


@fake("nonfinite")
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.bool)


@fake("factors_agree")
def _(grad, x, delta, grad_bias):
    return True


for _name in (
    "rls_flush_", "weight_step_", "adaptive_weight_step_", "foreach_weight_step_",
    "foreach_spectral_root_", "foreach_spectral_direction_",
):  # fmt: skip
    fake(_name)(lambda *arguments: None)
