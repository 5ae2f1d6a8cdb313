"""How `RLSOptimizer` follows when its layers lose rows, columns and groups.

Rows of a weight (output channels) leave `P` as it is; columns (inputs) are taken out of it by a
Schur downdate, since a slice would belong to a layer that still sees them; the groups of a
depthwise convolution go with their matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.closed_form.formulas import downdate
from rlscuda.optim.kept import Kept
from rlscuda.optim.layers import Layer
from rlscuda.optim.staging import Factors, Stage, Summary
from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.surgery.journal import Change

Replaced = Mapping[nn.Parameter, tuple[nn.Parameter, Kept]]


@dataclass(eq=False)
class LayerCut:
    """What remains of one covered layer.

    Attributes:
        layer: The layer, as it was.
        weight: The new weight.
        rows: Rows of the weight that remain, int64.
        groups: Groups that remain, int64.
        columns: Columns of `P` that remain, int64, a bias' column last.
        removed: Columns of `P` that go, int64.
    """

    layer: Layer
    weight: nn.Parameter
    rows: Tensor
    groups: Tensor
    columns: Tensor
    removed: Tensor

    @classmethod
    def of(cls, layer: Layer, new: nn.Parameter, kept: Kept) -> LayerCut:
        """The cut of a layer whose weight was cut to `new`."""
        rows = kept.places(0)
        groups = torch.unique(rows // (kept.of[0] // layer.groups))
        area = layer.columns // kept.of[1]
        columns = (kept.places(1)[:, None] * area + torch.arange(area, device="cpu")).flatten()
        if layer.bias:
            columns = torch.cat([columns, torch.tensor([layer.columns], device="cpu")])
        gone = torch.ones(layer.fan_in, dtype=torch.bool, device="cpu")
        gone[columns] = False
        return cls(layer, new, rows, groups, columns, gone.nonzero().flatten())

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the new `P`."""
        n, groups = len(self.columns), len(self.groups)
        return (n, n) if groups == 1 else (groups, n, n)

    def matrix(self, P: Tensor) -> Tensor:
        """The new `P` of a live one: the same tensor where no column and no group goes."""
        if not len(self.removed) and len(self.groups) == self.layer.groups:
            return P
        blocks = P.reshape(self.layer.groups, *P.shape[-2:])[self.groups.to(P.device)]
        if len(self.removed):
            removed = self.removed.to(P.device)
            blocks = torch.stack([downdate(block, removed) for block in blocks])
        return blocks.to(P.dtype).reshape(self.matrix_shape)

    def entries(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The layer's state after the cut.

        Raises:
            ValueError: The state has an entry that is not known.
        """
        new: dict[str, Any] = {}
        for name, value in state.items():
            if name == "P":
                new[name] = self.matrix(value)
            elif name in ("first_moment", "momentum_buffer"):
                new[name] = _select(_select(value, 0, self.rows), 1, self.columns)
            elif name == "second_moment":
                new[name] = _select(value, 0, self.rows)
            elif name == "power":
                new[name] = _select(value, 0, self.groups)
            elif name in ("health", "step"):
                new[name] = value
            else:
                raise ValueError(f"the state of {self.layer.name!r} has an unknown {name!r}")
        return new

    def stage(self, stage: Stage) -> Stage:
        """What was staged, cut likewise; the old one is left to forwards still on their way."""
        new = Stage()
        new.__dict__.update(stage.__dict__)
        new.summary = None if stage.summary is None else self._summary(stage.summary)
        new.factors = None if stage.factors is None else self._factors(stage.factors)
        return new

    def _summary(self, summary: Summary) -> Summary:
        rows = _select(_select(summary.rows, 0, self.groups), 2, self.columns)
        return Summary(summary.kind, rows, summary.count, summary.keys)

    def _factors(self, factors: Factors) -> Factors | None:
        if factors.x._version != factors.version:
            return None  # no longer what the forward saw
        inputs = self.columns[:-1] if self.layer.bias else self.columns
        x = _select(factors.x, 1, inputs)
        return Factors(x, _select(factors.delta, 1, self.rows), x._version)


def _select(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    if len(kept) == tensor.shape[dim]:
        return tensor
    return tensor.index_select(dim, kept.to(tensor.device))


def cuts(optimizer: RLSOptimizer, replaced: Replaced) -> dict[nn.Parameter, LayerCut]:
    """The cut of every covered layer, by its old weight."""
    return {
        weight: LayerCut.of(layer, *replaced[weight])
        for weight, layer in optimizer._layers.items()
        if weight in replaced
    }


def changes(
    optimizer: RLSOptimizer, replaced: Replaced, layers: Mapping[nn.Parameter, LayerCut]
) -> list[Change]:
    """The changes of what the optimizer holds besides its state and groups; nothing is changed."""

    def new(parameter: Any) -> Any:
        return replaced[parameter][0] if parameter in replaced else parameter

    found = []
    known = [match.layer for match in optimizer._matches if match.layer is not None]
    for layer in dict.fromkeys([*known, *optimizer._layers.values()]):
        cut = layers.get(layer.weight)
        if layer.weight not in replaced:
            continue
        cut = cut or LayerCut.of(layer, *replaced[layer.weight])
        geometry = (*layer.geometry[:4], len(cut.groups), *layer.geometry[5:])
        values = {
            "weight": cut.weight,
            "bias_parameter": new(layer.bias_parameter),
            "columns": len(cut.columns) - layer.bias,
            "geometry": geometry,
        }
        found += [Change(layer, name, value) for name, value in values.items()]
    stages = {
        new(weight): layers[weight].stage(stage) if weight in layers else stage
        for weight, stage in optimizer._stages.items()
    }
    rekeyed = {
        "_layers": {new(weight): layer for weight, layer in optimizer._layers.items()},
        "_stages": stages,
        "_group_of": {new(weight): group for weight, group in optimizer._group_of.items()},
        "_members": set(map(new, optimizer._members)),
    }
    found += [Change(optimizer, name, value) for name, value in rekeyed.items()]
    fresh = {"_inner": None, "_fusable": False, "_trained": None}
    return found + [Change(optimizer._fallback, name, value) for name, value in fresh.items()]
