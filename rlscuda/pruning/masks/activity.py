r"""The signal of each connection of a layer: how much it carries on a set of samples.

A connection is a weight of a linear layer, a kernel of a convolution (one input channel of one
filter), or a bias. Its signal is the mean over the samples of what passes through it at most,
:math:`\sum_k |w_k| |x_k|` over the taps k of the kernel. Positions are never looped over: with the
mean of :math:`|x|`

- over samples and positions, `u`, the mean signal is :math:`|w|^T u`;
- over samples alone, `m(p)`, the root mean square over positions is
  :math:`\sqrt{|w|^T M |w| / L}`, with :math:`M = \sum_p m(p) m(p)^T` of one input channel.

Both are given a position, that is L and sqrt(L) times less than sums over the positions, a factor
that all connections of a layer share, its biases included.

Source: Dekhovich et al. 2024 (arXiv 2109.10795).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlscuda.functional import patch_mean
from rlscuda.functional.patches import PADDING_MODES
from rlscuda.optim.layers import Layer
from rlscuda.reference import patch_rows

NORMS = ("sum", "position")


class Activity:
    """The mean absolute input of one layer, taken in batch by batch.

    Args:
        layer: The layer.
        norm: How the positions of a convolution are averaged: ``sum`` or ``position``.
    """

    def __init__(self, layer: Layer, norm: str):
        self.layer, self.seen = layer, 0
        self._positions = norm == "position" and layer.weight.dim() > 2
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Takes in one input of the layer.

        Raises:
            ValueError: Images of one size are needed, and these are of another.
        """
        if not x.numel():
            return
        x = x.detach().abs()
        if not x.is_floating_point() or x.dtype == torch.float16:  # whose sums would overflow
            x = x.float()
        batch = x.shape[0] if x.dim() == self.layer.weight.dim() else 1
        images = self.layer.images(x)
        if self._positions:
            count = batch
            total = images.unflatten(0, (batch, -1)).sum(0, dtype=torch.float64)
        else:
            kernel, stride, padding, dilation, groups, mode = self.layer.geometry
            count = len(images) * self.layer.positions(images)
            mean = patch_mean(
                images, kernel, stride, padding, dilation, groups, padding_mode=PADDING_MODES[mode]
            )
            total = mean.double() * count
        if self._sum is None:
            self._sum = torch.zeros_like(total)
        if total.shape != self._sum.shape:
            raise ValueError(f"norm 'position' needs inputs of one size, got those of "
                             f"{self.layer.name!r} of {list(self._sum.shape)} and "
                             f"{list(total.shape)}")  # fmt: skip
        self._sum += total
        self.seen += count

    def signals(self, rows: Tensor) -> Tensor:
        """The signal of every connection.

        Args:
            rows: Weights [c, n], with the bias as a last column where it is one [c, n + 1].

        Returns:
            float64 [c, C / groups], or with the bias [c, C / groups + 1].

        Raises:
            ValueError: The layer has seen input that was not finite.
        """
        assert self._sum is not None
        mean = self._sum / self.seen
        if not torch.isfinite(mean).all():
            raise ValueError(f"layer {self.layer.name!r} saw NaN or infinite input")
        n, groups, channels = self.layer.columns, self.layer.groups, self.layer.weight.shape[1]
        sizes = rows.double().abs()
        kernels = sizes[:, :n].view(groups, -1, channels, n // channels)
        if self._positions:
            patches = patch_rows(mean, *self.layer.geometry).unflatten(2, (channels, -1))
            M = torch.einsum("gpjk,gpjl->gjkl", patches, patches) / patches.shape[1]
            squares = torch.einsum("gijk,gjkl,gijl->gij", kernels, M, kernels)
            found = squares.clamp_min(0).sqrt()
        else:
            found = torch.einsum("gijk,gjk->gij", kernels, mean.view(groups, channels, -1))
        return torch.cat([found.flatten(0, 1), sizes[:, n:]], 1)


def strongest(signals: Tensor, alpha: float, as_published: bool = False) -> Tensor:
    """The connections by which each unit gets a share of its signal, the strongest first.

    Args:
        signals: [c, m].
        alpha: The share, in (0, 1).
        as_published: Whether the authors' two exceptions are made: at least one connection of a
            unit goes, even where all but it do not reach the share, and connections as strong as
            the strongest that goes go too. What remains may then be less than the share.

    Returns:
        bool [c, m]: of each row the shortest prefix of the sorted signals whose sum reaches the
        share, with all that are as strong as its last; never what has no signal.
    """
    ordered = signals.sort(1, descending=True).values
    sums = ordered.cumsum(1)
    last = (sums < alpha * sums[:, -1:]).sum(1, keepdim=True)
    if as_published and signals.shape[1] > 1:
        first_gone = (last + 1).clamp(max=signals.shape[1] - 1)
        return signals > ordered.gather(1, first_gone)
    return (signals >= ordered.gather(1, last)) & (signals > 0)
