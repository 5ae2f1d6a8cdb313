"""Channels that are added to others and do not matter beside them, as at a shortcut's end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rlscuda._torch import BatchNorm, Convolution, tree_leaves

_ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")


@dataclass(frozen=True)
class Side:
    """What makes one of two addends: a convolution, and the batch norm between if there is one."""

    convolution: str
    norm: str | None = None


@dataclass(eq=False)
class _Made:
    """A tensor that a forward has made, and how often the forward has used it since."""

    tensor: weakref.ref[Tensor]
    side: Side
    source: _Made | None = None
    uses: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether the addition, and before it the norm, is all that reads it."""
        return self.uses == 1 and (self.source is None or self.source.is_alone)


@dataclass
class _Site:
    """Two addends that meet.

    Attributes:
        sums: Over samples, of their absolute values [C, *positions] float64.
        shared: Places of those that something else reads too.
        open: Those of the forward under way, by place.
    """

    sums: list[Tensor]
    shared: set[int] = field(default_factory=set)
    open: list[tuple[int, _Made]] = field(default_factory=list)


class Additions(TorchFunctionMode):
    """Watches, in the forwards of a model, where outputs of its convolutions are added to others.

    An addend counts where it comes from a convolution, through a batch norm or not, and nothing
    else reads it on the way.

    Args:
        model: The model; its modules are observed while `watching`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._model = model
        self._made: dict[int, _Made] = {}
        self._sites: dict[tuple[Side | None, Side | None], _Site] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the forwards that are run inside."""
        handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in self._model.named_modules()
            if isinstance(module, (Convolution, BatchNorm))
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def end(self) -> None:
        """Says that a forward has ended."""
        for site in self._sites.values():
            site.shared |= {place for place, made in site.open if not made.is_alone}
            site.open.clear()
        self._made.clear()

    def negligible(self, alpha: float) -> Iterator[tuple[Side, list[int]]]:
        """The channels whose norm is less than (1 - alpha) / alpha of what they are added to.

        Args:
            alpha: The share of the signal that is to stay, in (0, 1).
        """
        for sides, site in self._sites.items():
            norms = [total.flatten(1).norm(dim=1) for total in site.sums]
            for place, side in enumerate(sides):
                gone = norms[place] < (1 - alpha) / alpha * norms[1 - place]
                if side is not None and gone.any() and place not in site.shared:
                    yield side, gone.nonzero().flatten().tolist()

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple, output: Tensor) -> None:
            if not isinstance(module, BatchNorm):
                side, source = Side(name), None
            elif args and (source := self._find(args[0])) and source.side.norm is None:
                side = Side(source.side.convolution, name)
            else:
                return
            self._made[id(output)] = _Made(weakref.ref(output), side, source)

        return note

    def _find(self, value: Any) -> _Made | None:
        made = self._made.get(id(value))
        return made if made is not None and made.tensor() is value else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        taken = [found for leaf in tree_leaves((args, kwargs)) if (found := self._find(leaf))]
        is_addition = taken and getattr(function, "__name__", "") in _ADDITIONS and not kwargs
        if is_addition and all(isinstance(arg, Tensor) for arg in args):
            self._note(*args)
        result = function(*args, **kwargs)
        if taken and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for made in taken:
                made.uses += 1
                if result is made.tensor():  # written in place, it is something else now
                    del self._made[id(result)]
        return result

    def _note(self, first: Tensor, second: Tensor) -> None:
        """Takes in two addends."""
        if first.shape != second.shape or first.dim() < 3:
            return
        found = [self._find(addend) for addend in (first, second)]
        first_side, second_side = (None if made is None else made.side for made in found)
        sums = [t.detach().abs().sum(0, dtype=torch.float64) for t in (first, second)]
        site = self._sites.setdefault(
            (first_side, second_side), _Site([0 * total for total in sums])
        )
        site.open += [(place, made) for place, made in enumerate(found) if made is not None]
        if site.sums[0].shape == sums[0].shape:
            site.sums = [old + new for old, new in zip(site.sums, sums)]
        else:  # images of several sizes have no mean
            site.shared |= {0, 1}
