"""Unstructured and n:m pruning of layers from their inverse autocorrelation matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.closed_form.formulas import output_energy
from rlscuda.closed_form.single_weights import cheapest_prefixes, refit, removal_paths
from rlscuda.pruning.masks.layers import MaskLayer, mask_layer, undo_of, write_mask
from rlscuda.pruning.options import check_number


@dataclass(frozen=True)
class LayerMask:
    """What one layer lost.

    Attributes:
        name: Qualified name.
        mask: True where a weight was kept; the shape of the weight.
        cost: Increase of the squared output error, summed over the outputs, in the units of the
            matrix: a mean over input rows where that is an inverse mean autocorrelation.
        loss: The cost as a share of what removing every weight would cost, 0 to 1.
    """

    name: str
    mask: Tensor
    cost: float
    loss: float

    @property
    def zeros(self) -> int:
        """Weights removed."""
        return int((~self.mask).sum())

    @property
    def sparsity(self) -> float:
        """Share of the weights removed."""
        return self.zeros / self.mask.numel()


_Row = TypeVar("_Row", bound=LayerMask)


class MaskReport(list[_Row]):
    """The masks of every layer; prints as a table."""

    @property
    def sparsity(self) -> float:
        """Share of all their weights removed."""
        return sum(row.zeros for row in self) / sum(row.mask.numel() for row in self)

    def __str__(self):
        width = max(len("layer"), *(len(row.name) for row in self))
        lines = [f"{'layer':<{width}}{'weights':>10}{'zeros':>10}{'sparsity':>10}{'loss':>9}"]
        lines += [
            f"{row.name:<{width}}{row.mask.numel():>10}{row.zeros:>10}{row.sparsity:>10.1%}"
            f"{row.loss:>9.2%}"
            for row in self
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Result:
    """What is to become of a layer: what stays and the weights [c, k], and their cost."""

    layer: MaskLayer
    keep: Tensor
    rows: Tensor
    cost: float
    energy: float

    def report(self) -> LayerMask:
        mask = self.keep[:, : self.layer.columns].view(self.layer.weight.shape)
        share = self.cost / self.energy if self.energy else 0.0
        return LayerMask(self.layer.name, mask, self.cost, share)


def _choose(layer: MaskLayer, sparsity: float | None, pattern: tuple[int, int] | None) -> Tensor:
    """The columns that every row keeps [c, k]: the bias, and those that the paths leave."""
    assert layer.P is not None
    W, n = layer.rows(), layer.columns
    target = None if sparsity is None else round(sparsity * layer.weight.numel())
    removed = 0 if layer.old_mask is None else int((layer.old_mask == 0).sum())
    if target is not None and removed > target:
        raise ValueError(f"sparsity {sparsity} of {layer.weight.numel()} weights is below that of "
                         f"its mask, which removes {removed}")  # fmt: skip
    if pattern is None:
        groups, quota = torch.arange(n, device=W.device)[None], n
    else:
        groups, quota = layer.pattern_groups(pattern[1]), pattern[1] - pattern[0]
    paths = [removal_paths(P, w, groups, quota) for P, w in zip(layer.P, W.chunk(len(layer.P)))]
    order, costs = (torch.cat(part) for part in zip(*paths))
    gone = torch.ones_like(order, dtype=torch.bool)
    if target is not None:
        lengths = cheapest_prefixes(costs, target)
        gone = torch.arange(order.shape[1], device=W.device) < lengths[:, None]
    return torch.ones_like(W, dtype=torch.bool).scatter_(1, order, ~gone) & layer.kept()


def _solve(layer: MaskLayer, sparsity: float | None, pattern: tuple[int, int] | None) -> _Result:
    """The mask and the weights of one layer, of which nothing is changed yet."""
    assert layer.P is not None
    W, G, n = layer.rows(), len(layer.P), layer.columns
    try:
        keep = _choose(layer, sparsity, pattern)
        parts = [refit(*part) for part in zip(layer.P, W.chunk(G), keep.chunk(G))]
        inputs = torch.arange(n, device=W.device)
        energy = sum(output_energy(P, w, inputs) for P, w in zip(layer.P, W.chunk(G)))
    except ValueError as error:
        raise ValueError(f"{layer.name!r}: {error}") from None
    rows, costs = (torch.cat(part) for part in zip(*parts))
    return _Result(layer, keep, rows, float(costs.sum()), energy)


def _is_pattern(pattern: object) -> bool:
    if not isinstance(pattern, (tuple, list)) or [type(n) for n in pattern] != [int, int]:
        return False
    return 0 < pattern[0] < pattern[1]


@torch.no_grad()
def prune_weights(
    model: nn.Module,
    matrices: Mapping[str, Tensor],
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    layers: Iterable[str] | None = None,
    optimizer: Optimizer | None = None,
    permanent: bool = False,
) -> MaskReport[LayerMask]:
    r"""Removes single weights where that costs least, and refits those that remain.

    Each row of a layer loses one weight after the other, always that with the least
    :math:`w_j^2 / P_{jj}`, and is compensated in between; rows compete for the next removal by its
    cost. What remains, the bias inside P included, is then the exact least-squares fit of the
    layer's output. Time grows as c n^3: one core takes 1 s for n = 432, c = 64, and 6 s for
    n = 800, c = 100.

    All layers are solved before the first is changed; an error leaves everything as it was.

    Args:
        model: The model.
        matrices: Qualified names of Linear and convolution layers to their inverse autocorrelation
            matrices [groups, k, k] (or [k, k] for one group); k is the fan-in n in `F.unfold`
            order, or n + 1 with the bias as the last column. A bias that a mask has removed
            stays removed.
        sparsity: Share of the weights of each layer that is to be zero, above 0 and below 1,
            zeros that it has already included.
        pattern: (n, m) in place of it: of every m consecutive inputs each output keeps n; for a
            convolution, of m consecutive input channels at one kernel position.
        layers: Names to prune; all of `matrices` by default.
        optimizer: Whose moments of the removed weights are set to zero.
        permanent: Writes zeros, and leaves no mask to hold them. Otherwise the masks are those of
            `torch.nn.utils.prune` (`weight_orig`, `weight_mask`, a forward hook); the parameter
            stays the same object, so its optimizer goes on. An old mask is updated in place, and
            `calibrate` and `SketchTracker` take layers that have one.

    Returns:
        The mask, cost and loss of each layer.

    Raises:
        ValueError: Both or neither of `sparsity` and `pattern`, or one out of range; a layer that
            is missing, of another type, shared, parametrised or not divisible by m; a matrix of
            another shape, not finite, symmetric and positive definite.
        TypeError: `optimizer` is no torch optimizer, or `layers` is a single string.

    Source: Frantar & Alistarh 2022 (arXiv 2208.11580).
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError(f"give either sparsity or pattern, got {sparsity} and {pattern}")
    if sparsity is not None:
        check_number("sparsity", sparsity)
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity must be above 0 and below 1, got {sparsity}")
    if pattern is not None and not _is_pattern(pattern):
        raise ValueError(f"pattern must be integers (n, m) with 0 < n < m, got {pattern}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if isinstance(layers, str):
        raise TypeError(f"layers must be several names, got the string {layers!r}")
    names = list(matrices) if layers is None else list(dict.fromkeys(layers))
    if not names:
        raise ValueError("there must be at least one layer to prune, got none")
    chosen = [mask_layer(model, name, matrices) for name in names]
    results = [_solve(layer, sparsity, pattern) for layer in chosen]
    undo: list[Callable[[], None]] = []
    try:
        for result in results:
            moments = result.layer.moments(optimizer)
            undo.append(undo_of(result.layer, moments))
            write_mask(result.layer, result.keep, result.rows, moments, permanent)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return MaskReport(result.report() for result in results)
