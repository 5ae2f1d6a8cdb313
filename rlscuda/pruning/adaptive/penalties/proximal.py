r"""Proximal steps: of scales one by one, and of the columns of units in the metric of P.

A step of size :math:`\eta` on the loss is followed by the proximal map of the penalty, so that a
zero is one to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rlscuda.closed_form.formulas import factor, solve_lower


def soft_threshold(u: Tensor, t: Tensor | float) -> Tensor:
    r"""The minimiser of :math:`\tfrac12 (s - u)^2 + t |s|` over s: sign(u) max(|u| - t, 0).

    Args:
        u: Values of any shape.
        t: Thresholds >= 0, of a shape that broadcasts.

    Example:
        >>> soft_threshold(torch.tensor([3.0, -1.0, 0.2]), 0.5)
        tensor([ 2.5000, -0.5000,  0.0000])
    """
    return u.sign() * (u.abs() - t).clamp_(min=0)


@torch.no_grad()
def proximal_step_(
    s: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    lr: float,
    momentum: float,
    threshold: Tensor,
    least: float = -math.inf,
) -> None:
    r"""One accelerated proximal step, in place.

    .. math::
        z = S(s - \eta g, t), \quad v \leftarrow z - s + \mu v, \quad s \leftarrow z + \mu v

    Without a threshold it is SGD with Nesterov momentum. Where a threshold makes z zero, s is zero
    and at rest, for what its momentum would carry on has no sign of its own.

    Args:
        s: The scales.
        velocity: Of the same shape.
        gradient: Of the loss alone, of the same shape.
        lr: The step size.
        momentum: In [0, 1).
        threshold: Step size times price, >= 0, of the same shape.
        least: The least that a scale may become.

    Source: Huang and Wang 2018 (sparse structure selection, arXiv 1707.01213).
    """
    z = soft_threshold(s - lr * gradient, threshold)
    velocity.mul_(momentum).add_(z).sub_(s)
    stopped = (z == 0) & (threshold > 0)
    velocity.masked_fill_(stopped, 0)
    s.copy_(torch.add(z, velocity, alpha=momentum).clamp_(min=least).masked_fill_(stopped, 0))


class Metric:
    r"""One layer, or one group of a grouped one, and the metric in which its error is measured.

    A change D of the weight changes the mean squared output by :math:`tr(D P^{-1} D^T)`.

    Args:
        P: Inverse autocorrelation matrix [n, n]; it is copied.
        W: Weight [c, n], with a bias as the last column where P has one; it is copied.
        weight: What squared errors of its output count, >= 0.

    Attributes:
        W: The weight now, float64 [c, n].
    """

    def __init__(self, P: Tensor, W: Tensor, weight: float = 1.0):
        self.P, self.W, self.weight = P.double().clone(), W.double().clone(), weight

    def roots(self, blocks: Tensor) -> Tensor:
        """Cholesky factors [m, b, b] of the diagonal blocks of P, of columns [m, b]."""
        return factor(self.P[blocks[:, :, None], blocks[:, None, :]])

    def squares(self, blocks: Tensor) -> Tensor:
        """The squared penalty [m] of each unit's columns [m, b]."""
        halves = solve_lower(self.roots(blocks), self.W.mT[blocks])
        return self.weight * halves.square().sum((1, 2))

    def scale(self, columns: Tensor, share: float) -> None:
        """Leaves a share of some columns; the others make up for the rest as well as they can."""
        if share == 1:
            return
        lost = torch.cholesky_solve(self.W[:, columns].mT, self.roots(columns[None])[0])
        kept = share * self.W[:, columns]
        self.W.addmm_(lost.mT, self.P[columns], alpha=share - 1)
        self.W[:, columns] = kept

    def leave_out(self, columns: Tensor) -> None:
        """Takes columns whose weights are zero out of the metric: no other is to rely on them."""
        if not len(columns):
            return
        half = solve_lower(self.roots(columns[None])[0], self.P[columns])
        self.P.addmm_(half.mT, half, alpha=-1)
        self.P[columns], self.P[:, columns] = 0, 0


@torch.no_grad()
def output_penalty(parts: Iterable[tuple[Metric, Tensor]]) -> Tensor:
    r"""The penalty :math:`\Omega_g = \sqrt{\sum tr(W_g P_{gg}^{-1} W_g^T)}` of each unit.

    It is the root mean square change of the layers' outputs when the unit goes and the others are
    fitted anew, so it does not change when a unit's producer is scaled by c and its columns by 1/c.

    Args:
        parts: Each layer that takes the units, and its columns of each [m, b].

    Returns:
        float64 [m].
    """
    return torch.stack([metric.squares(blocks) for metric, blocks in parts]).sum(0).sqrt()


@torch.no_grad()
def shrink_(parts: Iterable[tuple[Metric, Tensor]], threshold: float) -> float:
    r"""The proximal map of :math:`t \Omega_g` in the metric of the layers' outputs, in place.

    With :math:`s = \max(0, 1 - t / \Omega_g)` it is

    .. math:: W \leftarrow W - (1 - s) W_g P_{gg}^{-1} P_{g,:}

    the minimiser of :math:`\tfrac12 tr((W' - W) P^{-1} (W' - W)^T) + t \Omega_g(W')` over all
    weights: the unit's own columns are scaled by s and the others make up for what is gone. At
    s = 0 that is its removal, compensated (Hassibi and Stork 1993).

    Args:
        parts: Each layer that takes the unit, and its columns of it [b].
        threshold: t >= 0.

    Returns:
        The penalty that is left, 0.0 where the unit is gone.
    """
    parts = list(parts)
    omega = float(output_penalty((metric, columns[None]) for metric, columns in parts))
    share = max(0.0, 1 - threshold / omega) if omega > 0 else 0.0
    for metric, columns in parts:
        metric.scale(columns, share)
    return share * omega
