"""Finding the layers of a model that the RLS rule covers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from rlscuda.layers import Layer, refusal


@dataclass(eq=False)
class Match:
    """One module with parameters of its own: the layer it makes, or why it makes none."""

    name: str
    module: nn.Module
    layer: Layer | None
    reason: str

    def bind(self, members: set[nn.Parameter]) -> bool:
        """Whether the weight is among `members`; the bias joins `P` if it is there too."""
        if self.layer is None or self.module.weight not in members:
            return False
        bias = self.module.bias
        self.layer.bias = bias is not None and bias.requires_grad and bias in members
        return True


def _selector(wanted: Iterable[str | nn.Module], option: str, model: nn.Module):
    """A predicate (name, module) for a list of shell patterns and modules."""
    if isinstance(wanted, (str, nn.Module)):
        wanted = [wanted]
    wanted = list(wanted)
    named = dict(model.named_modules())
    for item in wanted:
        if isinstance(item, nn.Module):
            found = any(module is item for module in named.values())
        elif isinstance(item, str):
            found = any(fnmatchcase(name, item) for name in named)
        else:
            raise TypeError(f"{option} takes names and modules, got {type(item).__name__}")
        if not found:
            raise ValueError(f"{option} names {item!r}, which the model does not have")

    def selected(name: str, module: nn.Module) -> bool:
        return any(
            module is item if isinstance(item, nn.Module) else fnmatchcase(name, item)
            for item in wanted
        )

    return selected


def discover(
    model: nn.Module,
    include: Iterable[str | nn.Module] | None,
    exclude: Iterable[str | nn.Module],
) -> list[Match]:
    """Every module of `model` with parameters of its own, and its layer or the reason for none.

    Raises:
        ValueError: A name or module is not in the model, or an included module cannot be covered.
    """
    included = None if include is None else _selector(include, "include", model)
    excluded = _selector(exclude, "exclude", model)
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module))
    matches: list[Match] = []
    for name, module in model.named_modules():
        if not module._parameters:
            continue
        reason = refusal(module)
        if reason is None:
            others = [n for n, m in users[id(module.weight)] if refusal(m) is not None]
            if others:
                reason = f"its weight is also that of {others[0]!r}, which no RLS rule covers"
        wanted = included is None or included(name, module)
        if included is not None and wanted and reason is not None:
            raise ValueError(f"include names {name!r}, which RLS cannot train: {reason}")
        if reason is None and not wanted:
            reason = "not in include"
        elif reason is None and excluded(name, module):
            reason = "excluded"
        layer = None
        if reason is None:
            shared = len(users[id(module.weight)]) > 1
            layer = Layer(name, module, index=len(matches), bias=False, shared=shared)
        matches.append(Match(name, module, layer, reason or ""))
    return matches
