"""Rules by the names of operations in torch's core library.

A rule gets what follows the labels, the operation with its arguments, and its output, and gives
the planes of the output: one list, or one for each of several outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from rlscuda.pruning.structure.rules.labels import Labels, Planes


class Following(Protocol):
    """What a rule may ask and tell."""

    labels: Labels

    @property
    def where(self) -> str:
        """The operation that runs, and the line of the model that called it."""

    def planes(self, tensor: Any) -> Planes:
        """The planes of a tensor; none of anything else."""

    def operand(self, tensor: Tensor) -> tuple[tuple[int, ...], Planes]:
        """Shape and planes, as `pointwise` takes them."""

    def give(self, tensor: Tensor, planes: Iterable[Tensor]) -> None:
        """Sets the planes of a tensor."""

    def fix_all(self, tensors: Iterable[Any], reason: str) -> None:
        """Lets nothing go that some tensors have."""

    def table(self, labels: Tensor, axis: int | None = None) -> None:
        """Notes an array of channels."""

    def site(self, tensor: Tensor) -> None:
        """Notes the sizes of the axes of channels that the model has given a tensor."""

    def product(self, left: Planes, right: Planes) -> None:
        """Notes planes along whose last axes two activations are multiplied and summed."""


Rule = Callable[[Following, Any, tuple, dict, Any], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operations of some names, their in-place forms with them."""

    def register(given: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, given))
        return given

    return register


def name_of(op: Any) -> str:
    """The name of an operation, whatever its overload."""
    return op.overloadpacket.__name__


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among arguments, also in lists of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []
    )
