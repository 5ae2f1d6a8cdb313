"""The specification of the updates of matrices and of the weight steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def rls_update(
    P: Tensor,
    S: Tensor,
    forgetting: float = 1.0,
    gain: float = 1.0,
    decay: float = 1.0,
    diffusion: float = 0.0,
    initial_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One update of one matrix, real or complex.

    .. math:: U = S P, \quad H = \lambda I + \tfrac{\kappa}{r} U S^H, \quad
              P \leftarrow \tfrac{decay}{\lambda} \left(P - \tfrac{\kappa}{r} U^H H^{-1} U\right)
              + diffusion \cdot I

    Rows that are not finite leave P as it is; where H is not positive definite, P is reset.

    Args:
        P: [n, n], Hermitian.
        S: Rows [r, n], of the dtype of P.
        forgetting: :math:`\lambda` in (0, 1].
        gain: :math:`\kappa` > 0.
        decay: Factor on the result.
        diffusion: Added to its diagonal.
        initial_scale: Diagonal after a reset.

    Returns:
        The new P [n, n], U [r, n], and h [], the mean of the diagonal of H, real; NaN where P was
        reset or left as it is.
    """
    r, n = S.shape
    identity = torch.eye(n, dtype=P.dtype)
    nan = torch.tensor(float("nan"), dtype=P.dtype.to_real())
    if not torch.isfinite(S).all():
        return P.clone(), torch.zeros_like(S), nan
    U = S @ P
    H = forgetting * torch.eye(r, dtype=P.dtype) + gain / r * S @ U.mH
    if not torch.isfinite(H).all() or torch.linalg.cholesky_ex(H).info != 0:
        return initial_scale * identity, U, nan
    updated = (P - gain / r * U.mH @ torch.linalg.solve(H, U)) / forgetting
    return decay * updated + diffusion * identity, U, H.diagonal().real.mean()


def block_rls_update(P: Tensor, S: Tensor, size: int, **constants: float) -> tuple[Tensor, Tensor]:
    """One update of a block-diagonal matrix, as that of a layer of a large fan-in.

    Each block sees its own columns of the rows alone.

    Args:
        P: [n, n], zero outside of the blocks of consecutive columns; the last may be smaller.
        S: [r, n].
        size: Columns of a block.
        **constants: See `rls_update`.

    Returns:
        The new P [n, n], and h [], the mean of the diagonal of λ I + (κ/r) S P Sᵀ.
    """
    parts = [
        rls_update(P[k : k + size, k : k + size], S[:, k : k + size], **constants)
        for k in range(0, len(P), size)
    ]
    forgetting = constants.get("forgetting", 1.0)
    h = forgetting + sum(part - forgetting for _, _, part in parts)
    return torch.block_diag(*(block for block, _, _ in parts)), torch.as_tensor(h)


def running_power(before: float, seen: float, gain: float) -> tuple[float, float]:
    """The running mean of the squared input at one update.

    Args:
        before: What was kept; 0 where there was no update yet.
        seen: Mean square of the summary.
        gain: κ.

    Returns:
        What normalises the summary, and what is kept, which takes no more than 100 times itself for
        seen: that bounds what one wild batch leaves behind.
    """
    if not 0 < before < math.inf:
        return seen, seen
    rest = (1 - gain) * before
    return rest + gain * seen, rest + gain * min(seen, 100 * before)


@dataclass
class HeldBack:
    """A matrix whose updates are held back, scale (P - Vᵀ V) + shift I.

    Args:
        P: [n, n], never changed.
        V: [held rows, n].
        scale: Factor on what is in the brackets.
        shift: Added to the diagonal.
    """

    P: Tensor
    V: Tensor
    scale: float = 1.0
    shift: float = 0.0

    def matrix(self) -> Tensor:
        """The matrix [n, n], with what is held applied."""
        identity = torch.eye(len(self.P), dtype=self.P.dtype)
        return self.scale * (self.P - self.V.T @ self.V) + self.shift * identity

    def update(
        self,
        S: Tensor,
        forgetting: float = 1.0,
        gain: float = 1.0,
        decay: float = 1.0,
        diffusion: float = 0.0,
    ) -> tuple[HeldBack, Tensor, Tensor]:
        """One update, with H positive definite.

        Args:
            S: Rows [r, n], finite.
            forgetting: See `rls_update`, as all that follows.
            gain: κ.
            decay: Factor on the result.
            diffusion: Added to its diagonal.

        Returns:
            The matrix with one update more held, U = S P [r, n], and h.
        """
        r = len(S)
        U = self.scale * (S @ self.P - S @ self.V.T @ self.V) + self.shift * S
        H = forgetting * torch.eye(r, dtype=S.dtype) + gain / r * S @ U.T
        rows = torch.linalg.solve_triangular(torch.linalg.cholesky(H), U, upper=False)
        V = torch.cat([self.V, (gain / r / self.scale) ** 0.5 * rows])
        a = decay / forgetting
        held = HeldBack(self.P, V, a * self.scale, a * self.shift + diffusion)
        return held, U, H.diagonal().mean()


