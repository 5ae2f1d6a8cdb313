"""Dimensions of heads: which rows of which layers are multiplied, which columns take them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlscuda.optim.kinds.modules import is_transposed
from rlscuda.pruning.couplings import Coupling, Family
from rlscuda.pruning.structure.units import Followed

Place = tuple[str, bool, int]  # a layer, whether on the side of its outputs, and the row or column
Sides = dict[str, list[Tensor]]  # by layer: its rows or columns [d], of each head that has them


@dataclass(frozen=True)
class _Met:
    """What is met by each label before tables tie any: layers, and whether anything else is."""

    places: dict[int, list[Place]]
    else_met: set[int]
    home: dict[int, Place]  # of a label itself, where it is of a layer's weight


def families_of(
    model: nn.Module, followed: Followed, couplings: Sequence[Coupling]
) -> list[Family]:
    """The heads of couplings that shrink along the dimensions of each.

    Args:
        model: The model.
        followed: What following it has shown, before tables tie anything.
        couplings: Its couplings.
    """
    unit_of = {
        (member.name, member.kind == "out", channel): (coupling.name, unit)
        for coupling in couplings
        for member in coupling.members
        if member.kind in ("in", "out")
        for unit, row in enumerate(member.indices.tolist())
        for channel in row
    }
    met = _met(model, followed)
    find = followed.labels.find
    found: dict[tuple[int, ...], Family] = {}
    for product in followed.products:
        for left, right in zip(product.left.tolist(), product.right.tolist()):
            homes = [[met.home.get(label) for label in ids] for ids in (left, right)]
            if any(home is None or not home[1] for side in homes for home in side):
                continue
            one, other = (_grouped([[home] for home in side if home]) for side in homes)
            roots = tuple(map(find, left))
            if roots in found:
                _add(found[roots].left, one)
                _add(found[roots].right, other)
            elif units := _units(unit_of, [home for home in homes[0] if home]):
                free = _free(met, roots)
                found[roots] = Family(*units, one, other, True, product.scaled, free)
    around = {name.rpartition(".")[0] for name in (family.coupling for family in found.values())}
    for roots in _rows(followed):
        if roots in found:
            continue
        places = [met.places.get(root, []) for root in roots]
        made, read = (_grouped([[p for p in own if p[1] == out] for own in places])
                      for out in (True, False))  # fmt: skip
        if not made or not read or not _free(met, roots):
            continue
        units = _units(unit_of, [own[0] for own in places])
        if units and units[0].rpartition(".")[0] in around:
            found[roots] = Family(*units, made, read, False, False, True)
    return list(found.values())


def _met(model: nn.Module, followed: Followed) -> _Met:
    layers = {
        f"{name}.weight" if name else "weight": (name, is_transposed(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_transposed(module)
    }
    biases = {f"{name}.bias" if name else "bias" for name, _ in layers.values()}
    met = _Met(defaultdict(list), set(), {})
    for (tensor, axis), labels in followed.tensors.items():
        for place, label in enumerate(labels.tolist()):
            root = followed.labels.find(label)
            if tensor in layers:
                name, turned = layers[tensor]
                met.home[label] = (name, (axis == 1) == turned, place)
                met.places[root].append(met.home[label])
            elif tensor not in biases:
                met.else_met.add(root)
    return met


def _free(met: _Met, roots: Sequence[int]) -> bool:
    """Whether nothing but layers meets some dimensions, each of which may go alone."""
    return len(set(roots)) == len(roots) and not met.else_met.intersection(roots)


def _rows(followed: Followed) -> Iterator[tuple[int, ...]]:
    """The sets of labels along the last axis of each table."""
    for table in followed.tables:
        if table.axis is None:
            for row in table.labels.flatten(0, -2).tolist():
                yield tuple(map(followed.labels.find, row))


def _grouped(places: Sequence[Sequence[Place]]) -> Sides:
    """Places of each dimension by layer, where every dimension has as many of each."""
    by_layer: list[dict[str, list[int]]] = [defaultdict(list) for _ in places]
    for own, found in zip(places, by_layer):
        for name, _, place in own:
            found[name].append(place)
    counts = {tuple(sorted((name, len(p)) for name, p in found.items())) for found in by_layer}
    if len(counts) != 1 or not by_layer[0]:
        return {}
    return {
        name: list(
            torch.tensor([sorted(found[name]) for found in by_layer], device="cpu").unbind(1)
        )
        for name in by_layer[0]
    }


def _add(sides: Sides, more: Sides) -> None:
    for name, rows in more.items():
        own = sides.setdefault(name, [])
        own += [row for row in rows if not any(torch.equal(row, known) for known in own)]


def _units(
    unit_of: dict[Place, tuple[str, int]], places: Sequence[Place]
) -> tuple[str, Tensor] | None:
    """The coupling of some places, and the unit of each."""
    units = [unit_of.get(place) for place in places]
    names = {unit[0] for unit in units if unit is not None}
    if None in units or len(names) != 1:
        return None
    return names.pop(), torch.tensor([unit[1] for unit in units if unit], device="cpu")
