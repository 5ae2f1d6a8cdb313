r"""Greedy removal of units, one at a time and exactly downdated, as a blocked pivoted Cholesky.

Removing the columns q of a layer with inverse autocorrelation P and weight W, with
:math:`P_{qq} = C C^T`, :math:`L = C^{-1} P_{q,:}` and :math:`V = C^{-1} W_q^T`, is

.. math:: P \leftarrow P - L^T L, \qquad W \leftarrow W - V^T L

So the steps of a window keep only their rows L and V; a panel of the current P or W is the stored
one less a thin product. At the end of a window all of it goes into P and W as one matrix product,
and the removed columns are dropped. What every step does to every unit is the downdate of the
diagonal blocks :math:`P_{gg}` and :math:`W_g^T W_g`, from which the saliencies follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlscuda.closed_form.few_rows import FewRows, RowsState
from rlscuda.closed_form.formulas import (
    block_costs,
    check_blocks,
    check_matrix,
    check_weight,
    factor,
)

_WINDOW = 192  # columns held back: enough for the products to run at full rate


@dataclass
class Consumer:
    """One layer, or one group of a grouped convolution, that reads the units.

    Attributes:
        P: Its inverse autocorrelation matrix [n, n], or the few rows of it.
        W: Its weight [c, n], with a bias as the last column where P has one.
        blocks: Its columns of each unit, int64 [m, b]; b may differ between consumers.
        weight: What its saliencies count in the sum over consumers, >= 0.
    """

    P: Tensor | FewRows
    W: Tensor
    blocks: Tensor
    weight: float = 1.0


@dataclass
class Path:
    """The order in which units were removed.

    Attributes:
        order: Units, first removed first: int64 [count].
        cost: The weighted sum of saliencies of each at its removal: float64 [count]. Sums of it
            are the cost of the removals up to there, remaining weights compensated.
    """

    order: Tensor
    cost: Tensor


def greedy_path(consumers: Sequence[Consumer], count: int) -> Path:
    r"""Removes the unit of least saliency, downdates everything exactly, and so on.

    The saliency of a unit is :math:`\sum weight \cdot tr(W_g P_{gg}^{-1} W_g^T)` over consumers, of
    the current P and W. Of equal ones the lowest index goes first. Beside its input it needs one
    float64 copy of each P and W, and 2 / :math:`n` of one for each column of a window.

    Args:
        consumers: The layers that read the units; all on one device.
        count: How many units to remove, from 0 to m.

    Returns:
        The order and the cost of each step.

    Raises:
        TypeError: A matrix is no floating-point tensor, or blocks are not int64.
        ValueError: There is no consumer, shapes do not fit, columns are out of range or in two
            places, values are not finite, a P is indefinite, or `count` is out of range.
    """
    if not consumers:
        raise ValueError("greedy_path expects at least one consumer, got none")
    units = consumers[0].blocks.shape[0]
    if not isinstance(count, int) or not 0 <= count <= units:
        raise ValueError(f"count must be an integer from 0 to {units}, the units, got {count!r}")
    for consumer in consumers:
        _check(consumer, units)
    device = consumers[0].P.device
    order, cost = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
    window = max(1, _WINDOW // max(consumer.blocks.shape[1] for consumer in consumers))
    states = [
        RowsState(consumer) if isinstance(consumer.P, FewRows) else _State(consumer, window)
        for consumer in consumers
    ]
    alive = torch.arange(units, device=device)
    gone = torch.zeros(units, dtype=torch.bool, device=device)
    for step in range(count):
        if gone.sum() == window:
            for state in states:
                state.flush(~gone)
            alive, gone = alive[~gone], gone[~gone]
        scores = sum((state.scores() for state in states), torch.zeros_like(alive).double())
        scores[gone] = torch.inf
        least = scores.min()
        unit = int((scores == least).nonzero()[0])
        order[step], cost[step] = alive[unit], least
        gone[unit] = True
        for state in states:
            state.remove(unit)
    return Path(order, cost)


def _check(consumer: Consumer, units: int) -> None:
    if not isinstance(consumer.P, FewRows):
        check_matrix("P", consumer.P)
    n = consumer.P.shape[0]
    check_weight(consumer.W, n)
    if check_blocks(consumer.blocks, n).shape[0] != units:
        raise ValueError(
            f"blocks of all consumers must have the {units} units of the first, got "
            f"{consumer.blocks.shape[0]}"
        )
    if not 0 <= consumer.weight < torch.inf:
        raise ValueError(f"weight must be >= 0 and finite, got {consumer.weight}")


class _State:
    """One consumer on its way: columns reordered unit by unit, the others last.

    Attributes:
        P: [n, n] as of the last flush; W: [c, n] likewise.
        L: [held, n] and V: [held, c], rows of the removals since.
        D: [m, b, b] the current diagonal blocks of P; G: [m, b, b] those of W^T W.
        scale: [m, b] the diagonal of P before any removal.
    """

    def __init__(self, consumer: Consumer, window: int):
        assert isinstance(consumer.P, Tensor)
        n, (self.m, self.b) = consumer.P.shape[0], consumer.blocks.shape
        others = torch.ones(n, dtype=torch.bool, device=consumer.P.device)
        own = consumer.blocks.flatten()
        others[own] = False
        columns = torch.cat([own, others.nonzero().squeeze(1)])
        self.weight = consumer.weight
        self._memory = torch.empty(n * n, dtype=torch.float64, device=own.device)
        self.P = _gather(consumer.P.detach(), columns, self._memory)
        self.W = consumer.W.detach()[:, columns].double()
        self._rows = torch.empty(window * self.b, n, dtype=torch.float64, device=own.device)
        self._sides = self._rows.new_empty(window * self.b, self.W.shape[0])
        self._start_window()
        self.scale = self.D.diagonal(dim1=1, dim2=2).clone()

    def _start_window(self) -> None:
        m, b = self.m, self.b
        self.held = 0
        self.rows = self._rows.flatten()[: len(self._rows) * len(self.P)].view(-1, len(self.P))
        square = self.P[: m * b, : m * b].view(m, b, m, b) if m else self.P.new_empty(0, b, 0, b)
        self.D = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        parts = self.W[:, : m * b].unflatten(1, (m, b)).permute(1, 2, 0)
        self.G = parts @ parts.mT

    def scores(self) -> Tensor:
        """The weighted saliency of each unit [m]; of removed ones meaningless but finite."""
        return self.weight * block_costs(self.D, self.G, self.scale)

    def remove(self, unit: int) -> None:
        """Takes the columns of a unit out of everything, the factor rows kept for `flush`."""
        m, b, held = self.m, self.b, self.held
        q = slice(unit * b, unit * b + b)
        L, V = self.rows[: held + b], self._sides[: held + b]
        old_L, old_V = L[:held], V[:held]
        panel = torch.addmm(self.P[q], old_L[:, q].mT, old_L, alpha=-1)
        weights = torch.addmm(self.W[:, q].mT, old_L[:, q].mT, old_V, alpha=-1)
        C = factor(panel[:, q], self.scale[unit])
        torch.linalg.solve_triangular(C, panel, upper=False, out=L[held:])
        torch.linalg.solve_triangular(C, weights, upper=False, out=V[held:])
        new_L, new_V = L[held:], V[held:]
        # G' = G - T^T L - L^T T + L^T (V V^T) L with T = V W, here with half of the last in each
        T = torch.addmm(new_V @ self.W, new_V @ old_V.mT, old_L, alpha=-1)
        T.addmm_(new_V @ new_V.mT, new_L, alpha=-0.5)
        by_unit = new_L[:, : m * b].unflatten(1, (m, b)).permute(1, 2, 0)
        cross = by_unit @ T[:, : m * b].unflatten(1, (m, b)).permute(1, 0, 2)
        self.G -= cross + cross.mT
        self.D -= by_unit @ by_unit.mT
        self.D[unit] = torch.diag(self.scale[unit])
        self.held += b

    def flush(self, kept: Tensor) -> None:
        """Applies the rows held back to P and W, and drops the columns of removed units."""
        n, b = len(self.P), self.b
        others = torch.arange(self.m * b, n, device=kept.device)
        columns = torch.cat([kept.repeat_interleave(b).nonzero().squeeze(1), others])
        L, V = self.rows[: self.held].index_select(1, columns), self._sides[: self.held]
        self.P = _gather(self.P, columns, self._memory).addmm_(L.mT, L, alpha=-1)
        self.W = self.W.index_select(1, columns).addmm_(V.mT, L, alpha=-1)
        self.m, self.scale = int(kept.sum()), self.scale[kept]
        self._start_window()


def _gather(A: Tensor, columns: Tensor, memory: Tensor) -> Tensor:
    """A[columns][:, columns] at the start of `memory`, in which A may lie if columns ascend.

    A row is written no later than where it was read, so only a few rows are copied at a time.
    """
    k, chunk = len(columns), 256
    result = memory[: k * k].view(k, k)
    for i in range(0, k, chunk):
        rows = columns[i : i + chunk]
        result[i : i + chunk] = A.index_select(0, rows).index_select(1, columns)
    return result
