"""Attributes that hold numbers of channels, as `num_heads` and `head_dim`, and follow a cut.

Where a forward reshapes or splits channels, the size of an axis comes from somewhere: an attribute
of its module that has the same value follows the channels of that axis. Whether it was the right
one is tried with the couplings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from rlscuda.pruning.couplings import Coupling, Width
from rlscuda.pruning.structure.follower import Site
from rlscuda.pruning.surgery.attributes import by_tensors


def widths_of(
    model: nn.Module, sites: Sequence[tuple[Site, list[int]]], couplings: Sequence[Coupling]
) -> list[Width]:
    """The attributes of a model's own modules that count channels of couplings.

    Args:
        model: The model.
        sites: Where its forward gives sizes, with the label of each channel there.
        couplings: Its couplings.
    """
    unit_of = {
        label: (coupling.name, unit)
        for coupling in couplings
        for unit, label in enumerate(coupling.labels.tolist())
    }
    modules = dict(model.named_modules())
    found: dict[tuple[str, str, int | None], Width] = {}
    for site, labels in sites:
        channels = [unit_of[label] for label in labels if label in unit_of]
        for attribute, item in _held(modules[site.module], site) if channels else ():
            key = (site.module, attribute, item)
            width = found.setdefault(key, Width(*key, site.size, []))
            if channels not in width.channels:
                width.channels.append(channels)
    return list(found.values())


def _held(module: nn.Module, site: Site) -> list[tuple[str, int | None]]:
    """Where a module holds the size of a site; heads may be as many as their dimensions."""
    found = list(of_value(module, site.size))
    counts = [place for place in found if re.search("heads|groups", place[0])]
    others = [place for place in found if place not in counts]
    if not counts or not others:
        return found
    return {True: counts, False: others, None: []}[site.outer]


def of_value(module: nn.Module, size: int) -> Iterator[tuple[str, int | None]]:
    """Attributes of a module, and places in them, that are a number."""
    known = by_tensors(module)
    for name, value in vars(module).items():
        if name in known:
            continue
        if _is(value, size):
            yield name, None
        elif isinstance(value, (list, tuple)):
            yield from ((name, i) for i, item in enumerate(value) if _is(item, size))


def _is(value: Any, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == size
