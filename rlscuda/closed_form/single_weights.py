r"""Removing single weights of a layer, row by row, with compensation (Optimal Brain Compression).

Every output row :math:`w` [n] of a layer has the same inverse autocorrelation :math:`P` [n, n] of
its inputs, but loses other weights, so its :math:`P` parts from that of the others:

- the least increase of the row's squared output error for removing input :math:`j` is
  :math:`w_j^2 / P_{jj}`, reached by :math:`w \leftarrow w - (w_j / P_{jj}) P_{j,:}`;
- afterwards :math:`P \leftarrow P - P_{:,j} P_{j,:} / P_{jj}`.

One row costs :math:`O(n^3)` for its whole path. The downdates are held back and applied a block at
a time, as one matrix product: within a block the current row of :math:`P` is the stored one less a
thin correction (a pivoted Cholesky factorisation, blocked). Float64 throughout.

Source: Frantar & Alistarh 2022 (arXiv 2208.11580), algorithms 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlscuda.closed_form.formulas import factor

_CHUNK_BYTES = 256 << 20  # of the matrices P of the rows that are worked on together
_BLOCK = 32  # removals whose downdates are applied together
_COMPACT = 0.7  # share of the columns left below which the removed ones are taken out of P
_FLOOR = 1e-14  # of a diagonal element of P: what is left below that is rounding


def _rows_at_once(n: int) -> int:
    return max(1, _CHUNK_BYTES // (8 * n * n))


def removal_paths(
    P: Tensor, W: Tensor, groups: Tensor, quota: int | None = None
) -> tuple[Tensor, Tensor]:
    """In which order each row loses its weights, the cheapest next one first.

    Args:
        P: [n, n], the inverse autocorrelation; columns beyond the prunable ones (the bias) take
            part in the compensation.
        W: [c, n].
        groups: Columns [m, b]; all the prunable ones, each once.
        quota: How many columns of each group a row loses in the end; all of them by default.

    Returns:
        The columns [c, k] in the order of their removal, and the cost of each [c, k]: the increase
        of the row's squared error at that point. k is m * quota.
    """
    quota = groups.shape[1] if quota is None else quota
    group_of = torch.full((P.shape[0],), groups.shape[0], device=P.device)
    group_of[groups] = torch.arange(groups.shape[0], device=P.device)[:, None]
    parts = [
        _Paths(P, rows, group_of, len(groups)).run(len(groups) * quota, quota)
        for rows in W.split(_rows_at_once(len(P)))
    ]
    orders, costs = zip(*parts)
    return torch.cat(orders), torch.cat(costs)


class _Paths:
    """The rows of one chunk on their way, with the columns that each of them still has.

    Args:
        P: [n, n].
        W: [a, n].
        group_of: Group of each column [n]; `groups` for one that is never removed.
        groups: Number of groups.
    """

    def __init__(self, P: Tensor, W: Tensor, group_of: Tensor, groups: int):
        a, n = W.shape
        self.P, self.w = P.expand(a, n, n), W.clone()
        self.shared = True  # P is still the same for all rows, and the caller's
        self.diagonal = P.diagonal().repeat(a, 1)
        self.floor = _FLOOR * self.diagonal
        self.columns = torch.arange(n, device=W.device).repeat(a, 1)
        self.group = group_of.repeat(a, 1)
        self.gone = torch.zeros_like(W, dtype=torch.bool)
        self.full = torch.zeros(a, groups + 1, dtype=torch.bool, device=W.device)
        self.full[:, groups] = True
        self.left = torch.zeros(a, groups + 1, dtype=torch.int64, device=W.device)
        self.rows = torch.arange(a, device=W.device)

    def run(self, count: int, quota: int) -> tuple[Tensor, Tensor]:
        """Removes `count` weights of every row, `quota` of each group."""
        self.left.fill_(quota)
        order = self.columns.new_empty(len(self.w), count)
        costs = self.w.new_empty(len(self.w), count)
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            L = self.w.new_zeros(len(self.w), stop - start, self.w.shape[1])
            for t in range(stop - start):
                order[:, start + t], costs[:, start + t] = self._remove_cheapest(L, t)
            if stop < count:
                self._downdate(L, self.w.shape[1] - int(self.gone[0].sum()))
        return order, costs

    def _remove_cheapest(self, L: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Takes one weight from every row; the t-th row of its factor goes into L [a, b, m]."""
        barred = self.gone | self.full.gather(1, self.group)
        prices = (self.w.square() / self.diagonal).masked_fill_(barred, torch.inf)
        cost, j = prices.min(1)
        at = j[:, None]
        row = self.P[self.rows, j]
        if t:
            row = torch.baddbmm(row[:, None], L[self.rows, :t, j][:, None], L[:, :t], alpha=-1)[
                :, 0
            ]
        pivot = row.gather(1, at).maximum(self.floor.gather(1, at))
        self.w.addcmul_(self.w.gather(1, at) / pivot, row, value=-1)
        torch.div(row, pivot.sqrt(), out=L[:, t])
        self.diagonal = self.diagonal.addcmul(L[:, t], L[:, t], value=-1).maximum(self.floor)
        self.gone.scatter_(1, at, True)
        group = self.group.gather(1, at)
        self.left.scatter_add_(1, group, torch.full_like(group, -1))
        self.full.scatter_(1, group, self.left.gather(1, group) == 0)
        return self.columns.gather(1, at)[:, 0], cost

    def _downdate(self, L: Tensor, remaining: int) -> None:
        """P <- P - L^T L, without the columns gone where that makes it much smaller."""
        if self.shared:
            self.P, self.shared = torch.baddbmm(self.P, L.mT, L, alpha=-1), False
        else:
            self.P.baddbmm_(L.mT, L, alpha=-1)
        if remaining > _COMPACT * self.w.shape[1]:
            return
        kept = self.gone.byte().argsort(dim=1, stable=True)[:, :remaining]
        self.P = self.P[self.rows[:, None, None], kept[:, :, None], kept[:, None]]
        self.w, self.diagonal, self.floor, self.columns, self.group, self.gone = (
            value.gather(1, kept)
            for value in (
                self.w, self.diagonal, self.floor, self.columns, self.group, self.gone
            )
        )  # fmt: skip


