r"""The closed forms of an inverse autocorrelation matrix made of fewer rows than it has columns.

A Linear after a flatten has one row an image: of N = 512 rows X, n = 25,088 columns. Its damped
inverse autocorrelation is known by its rows alone (Woodbury; X here is over :math:`\sqrt N`),

.. math:: P = (X^T X + \delta I)^{-1} = \tfrac{1}{\delta} (I - X^T K X), \qquad
          K = (X X^T + \delta I)^{-1}

so nothing larger than [N, n] is needed, and all is exact. Without the columns g it is the same with
:math:`X_k`, the rest, and :math:`K_k = (X_k X_k^T + \delta I)^{-1}`:

.. math:: P_{gg}^{-1} = \delta (I + X_g^T K_k X_g), \qquad
          W_k \leftarrow W_k + W_g X_g^T K_k X_k

Greedily, removing q with :math:`I - X_q^T K X_q = C C^T`, :math:`U = K X_q C^{-T}` and
:math:`V = C^{-1} W_q^T` is :math:`K \leftarrow K + U U^T`, :math:`W \leftarrow W + V^T U^T X`: the
weight is the first one and a product with X, and only its diagonal blocks are followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlscuda.closed_form import formulas
from rlscuda.closed_form.formulas import (
    block_costs,
    check_blocks,
    check_removed,
    check_weight,
    factor,
    solve_lower,
)

_SLACK = 0.75  # of the columns held, that are still there before the rest is dropped


class FewRows:
    """P, or [groups] of them, in place of a tensor [..., n, n].

    Args:
        rows: X over the root of the number of rows, float64 [..., N, n].
        damping: What is added to the autocorrelation's diagonal, float64 [...], > 0.
    """

    def __init__(self, rows: Tensor, damping: Tensor):
        self.rows, self.damping = rows, damping

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        return self.rows.shape[:-2] + self.rows.shape[-1:] * 2

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.rows.device

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[FewRows]:
        return map(FewRows, self.rows, self.damping)

    def inverse_gram(self) -> Tensor:
        """K [N, N]."""
        return torch.cholesky_inverse(self._factor(self.rows))

    def blocks(self, blocks: Tensor, K: Tensor) -> Tensor:
        """The diagonal blocks P_gg of columns [m, b]: [m, b, b]."""
        X = self.rows[:, blocks].movedim(1, 0)  # [m, N, b]
        eye = torch.eye(blocks.shape[1], dtype=torch.float64, device=self.device)
        return (eye - X.mT @ (K @ X)) / self.damping

    def _factor(self, rows: Tensor) -> Tensor:
        gram = rows @ rows.mT
        gram.diagonal().add_(self.damping)
        return torch.linalg.cholesky(gram)

    def without(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The rows with zeros in some columns, and the Cholesky factor of their damped Gram."""
        rows = self.rows.clone()
        rows[:, columns] = 0
        return rows, self._factor(rows)


@formulas.block_saliency.register
def _(P: FewRows, W: Tensor, blocks: Tensor) -> Tensor:
    n = len(P)
    W, blocks = check_weight(W, n), check_blocks(blocks, n)
    factors = factor(P.blocks(blocks, P.inverse_gram()))
    return solve_lower(factors, W.mT[blocks]).square().sum((1, 2))


@formulas.compensate.register
def _(P: FewRows, W: Tensor, removed: Tensor) -> Tensor:
    n = len(P)
    W, removed = check_weight(W, n), check_removed(removed, n)
    rows, root = P.without(removed)
    share = torch.cholesky_solve(P.rows[:, removed] @ W[:, removed].mT, root)  # [N, c]
    result = torch.addmm(W, share.mT, rows)
    result[:, removed] = 0
    return result


@formulas.output_energy.register
def _(P: FewRows, W: Tensor, columns: Tensor) -> float:
    n = len(P)
    W, columns = check_weight(W, n), check_removed(columns, n)
    own = W[:, columns]
    outputs = P.rows[:, columns] @ own.mT
    half = solve_lower(P.without(columns)[1], outputs)
    return float(P.damping * (own.square().sum() + half.square().sum()))


class RowsState:
    """One consumer on its way through `greedy_path`, see there; columns reordered unit by unit.

    Attributes:
        X: [N, u, b] of the units held; W: [c, u, b] likewise, before any removal.
        K: [N, N] and A: [c, N], so that the weight of now is W + A X.
        D: [m, b, b] the current diagonal blocks of P; G: [m, b, b] those of W^T W.
        scale: [m, b] the diagonal of P before any removal.
        places: [m] where among the units held those are that the steps know of.
    """

    def __init__(self, consumer: Any):
        P, blocks = consumer.P, consumer.blocks
        self.weight, self.damping = consumer.weight, P.damping
        self.X, self.K = P.rows[:, blocks], P.inverse_gram()
        self.W = consumer.W.detach().double()[:, blocks]
        self.A = self.W.new_zeros(len(self.W), len(self.X))
        self.D = P.blocks(blocks, self.K)
        parts = self.W.permute(1, 2, 0)
        self.G = parts @ parts.mT
        self.scale = self.D.diagonal(dim1=1, dim2=2).clone()
        self.places = torch.arange(len(blocks), device=blocks.device)

    def scores(self) -> Tensor:
        """The weighted saliency of each unit [m]; of removed ones meaningless but finite."""
        return self.weight * block_costs(self.D, self.G, self.scale)

    def remove(self, unit: int) -> None:
        """Takes the columns of a unit out of everything."""
        place = self.places[unit]
        X_q = self.X[:, place]
        root = factor(self.D[unit], self.scale[unit]) * self.damping.sqrt()  # C
        U = solve_lower(root, (self.K @ X_q).mT)  # transposed, [b, N]
        V = solve_lower(root, self.W[:, place].mT + X_q.mT @ self.A.mT)
        L = self._units(U @ self.X.flatten(1))  # [m, b', b]
        T = self._units(V @ self.W.flatten(1) + (V @ self.A) @ self.X.flatten(1))
        # G' = G + T^T L + L^T T + L^T (V V^T) L, here with half of the last in each
        cross = L.mT @ (T + 0.5 * (V @ V.mT) @ L)
        self.G += cross + cross.mT
        self.D -= L.mT @ L / self.damping
        self.D[unit] = torch.diag(self.scale[unit])
        self.K.addmm_(U.mT, U)
        self.A.addmm_(V.mT, U)
        self.X[:, place], self.W[:, place] = 0, 0  # later steps leave what is gone as it is

    def _units(self, rows: Tensor) -> Tensor:
        """Rows [b', u b] by unit: [m, b', b]."""
        return rows.unflatten(1, self.X.shape[1:]).movedim(1, 0)[self.places]

    def flush(self, kept: Tensor) -> None:
        """Forgets removed units, and drops their columns once there are many."""
        self.D, self.G = self.D[kept], self.G[kept]
        self.scale, self.places = self.scale[kept], self.places[kept]
        if len(self.places) < _SLACK * self.X.shape[1]:
            self.X, self.W = self.X[:, self.places], self.W[:, self.places]
            self.places = torch.arange(len(self.places), device=kept.device)