def weight_step(
    W: Tensor,
    D: Tensor,
    lr: float,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The paper's and the natural weight step.

    .. math:: \Psi \leftarrow \alpha \Psi + D / h, \quad
              W \leftarrow (1 - \eta\, wd) W - \eta \Psi

    Args:
        W: [c, n], a bias as its last column.
        D: The product G P [c, n], with the P of before the update in the paper's form.
        lr: :math:`\eta`.
        momentum_buffer: :math:`\Psi` [c, n], zeros if None.
        momentum: :math:`\alpha`.
        weight_decay: wd.
        h: Of `rls_update`, in the paper's form, [c] or []; None for 1.

    Returns:
        The new W and :math:`\Psi`.

    Source: Zhang et al. 2021 (arXiv 2109.03220), for the paper's form.
    """
    before = torch.zeros_like(D) if momentum_buffer is None else momentum_buffer
    buffer = momentum * before + (D if h is None else D / h.reshape(-1, 1))
    return (1 - lr * weight_decay) * W - lr * buffer, buffer


def trusted(h: Tensor, D: Tensor, W: Tensor, lr: float, trust: float) -> Tensor:
    r"""What D is divided by so that no step :math:`\eta D / h` is longer than `trust` times W.

    Args:
        h: What it is divided by anyway [].
        D: The product of a matrix [c, n].
        W: Its weight [c, n], a bias as its last column.
        lr: :math:`\eta`.
        trust: The longest step, as a part of the norm of a weight that is not zero.

    Returns:
        [].
    """
    size = torch.linalg.vector_norm(W)
    return torch.maximum(h, lr / trust * torch.linalg.vector_norm(D) / size) if size > 0 else h


@dataclass
class AdaptiveStep:
    r"""The constants of the adaptive weight step.

    Args:
        lr: :math:`\eta`.
        beta1: Share of the first moment that a step keeps.
        beta2: Share of the second moment that a step keeps.
        weight_decay: wd.
        eps: Added to the root of the second moment.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0
    eps: float = 1e-8


def adaptive_weight_step(
    W: Tensor, D: Tensor, G: Tensor, M: Tensor, v: Tensor, step: int, constants: AdaptiveStep
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The adaptive weight step, Adam's along G P and with one second moment a row.

    .. math:: v_i \leftarrow \beta_2 v_i + (1 - \beta_2) \sum_j D_{ij} G_{ij}, \quad
              M \leftarrow \beta_1 M + (1 - \beta_1) D, \quad
              W_i \leftarrow (1 - \eta\, wd) W_i - \eta \frac{\hat M_i}{\sqrt{\hat v_i} + eps}

    with :math:`\hat M = M / (1 - \beta_1^t)` and :math:`\hat v = v / (1 - \beta_2^t)` at step t.

    Args:
        W: [c, n], a bias as its last column.
        D: The product G P [c, n].
        G: Gradient [c, n].
        M: First moment [c, n].
        v: Second moment of each row [c].
        step: Counted from 1.
        constants: See `AdaptiveStep`.

    Returns:
        The new W, M and v.
    """
    k = constants
    v = k.beta2 * v + (1 - k.beta2) * (D * G).sum(1)
    M = k.beta1 * M + (1 - k.beta1) * D
    root = (v.clamp(min=0) / (1 - k.beta2**step)).sqrt() + k.eps
    move = M / (1 - k.beta1**step) / root[:, None]
    return (1 - k.lr * k.weight_decay) * W - k.lr * move, M, v


def spectral_direction(
    N: Tensor, P: Tensor, coefficients: Iterable[tuple[float, float, float]] | None = None
) -> Tensor:
    r"""The polar factor of N in the metric of P, :math:`(N P N^T)^{-1/2} N P`.

    With :math:`P = R R^T` and the singular values :math:`N R = U S V^T` that is :math:`U V^T R^T`.

    Args:
        N: [c, n].
        P: [n, n], positive definite.
        coefficients: a, b, c of each odd polynomial a s + b s^3 + c s^5 that acts, one after
            another, on the singular values over the fourth root of the sum of their fourth powers;
            None for ones in place of them all.

    Returns:
        [c, n].
    """
    R = torch.linalg.cholesky(P)
    U, s, Vt = torch.linalg.svd(N @ R, full_matrices=False)
    if coefficients is None:
        s = torch.ones_like(s)
    else:
        s = s / s.pow(4).sum().pow(0.25)
        for a, b, c in coefficients:
            s = a * s + b * s**3 + c * s**5
    return (U * s) @ Vt @ R.T


def spectral_root(K: Tensor, coefficients: Iterable[tuple[float, float, float]]) -> Tensor:
    r"""The polynomials of `spectral_direction` as one matrix, about :math:`K^{-1/2}`.

    That of :math:`K = N P N^T` times N P is the direction, and so is N P times that of
    :math:`K = N^T N P`.

    .. math:: X = K / \sqrt{\mathrm{tr}\, K^2}, \quad p(X) = a I + b X + c X^2, \quad
              Y \leftarrow p(X) Y, \quad X \leftarrow p(X)^2 X

    from :math:`Y = I / \sqrt[4]{\mathrm{tr}\, K^2}` on.

    Args:
        K: [m, m], of eigenvalues that are not negative.
        coefficients: a, b, c of each polynomial.

    Returns:
        Y.
    """
    size = (K * K.mT).sum().sqrt()
    X, identity = K / size, torch.eye(len(K), dtype=K.dtype)
    Y = identity / size.sqrt()
    for a, b, c in coefficients:
        p = a * identity + b * X + c * X @ X
        X, Y = p @ p @ X, p @ Y
    return Y


def spectral_scale(size: Tensor, power: float, rows: int, columns: int, eps: float) -> Tensor:
    r"""The length of the direction of a block: small where the momentum is, else as if by rows.

    .. math:: \sqrt{\max(1, rows / n)}\; \frac{q}{q + eps \sqrt{power}}

    Args:
        size: Root mean square q of the momentum.
        power: Running mean of the squared input, in whose units eps is.
        rows: Of the block.
        columns: n.
        eps: Momentum of about that size, over the root of `power`, moves little.
    """
    return max(1, rows / columns) ** 0.5 * size / (size + eps * power**0.5)


@dataclass
class SpectralStep:
    r"""The constants of the spectral weight step.

    Args:
        lr: :math:`\eta`.
        momentum: :math:`\beta`.
        weight_decay: wd.
        eps: Gradients of about that size, over the root mean square of the input, move little.
        rows: Rows of a block, whose direction is its own.
        coefficients: See `spectral_direction`.
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    eps: float = 1e-8
    rows: int = 64
    coefficients: Iterable[tuple[float, float, float]] | None = None


def nesterov(M: Tensor, G: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    r"""The momentum of a gradient, and what it will be if the next gradient is the same.

    .. math:: M \leftarrow \beta M + (1 - \beta) G, \quad N = \beta M + (1 - \beta) G

    Args:
        M: Average of the gradients [c, n].
        G: Gradient [c, n].
        momentum: Share :math:`\beta` of the last average.

    Returns:
        The new M, and N.

    Source: Jordan et al. 2024, Muon, whose momentum it is.
    """
    M = momentum * M + (1 - momentum) * G
    return M, momentum * M + (1 - momentum) * G


def spectral_weight_step(
    W: Tensor, G: Tensor, P: Tensor, M: Tensor, power: float, constants: SpectralStep
) -> tuple[Tensor, Tensor]:
    r"""The spectral weight step, of the momentum N that `nesterov` gives.

    .. math:: W \leftarrow (1 - \eta\, wd) W - \eta\, s\, (N P N^T)^{-1/2} N P

    of some rows at a time, s the `spectral_scale` of the root mean square of N.

    Args:
        W: [c, n], a bias as its last column.
        G: Gradient [c, n].
        P: [n, n], of after the update.
        M: Average of the gradients [c, n].
        power: Running mean of the squared input, in whose units eps is.
        constants: See `SpectralStep`.

    Returns:
        The new W and M.
    """
    k = constants
    M, N = nesterov(M, G, k.momentum)
    size = N.square().mean().sqrt()
    scale = spectral_scale(size, power, k.rows, N.shape[1], k.eps)
    direction = torch.cat([spectral_direction(B, P, k.coefficients) for B in N.split(k.rows)])
    return (1 - k.lr * k.weight_decay) * W - k.lr * scale * direction, M