def cheapest_prefixes(costs: Tensor, count: int) -> Tensor:
    """How far each row goes on its path, when always the row with the cheapest next weight goes on.

    Args:
        costs: [c, k], of the removals along each path.
        count: Weights to remove in all.

    Returns:
        Their number for each row [c].
    """
    reached = costs.cummax(1).values.flatten()  # what a row must pay at most to get this far
    chosen = reached.argsort(stable=True)[:count]
    return torch.bincount(chosen // costs.shape[1], minlength=len(costs))


def refit(P: Tensor, W: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    r"""The best weights on the columns that each row keeps, in closed form.

    :math:`w \leftarrow w - w_g (P_{gg})^{-1} P_{g,:}` with g the columns that the row loses: the
    least-squares fit of the whole row's output by the kept inputs.

    Args:
        P: [n, n], positive definite.
        W: [c, n].
        keep: [c, n], bool.

    Returns:
        The weights [c, n], exactly 0 where not kept, and the increase of each row's squared error
        [c], :math:`w_g (P_{gg})^{-1} w_g^T`.

    Raises:
        ValueError: `P` is not positive definite; a nearly singular block is jittered instead.
    """
    weights, costs = torch.empty_like(W), W.new_empty(len(W))
    few = 2 * keep.sum(1) <= len(P)  # what is kept is then the smaller system
    for rows, solve in ((few, _from_kept), (~few, _from_gone)):
        if rows.any():
            weights[rows], costs[rows] = solve(P, W[rows], keep[rows])
    return weights, costs


def _from_gone(P: Tensor, W: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """`refit` as its equation has it, of which the size is that of P."""
    weights, costs = torch.empty_like(W), W.new_empty(len(W))
    identity = torch.eye(len(P), dtype=P.dtype, device=P.device)
    step = _rows_at_once(len(P))
    for start in range(0, len(W), step):
        part = slice(start, start + step)
        gone = ~keep[part]
        lost = W[part] * gone
        both = gone[:, :, None] & gone[:, None]
        y = torch.cholesky_solve(lost[..., None], factor(torch.where(both, P, identity)))[..., 0]
        weights[part] = (W[part] - y @ P).masked_fill_(gone, 0)
        costs[part] = (lost * y).sum(1)
    return weights, costs


def _from_kept(P: Tensor, W: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    r"""`refit` by the normal equations of what is kept, :math:`R_{kk} d = R_{kg} w_g`.

    R is the inverse of P, and d what the kept weights gain.
    """
    weights, costs = W * keep, W.new_empty(len(W))
    R, lost = torch.cholesky_inverse(factor(P)), W * ~keep
    power = lost @ R
    m = max(1, int(keep.sum(1).max()))
    columns = keep.byte().argsort(dim=1, descending=True, stable=True)[:, :m]
    valid = keep.gather(1, columns)
    identity = torch.eye(m, dtype=P.dtype, device=P.device)
    for part in torch.arange(len(W), device=W.device).split(_rows_at_once(m)):
        at, real = columns[part], valid[part]
        both = real[:, :, None] & real[:, None]
        blocks = torch.where(both, R[at[:, :, None], at[:, None]], identity)
        wanted = power[part].gather(1, at) * real
        d = torch.cholesky_solve(wanted[..., None], factor(blocks))[..., 0]
        weights[part] = weights[part].scatter_add(1, at, d * real)
        costs[part] = (lost[part] * power[part]).sum(1) - (wanted * d).sum(1)
    return weights, costs.clamp_min_(0)
