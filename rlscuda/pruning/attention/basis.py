r"""The basis in which heads are pruned: their dimensions sorted by what losing each would cost.

Logits are inner products q^T k of a head's queries and keys, and so stay as they are when
:math:`q \leftarrow T q, k \leftarrow T^{-T} k`. With the second moments A = E[q q^T], B = E[k k^T]
and :math:`A^{1/2} B^{1/2} = U S V^T`, the choice :math:`T = S^{1/2} U^T A^{-1/2}` makes both
moments S: of all products of rank r, that of the first r dimensions is the nearest in the mean
square over independent q and k (Eckart and Young 1936). What attention makes of values, o, goes
into W o; with :math:`W E[o o^T]^{1/2} = U S V^T`, the basis :math:`o \leftarrow V^T E[o o^T]^{-1/2}
o` sorts its dimensions by what W loses with each. All moments come from the inverse
autocorrelation matrices of the layers. The model computes the same as before, which is tried on a
copy.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.pruning.attention.moments import Moments
from rlscuda.pruning.couplings import Family, Structure
from rlscuda.pruning.matrices.layers import layer_values
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    call,
    inference,
    isolated_copy,
    output_tensors,
)

_LEAST = 1e-10  # of moments, relative to the largest: what is less has no direction of its own
_SAME = 1e-3  # of the largest output, what may differ where the basis does not matter


def in_basis(
    structure: Structure,
    matrices: dict[str, Any],
    example_inputs: ExampleInputs,
    wanted: Container[str],
) -> tuple[Structure, dict[str, Tensor]]:
    """The structure of a copy whose heads are in the basis to prune them in, and its new values.

    Args:
        structure: The couplings of a model, which is only read.
        matrices: Inverse autocorrelation matrices by layer; those of layers that read the heads
            are turned with them.
        example_inputs: What the model can be called with.
        wanted: The couplings that may lose units; the heads of others stay as they are.
    """
    model = structure.model
    families = [family for family in structure.families if family.coupling in wanted]
    values = _turned(model, families, matrices, example_inputs) if families else {}
    own = dict(model.named_parameters())
    held: dict[Tensor, Tensor] = {own[name]: nn.Parameter(v) for name, v in values.items()}
    return replace(structure, model=isolated_copy(model, held)) if values else structure, values


def _turned(
    model: nn.Module,
    all_families: Sequence[Family],
    matrices: dict[str, Any],
    example_inputs: ExampleInputs,
) -> dict[str, Tensor]:
    """New values of weights and biases, by name."""
    by_coupling: dict[str, list[Family]] = {}
    for family in all_families:
        by_coupling.setdefault(family.coupling, []).append(family)
    modules = dict(model.named_modules())
    values: dict[str, Tensor] = {}
    trials = [by_coupling] if len(by_coupling) == 1 else [by_coupling, *(
        {name: families} for name, families in by_coupling.items()
    )]  # fmt: skip
    layers = {name for family in all_families for name in (*family.left, *family.right)}
    gains = {  # at one, so that no branch is too faint to be seen
        name: torch.ones_like(parameter)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in layers and parameter.is_floating_point()
        if parameter.numel() == max(parameter.shape, default=1)
    }
    expected = _outputs(model, gains, example_inputs)
    for trial in trials:
        turn = _Turn(modules, matrices)
        for families in trial.values():
            turn.coupling(families)
        new = turn.values()
        if new and _agree(expected, _outputs(model, gains | new, example_inputs)):
            values |= new
            matrices |= turn.matrices
            if trial is by_coupling:
                break
    return values


class _Turn:
    """Changes of basis that are not yet tried."""

    def __init__(self, modules: Mapping[str, Any], matrices: Mapping[str, Any]):
        self._modules, self._moments = modules, Moments(modules, matrices)
        self._known = matrices
        self._weights: dict[str, Tensor] = {}
        self.matrices: dict[str, Tensor] = {}

    def coupling(self, families: Sequence[Family]) -> None:
        """Sorts the dimensions of a coupling's heads, the most important to the first units."""
        known = [family for family in families if self._moments.known(family)]
        free = [family for family in known if family.free]
        units = int(max(int(family.units.max()) for family in families)) + 1
        worth = torch.zeros(units, dtype=torch.float64, device="cpu")
        for family in known:
            if not family.free and family.product:
                cost = self._moments.cost(family)
                worth.index_add_(0, family.units, cost.cpu() / cost.sum().clamp_min(1e-300).cpu())
        rank = worth.argsort(descending=True, stable=True).argsort()
        for family in free:
            places = rank[family.units].argsort(stable=True).argsort()
            T, inverse = self._basis(family)
            self._apply(family, T[places], inverse[:, places])

    def _basis(self, family: Family) -> tuple[Tensor, Tensor]:
        """T and its inverse, the rows of T sorted by what they are worth."""
        if family.product:
            root, back = _roots(self._moments.side(family.left))
            other, _ = _roots(self._moments.side(family.right))
            U, S, _ = torch.linalg.svd(root @ other)
            scale = S.clamp_min(_LEAST * S.max().clamp_min(1e-300)).sqrt()
            return scale[:, None] * (U.mT @ back), (root @ U) / scale
        inputs, reads = [], []
        for name, heads in family.right.items():
            for columns in heads:
                inputs.append(self._moments.inputs(name)[columns][:, columns])
                weight = self._moments.weight(name)[:, columns]
                reads.append(weight.mT @ weight)
        root, back = _roots(torch.stack(inputs).sum(0))
        energy, V = torch.linalg.eigh(root @ torch.stack(reads).sum(0) @ root)
        V = V.flip(1)  # the largest first
        size = root.square().sum().div(len(root)).sqrt()  # so that the values stay about as large
        return size * (V.mT @ back), (root @ V) / size

    def _apply(self, family: Family, T: Tensor, inverse: Tensor) -> None:
        for name, heads in family.left.items():
            for rows in heads:
                self._weight(name)[rows] = T @ self._weight(name)[rows]
        for name, heads in family.right.items():
            for places in heads:
                weight = self._weight(name)
                if family.product:
                    weight[places] = inverse.mT @ weight[places]
                    continue
                weight[:, places] = weight[:, places] @ inverse
                if name not in self.matrices:
                    self.matrices[name] = self._known[name].clone()
                P = self.matrices[name][0]
                P[places] = inverse.mT.to(P) @ P[places]
                P[:, places] = P[:, places] @ inverse.to(P)

    def _weight(self, name: str) -> Tensor:
        if name not in self._weights:
            self._weights[name] = self._moments.weight(name).clone()
        return self._weights[name]

    def values(self) -> dict[str, Tensor]:
        """New values by parameter name."""
        return {
            f"{name}.{own}": value.contiguous()
            for name, weight in self._weights.items()
            for own, value in layer_values(self._modules[name], weight[None]).items()
        }


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a matrix of moments, and its inverse."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    values = values.clamp_min(_LEAST * values.max().clamp_min(1e-300)).sqrt()
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT


def _outputs(
    model: nn.Module, values: Mapping[str, Tensor], example_inputs: ExampleInputs
) -> list[Tensor]:
    own = dict(model.named_parameters())
    held: dict[Tensor, Tensor] = {own[name]: nn.Parameter(v) for name, v in values.items()}
    copy = isolated_copy(model, held)
    with inference(copy):
        torch.manual_seed(0)
        return output_tensors(call(copy, example_inputs))


def _agree(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return all(
        one.shape == other.shape
        and bool(((one - other).abs() <= _SAME * one.abs().max().clamp_min(1e-30)).all())
        for one, other in zip(expected, found)
        if one.is_floating_point()
    )
