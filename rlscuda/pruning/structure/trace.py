"""Which channels of a model live and die together: its couplings, each of them tried.

Labels are followed through one forward (`units`). What comes of them is then tried (`probe`): with
random weights, a model in which the removed channels are zero wherever they are met must put out
what the pruned model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from rlscuda._torch import unwrapped
from rlscuda.optim.discovery import modules_named
from rlscuda.pruning.couplings import Coupling, Member, Structure
from rlscuda.pruning.running.calls import ExampleInputs, all_tensors
from rlscuda.pruning.structure.families import families_of
from rlscuda.pruning.structure.probe import unsound
from rlscuda.pruning.structure.rules.labels import Labels
from rlscuda.pruning.structure.units import Followed, Side, Unit, follow
from rlscuda.pruning.structure.widths import widths_of

_TRIES = 8  # of what a forward may mean by the sizes that it gives


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    ignored: Iterable[str | nn.Module] = (),
    include_inputs: bool = False,
    heads: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Structure:
    """Finds the couplings of a model; the model itself is neither run nor changed.

    Args:
        model: The model.
        example_inputs: What it can be called with: a tensor, a tuple of arguments, or a mapping of
            named ones.
        ignored: Modules, names or shell patterns of names; what they and all inside them produce
            keeps its channels.
        include_inputs: Whether the channels (dimension 1) of raw inputs may be removed too. The
            pruned model then takes inputs without them.
        heads: Whether attention loses whole heads, and not dimensions of each.
        progress: Called with what is done next.

    Returns:
        The structure. What the model puts out is never part of a coupling.

    Raises:
        ValueError: The model cannot be copied or run on the example inputs; `ignored` names what
            the model does not have.
    """
    model = unwrapped(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("prune the module inside DistributedDataParallel, and wrap it again")
    kept = {m for _, inside in modules_named(ignored, "ignored", model) for m in inside}
    kept_names = {name for name, module in model.named_modules() if module in kept}
    progress("following the forward")
    followed = follow(model, example_inputs)
    axes = _axes(followed, heads)

    def read() -> tuple[Structure, Labels]:
        """The couplings as the forward is understood now, those that one attribute counts tied."""
        found = _structure(model, followed, axes, kept_names, include_inputs)
        if _share(followed, found[1], found[0]):
            found = _structure(model, followed, axes, kept_names, include_inputs)
        return found

    found, labels = read()
    tried = [found]

    @cache
    def wrong(place: int) -> dict[str, str]:
        """All couplings of one reading that cannot be pruned, which takes long where many are."""
        return unsound(tried[place], example_inputs, progress)

    for place in range(_TRIES):
        few = unsound(found, example_inputs, progress, some=True)
        if not few:
            return found
        reading = followed, labels, found
        if not (
            _take_for_one(model, *reading, few)
            or _turn(axes, *reading, few)
            or _take_for_one(model, *reading, wrong(place))
            or _turn(axes, *reading, wrong(place))
        ):
            break
        found, labels = read()
        tried.append(found)
    best = max({0, len(tried) - 1}, key=lambda place: _removable(tried[place], wrong(place)))
    sound = [c for c in tried[best].couplings if c.name not in wrong(best)]
    return replace(tried[best], couplings=sound, refused={**tried[best].refused, **wrong(best)})


def _removable(structure: Structure, wrong: Mapping[str, str]) -> int:
    """Channels that may go."""
    return sum(
        (coupling.units - 1) * coupling.members[0].indices.shape[1]
        for coupling in structure.couplings
        if coupling.name not in wrong
    )


def _axes(followed: Followed, heads: bool) -> dict[int, int]:
    """The axis along which each table shrinks at first: the last, or the one before it."""
    return {
        number: table.labels.dim() - (2 if heads else 1)
        for number, table in enumerate(followed.tables)
        if table.axis is None
    }


def _share(followed: Followed, labels: Labels, found: Structure) -> bool:
    """Joins channels of several couplings that one attribute counts; whether there are any."""
    roots = {label for c in found.couplings for label in c.labels.tolist()}
    counted: dict[tuple[str, int], Tensor] = {}
    shared = {(w.module, w.size) for w in found.widths if len(w.channels) > 1}
    joined = False
    for site in followed.sites:
        key = (site.module, site.size)
        if key not in shared or not roots.issuperset(labels.roots(site.labels)):
            continue
        first = counted.setdefault(key, site.labels)
        if labels.roots(first) != labels.roots(site.labels):
            followed.ties.append((first, site.labels))
            joined = True
    return joined


def _take_for_one(
    model: nn.Module,
    followed: Followed,
    labels: Labels,
    found: Structure,
    wrong: Mapping[str, str],
) -> bool:
    """Joins widths that a forward takes for one; whether there are any.

    Where it gives channels that cannot go the width of what comes in, as in `reshape(B, N, C)` with
    the C of its input, both must shrink alike.
    """
    unit_of = {label: c.name for c in found.couplings for label in c.labels.tolist()}
    named = [(site, {unit_of.get(root) for root in labels.roots(site.labels)})
             for site in followed.sites if site.line]  # fmt: skip
    # what fails in one layer fails in all that run the same line
    lines = {site.line for site, names in named if len(names) == 1 and names <= wrong.keys()}
    joined = False
    for site, names in named:
        if len(names) != 1 or None in names or site.line not in lines:
            continue
        for name, _ in model.get_submodule(site.module).named_modules():
            full = ".".join(part for part in (site.module, name) if part)
            own = followed.tensors.get((f"{full}.weight", 1))
            if own is None or len(own) != site.size:
                continue
            other = {unit_of.get(root) for root in labels.roots(own)}
            if len(other) == 1 and other != names and None not in other:
                followed.ties.append((own, site.labels))
                joined = True
                break
    return joined


def _turn(
    axes: dict[int, int],
    followed: Followed,
    labels: Labels,
    found: Structure,
    wrong: Mapping[str, str],
) -> bool:
    """Lets the tables of couplings that failed shrink along another axis; whether there are any."""
    failed = {label for name in wrong for label in found.coupling(name).labels.tolist()}
    lines = {
        followed.tables[number].line
        for number in axes
        if failed.intersection(labels.roots(followed.tables[number].labels))
    }
    turned = False
    for number, axis in axes.items():
        if axis > 0 and followed.tables[number].line in lines:
            axes[number], turned = axis - 1, True
    return turned


def _structure(
    model: nn.Module,
    followed: Followed,
    axes: Mapping[int, int],
    kept_names: set[str],
    include_inputs: bool,
) -> tuple[Structure, Labels]:
    """The couplings for one choice of axes, not yet tried."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    units, labels = followed.units(axes)
    couplings: list[Coupling] = []
    refused = _unfollowed(units) if include_inputs else {}
    made = [unit for unit in units if _makes(unit, order)]
    for name, same in _named(_alike(made, order), order):
        coupling, reason = _coupling(name, same, order), same[0].reason
        produced = {m.name for m in coupling.members if m.kind in ("out", "both")}
        if produced & kept_names:
            continue
        touches_input = any(member.kind == "input" for member in coupling.members)
        if touches_input and not include_inputs:
            if not any(member.kind == "out" for member in coupling.members):
                continue
            reason = reason or "it is added to or joined with the model's input: include_inputs"
        if coupling.units == 1 and coupling.members[0].indices.numel() > 1:
            reason = reason or "its channels can only go together"
        if reason:
            refused[coupling.name] = reason
        else:
            couplings.append(coupling)
    shapes = {name: tuple(tensor.shape) for name, tensor in all_tensors(model).items()}
    sites = [(site, labels.roots(site.labels)) for site in followed.sites]
    widths = widths_of(model, sites, couplings)
    families = families_of(model, followed, couplings)
    structure = Structure(model, couplings, refused, followed.output_shapes,
                          followed.input_widths, shapes, widths, families,
                          followed.elsewhere)  # fmt: skip
    return structure, labels


