"""Which module holds given parameters, found among the living: most optimizers are given no model.

The choice never depends on the order of objects in memory. Of the modules that hold most of the
parameters it is the one with most of their layers, which a graph made of the model lacks, then with
most of their holders, since a tied weight is to be seen wherever it is used, and of those the
smallest: wrappers do not count. Modules alike in this are told apart by the order and the names of
the parameters in them. The unreachable is collected before, or a module that is gone might count.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Any

from torch import Tensor, nn

from rlscuda._torch import held_parameters, submodules
from rlscuda.optim.kinds.modules import base_of

_Modules = dict[int, nn.Module]  # by id: a module may be of a class that cannot be hashed


class _Several(nn.ModuleList):
    """Modules of which no single one is found; the next optimizer finds them and not this."""


def listed(params: Any) -> Any:
    """What a torch optimizer is made of, with lists for iterators, which can be read but once."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params  # refused by torch
    groups = list(params)
    for i, group in enumerate(groups):
        if isinstance(group, dict) and isinstance(group.get("params"), Iterator):
            groups[i] = {**group, "params": list(group["params"])}
    return groups


def find(params: Any) -> tuple[nn.Module | None, list[nn.Module]]:
    """The smallest living module that holds parameters, and all that it is a part of.

    Where no single one holds all that are held, it is a list of several, in the order of
    their first parameters. Modules that `gc.freeze` hides are found within others alone.

    Args:
        params: Parameters, named parameters or parameter groups, as of `listed`.

    Returns:
        The module, None where no module holds any; and the living modules around it.
    """
    order: dict[int, int] = {}
    for parameter in _tensors(params):
        order.setdefault(id(parameter), len(order))
    living = _living()
    if any(order.keys() & _own(module) for module in living.values()):
        del living
        gc.collect()
        living = _living()
    parents: dict[int, list[nn.Module]] = {}
    for module in living.values():
        for child in submodules(module):
            parents.setdefault(id(child), []).append(module)
    held: dict[int, set[int]] = {}  # id of a module -> those of parameters in it
    holders: dict[int, _Modules] = {}
    for owner in living.values():
        own = order.keys() & _own(owner)
        for above in _reached([owner], lambda one: parents.get(id(one), ())) if own else ():
            held.setdefault(above, set()).update(own)
            holders.setdefault(above, {})[id(owner)] = owner

    left: set[int] = set().union(*held.values())
    roots: _Modules = {}
    while left:
        first = min(left, key=order.__getitem__)
        sizes = {
            key: (
                -len(inside & left),
                -sum(base_of(owner) is not None for owner in holders[key].values()),
                -len(holders[key]),
                len(_reached([living[key]], submodules)),
            )
            for key, inside in held.items()
            if first in inside
        }
        least = min(sizes.values())
        alike = [key for key, size in sizes.items() if size == least]
        best = min(alike, key=lambda key: _look(living[key], order)) if alike[1:] else alike[0]
        roots[best] = living[best]
        left -= held[best]
    around = _reached(list(roots.values()), lambda one: parents.get(id(one), ()))
    wrappers = [module for key, module in around.items() if key not in roots]
    several = list(roots.values())
    return (_Several(several) if several[1:] else several[0] if several else None), wrappers


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from _tensors(given.get("params"))
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        for one in given:
            yield from _tensors(one)


def _living() -> _Modules:
    """Every module; those that the collector does not list may be parts of others."""
    kinds = {id(nn.Module)}
    waiting = [nn.Module]
    while waiting:
        fresh = [kind for kind in waiting.pop().__subclasses__() if kind is not _Several]
        kinds.update(map(id, fresh))
        waiting += fresh
    there = gc.get_objects()
    known = map(kinds.__contains__, map(id, map(type, there)))  # `isinstance` would wake proxies
    return _reached(list(compress(there, known)), submodules)


def _own(module: nn.Module) -> set[int]:
    return set(map(id, held_parameters(module)))


def _reached(first: list[nn.Module], following: Any) -> _Modules:
    """Modules, those that follow them, and so on."""
    reached: _Modules = {}
    waiting = list(first)
    while waiting:
        module = waiting.pop()
        if id(module) not in reached:
            reached[id(module)] = module
            waiting += following(module)
    return reached


def _look(module: nn.Module, order: dict[int, int]) -> tuple:
    """What tells modules with the same parameters apart, however they lie in memory."""
    named = [(n, id(p)) for n, p in module.named_parameters(remove_duplicate=False)]
    kind = type(module)
    return (
        [order[key] for _, key in named if key in order],
        [name for name, _ in named],
        (kind.__module__, kind.__qualname__),
    )
