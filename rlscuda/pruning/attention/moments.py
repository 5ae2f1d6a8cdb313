"""Second moments of what layers make of their inputs, from their inverse autocorrelation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlscuda.closed_form.greedy import Consumer
from rlscuda.pruning.couplings import Family
from rlscuda.pruning.matrices.layers import layer_weight

Weights = dict[str, Tensor]  # of a layer [c, n] float64, its bias' column with it


class Moments:
    """Second moments of the inputs and outputs of layers.

    Args:
        modules: The model's modules by name.
        matrices: Inverse autocorrelation matrices by layer.
    """

    def __init__(self, modules: Mapping[str, Any], matrices: Mapping[str, Any]):
        self._modules, self._matrices = modules, matrices
        self._inputs: dict[str, Tensor] = {}

    def known(self, family: Family) -> bool:
        """Whether all layers that the moments of a family need have a matrix."""
        names = (*family.left, *family.right) if family.product else family.right
        return all(isinstance(self._matrices.get(name), Tensor) for name in names)

    def inputs(self, name: str) -> Tensor:
        """E[x x^T] of the inputs of a layer, float64 [n, n]."""
        if name not in self._inputs:
            self._inputs[name] = torch.linalg.inv(self._matrices[name][0].double())
        return self._inputs[name]

    def outputs(self, name: str, rows: Tensor) -> Tensor:
        """E[y y^T] of some outputs of a layer, float64 [d, d]."""
        weight = self.weight(name)[rows]
        return weight @ self.inputs(name) @ weight.mT

    def weight(self, name: str) -> Tensor:
        """The weight of a layer, with its bias as the last column where the matrix has it."""
        return layer_weight(self._modules[name], self._matrices[name])[0]

    def side(self, layers: Mapping[str, list[Tensor]]) -> Tensor:
        """The moments of all outputs that share the dimensions of a family, added."""
        parts = [self.outputs(name, rows) for name, all_rows in layers.items() for rows in all_rows]
        return torch.stack(parts).sum(0)

    def cost(self, family: Family) -> Tensor:
        """What losing each dimension of a product alone costs, E[q^2] E[k^2]: float64 [d]."""
        return self.side(family.left).diagonal() * self.side(family.right).diagonal()


def product_consumers(
    families: list[Family], units: int, modules: Mapping[str, Any], matrices: Mapping[str, Any]
) -> list[Consumer]:
    """The products of a coupling as a layer that reads its units, in shares of their energy.

    To a product its dimensions are what inputs without correlation are to a layer: the cost of
    several is the sum of theirs.

    Args:
        families: Those of the coupling.
        units: Of the coupling.
        modules: The model's modules by name.
        matrices: Inverse autocorrelation matrices by layer.

    Returns:
        One consumer, or none where the moments of no product are known.
    """
    moments = Moments(modules, matrices)
    known = [family for family in families if family.product and moments.known(family)]
    costs = [moments.cost(family) for family in known]
    shares = [cost / cost.sum() for cost in costs if float(cost.sum()) > 0]
    if not shares or len(shares) < len(known):
        return []
    cost, unit = torch.cat(shares), torch.cat([family.units for family in known])
    each = torch.bincount(unit, minlength=units)
    if bool((each != each[0]).any()):
        return []
    blocks = unit.argsort(stable=True).view(units, -1)
    cost = cost.clamp_min(1e-12)
    return [Consumer(torch.diag(1 / cost), cost.new_ones(1, len(cost)), blocks, 1 / len(shares))]
