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
Row = tuple[Place, ...]  # of the dimensions of one head
Sides = dict[str, list[Tensor]]  # by layer: its rows or columns [d], of each head that has them


@dataclass(frozen=True)
class _Met:
    """What labels are of before tables tie any: layers, and whether they meet anything else."""

    places: dict[int, list[Place]]
    else_met: set[int]
    home: dict[int, Place]  # of a label itself, where it is of a layer's weight

    def free(self, roots: Sequence[int]) -> bool:
        """Whether nothing but layers meets some dimensions, each of which may go alone."""
        return len(set(roots)) == len(roots) and not self.else_met.intersection(roots)


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
    found: list[Family] = []
    known: set[tuple[int, ...]] = set()
    around: set[str] = set()  # modules that have products
    for product in _products(met, followed):
        known |= product.roots
        around |= {place[0].rpartition(".")[0] for row in product.left for place in row}
        if units := _units(unit_of, next(iter(product.left))):
            free = all(map(met.free, product.roots))
            left, right = (_by_layer(list(zip(*side))) for side in (product.left, product.right))
            found.append(Family(*units, left, right, True, product.scaled, free))
    for roots, of_head in _rows(followed):
        if roots in known or not met.free(roots):
            continue
        places = [met.places.get(root, []) for root in roots]
        made, read = (_by_layer([[p for p in own if p[1] == out] for own in places])
                      for out in (True, False))  # fmt: skip
        units = _units(unit_of, [own[0] for own in places]) if made and read else None
        of_head = of_head or (units is not None and len(set(units[1].tolist())) == len(roots))
        if units and of_head and places[0][0][0].rpartition(".")[0] in around:
            known.add(roots)
            found.append(Family(*units, made, read, False, False, True))
    return found


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


@dataclass(eq=False)
class _Product:
    """Rows that are multiplied by one another, directly or through others."""

    left: dict[Row, None]
    right: dict[Row, None]
    roots: set[tuple[int, ...]]
    scaled: bool


def _products(met: _Met, followed: Followed) -> list[_Product]:
    """The products whose sides are rows of layers; those that share a row are one."""
    found: list[_Product] = []
    for product in followed.products:
        for ids in zip(product.left.tolist(), product.right.tolist()):
            rows = [tuple(met.home.get(label, ("", False, 0)) for label in side) for side in ids]
            if not all(place[1] for row in rows for place in row):
                continue
            roots = {tuple(map(followed.labels.find, side)) for side in ids}
            new = _Product({rows[0]: None}, {rows[1]: None}, roots, product.scaled)
            for other in [o for o in found if rows[0] in o.left or rows[1] in o.right]:
                new = _Product(other.left | new.left, other.right | new.right,
                               other.roots | new.roots, other.scaled)  # fmt: skip
                found.remove(other)
            found.append(new)
    return found


def _rows(followed: Followed) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Labels of what may be one head, and whether it is a row of an array of channels."""
    for table in followed.tables:
        if table.axis is None:
            for row in table.labels.flatten(0, -2).tolist():
                yield tuple(map(followed.labels.find, row)), True
    for site in followed.sites:  # of which it is one only if it has each unit once
        yield tuple(map(followed.labels.find, site.labels.tolist())), False


def _by_layer(places: Sequence[Sequence[Place]]) -> Sides:
    """Places of each dimension by layer, where every dimension has as many of each."""
    by_layer: list[dict[str, list[int]]] = [defaultdict(list) for _ in places]
    for own, found in zip(places, by_layer):
        for name, _, place in own:
            found[name].append(place)
    counts = {tuple(sorted((name, len(p)) for name, p in found.items())) for found in by_layer}
    if len(counts) != 1 or not by_layer[0]:
        return {}
    return {
        name: list(torch.tensor([found[name] for found in by_layer], device="cpu").unbind(1))
        for name in by_layer[0]
    }


def _units(
    unit_of: dict[Place, tuple[str, int]], places: Sequence[Place]
) -> tuple[str, Tensor] | None:
    """The coupling of some places, and the unit of each."""
    units = [unit_of.get(place) for place in places]
    names = {unit[0] for unit in units if unit is not None}
    if None in units or len(names) != 1:
        return None
    return names.pop(), torch.tensor([unit[1] for unit in units if unit], device="cpu")