def _makes(unit: Unit, modules: Mapping[str, int]) -> bool:
    """Whether a unit is of channels: of what a module puts out, or of inputs."""
    return any(
        kind in ("out", "input") or (kind == "both" and name in modules)
        for name, kind in unit.channels
    )


def _unfollowed(units: list[Unit]) -> dict[str, str]:
    """The layers that take what nothing seems to make, and why that cannot be a coupling."""
    reason = "only float inputs of 2, 4 or 5 dimensions can be followed"
    return {
        f"input of {name!r}": reason
        for unit in units
        for name, _ in unit.channels
        if all(kind == "in" for _, kind in unit.channels)
    }


def _alike(units: list[Unit], order: dict[str, int]) -> list[list[Unit]]:
    """Units that have the same members, in the order of the modules that produce them."""
    alike: dict[tuple, list[Unit]] = {}
    for unit in units:
        sides = sorted((side, len(found)) for side, found in unit.channels.items())
        places = sorted((axis, len(found)) for axis, found in unit.places.items())
        alike.setdefault((tuple(sides), tuple(places), unit.reason), []).append(unit)
    for same in alike.values():
        same.sort(key=lambda unit: min(unit.channels[_leader(unit, order)]))
    return sorted(
        alike.values(),
        key=lambda same: (
            _place(_leader(same[0], order), order),
            min(same[0].channels[_leader(same[0], order)]),
        ),
    )


def _leader(unit: Unit, order: dict[str, int]) -> Side:
    """The side that names the coupling: the first to produce it, else the first to meet it."""
    sides = _in_order(unit, order)
    produced = [side for side in sides if side[1] == "out"]
    return (produced or sides)[0]  # a raw input is the first of all


def _in_order(unit: Unit, order: dict[str, int]) -> list[Side]:
    return sorted(unit.channels, key=lambda side: _place(side, order))


def _place(side: Side, order: dict[str, int]) -> tuple[int, Side]:
    """Sorts raw inputs first, then the model's modules in their order, then bare parameters."""
    return (-1 if side[1] == "input" else order.get(side[0], len(order)), side)


def _named(alike: list[list[Unit]], order: dict[str, int]) -> Iterator[tuple[str, list[Unit]]]:
    """Gives each list of units a name of its own."""
    seen: dict[str, int] = {}
    for same in alike:
        name, kind = _leader(same[0], order)
        name = f"input {name}" if kind == "input" else name
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", same


def _coupling(name: str, same: list[Unit], order: dict[str, int]) -> Coupling:
    def indices(places: Iterable[list[int]]) -> Tensor:
        return torch.tensor(list(places), device="cpu")

    members = [
        Member(*side, indices(unit.channels[side] for unit in same))
        for side in _in_order(same[0], order)
    ]
    places = {axis: indices(unit.places[axis] for unit in same) for axis in same[0].places}
    return Coupling(name, len(same), members, places, indices([unit.label] for unit in same)[:, 0])
