"""What the optimizer covers, and how its matrices fare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda import _C
from rlscuda.optim import advice
from rlscuda.optim.discovery import Registry
from rlscuda.optim.layers import Layer, matrix_bytes
from rlscuda.optim.state import ensure_state


@dataclass(frozen=True)
class CoverageRow:
    """How one module of the model is trained, or one weight of a recurrent module.

    Attributes:
        name: Qualified name of it; "(parameters)" for parameters outside the model.
        kind: Class of the module.
        status: `exact` (RLS), `fallback`, or `refused`: not trained by this optimizer at all.
        why: The reason where it is not `exact`.
        fan_in: n, 0 where there is no `P`.
        groups: Groups of the layer.
        blocks: Blocks of the `P` of each group.
        bytes: Memory of its `P`, 0 where that is another layer's.
    """

    name: str
    kind: str
    status: str
    why: str = ""
    fan_in: int = 0
    groups: int = 0
    blocks: int = 0
    bytes: int = 0


def _flat(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Dataclasses by layer as one plain dict, as loggers take it."""
    return {
        f"rls/{layer or '(root)'}/{name}": value
        for layer, row in rows.items()
        for name, value in asdict(row).items()
    }


class Coverage(list):
    """The rows of every module and weight; prints as a table."""

    def as_dict(self) -> dict[str, str | int]:
        """Every entry of every row by the name ``rls/LAYER/ENTRY``, as for ``wandb.config.update``.

        Example:
            >>> from rlscuda import RLSOptimizer
            >>> coverage = RLSOptimizer(torch.nn.Linear(4, 3)).coverage()
            >>> coverage.as_dict()["rls/(root)/status"]
            'exact'
        """
        return _flat({row.name: row for row in self})

    def __str__(self):
        header = ("layer", "kind", "rule", "P", "MiB", "why")
        lines = [header]
        for r in self:
            count, size = r.groups * r.blocks, -(-r.fan_in // max(1, r.blocks))
            shape = f"{count} x {size}²" if count > 1 else f"{size}²"
            size = f"{r.bytes / 2**20:.2f}"
            exact = r.status == "exact"
            lines.append((r.name or "(root)", r.kind, r.status, shape if exact else "",
                          size if exact else "", r.why))  # fmt: skip
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        table = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines
        ]
        table.insert(1, "  ".join("-" * w for w in widths))
        counts = {s: sum(r.status == s for r in self) for s in ("exact", "fallback", "refused")}
        total = sum(r.bytes for r in self) / 2**20
        table.append(
            ", ".join(f"{n} {s}" for s, n in counts.items() if n) + f"; P takes {total:.2f} MiB"
        )
        return "\n".join(table)


def coverage_of(registry: Registry, states: Mapping, patience: int) -> Coverage:
    """The coverage of every module of a model.

    Args:
        registry: What is known of it.
        states: The states of its parameters.
        patience: Steps without an input after which a layer is said to step without its `P`.
    """
    matches, covered, members = registry.matches, registry.covered, registry.members
    blind = {w for w, stage in registry.stages.items() if stage.missed >= patience}
    rows = Coverage()
    holders: dict[int, Layer] = {}
    for match in matches:
        kind, layer = type(match.module).__name__, match.layer
        own = set(match.place.parameters)
        if layer is not None:
            own.add(layer.weight)  # a parametrization put on later takes it out of its module
        trained = [p for p in own if p in members and p.requires_grad]
        if not trained:
            frozen = not any(p.requires_grad for p in own)
            why = "frozen" if frozen else "in no parameter group"
            rows.append(CoverageRow(match.name, kind, "refused", why if own else match.reason))
        elif layer is None or layer.weight not in covered or not layer.weight.requires_grad:
            why = match.reason or "its weight is frozen or in no parameter group"
            rows.append(CoverageRow(match.name, kind, "fallback", why))
        else:
            state = states.get(layer.weight, {})
            holder = holders.setdefault(id(state["P"]), layer) if "P" in state else layer
            why = "; ".join(_remarks(layer, holder, layer.weight in blind))
            size = matrix_bytes(layer, covered[layer.weight].group["dtype"])
            size *= holder.weight is layer.weight
            shape = (layer.fan_in, layer.groups, layer.blocks)
            rows.append(CoverageRow(match.name, kind, "exact", why, *shape, size))
    outside = members - registry.known()
    if outside:
        why = (
            f"{len(outside)} parameters of no module of the model" if matches else "no model found"
        )
        rows.append(CoverageRow("(parameters)", "Parameter", "fallback", why))
    return rows


def _remarks(layer: Layer, holder: Layer, blind: bool) -> Iterator[str]:
    """What is out of the ordinary about a covered layer, whose `P` another may hold."""
    if holder.weight is not layer.weight:
        yield f"it shares the P of {holder.name!r}, which has the same input"
    if layer.crossed:
        yield "its query, key and value are not one tensor: it steps without P"
    elif blind:
        yield "no input is seen: it steps without P"
    if layer.blocks > 1:
        yield (
            f"P is {layer.blocks} blocks of at most {layer.block_size} of the {layer.fan_in} "
            f"inputs: more than max_fan_in={layer.max_fan_in}"
        )
    if layer.bias_parameter is not None and not layer.bias:
        yield "its bias is frozen, shared or in another group, and so outside P"


@dataclass(frozen=True)
class LayerHealth:
    """How the matrix of one layer fares.

    Attributes:
        updates: Updates applied to its matrices (each group and block counts).
        refused: Updates refused for a non-finite summary or gradient.
        resets: Times that h was not positive and finite, and `P` was set back to its start.
        missing: Steps that had a gradient but no staged input.
        largest_gain: Largest h - forgetting seen: how much a minibatch surprised `P`.
        trace: Trace of `P`.
        symmetry_error: Largest entry of P - P^T, without its sign; 0 by construction.
    """

    updates: int
    refused: int
    resets: int
    missing: int
    largest_gain: float
    trace: float
    symmetry_error: float


class Health(dict):
    """Layer name to `LayerHealth`; prints as a table."""

    def as_dict(self) -> dict[str, int | float]:
        """Every number by the name ``rls/LAYER/NUMBER``, as for ``wandb.log`` or `add_scalar`.

        Example:
            >>> from rlscuda import RLSOptimizer
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = RLSOptimizer(model)
            >>> model(torch.randn(8, 4)).sum().backward(); optimizer.step()
            >>> optimizer.health().as_dict()["rls/(root)/updates"]
            1
        """
        return _flat(self)

    def __str__(self):
        width = max([24, *(len(name) + 1 for name in self)])
        lines = [f"{'layer':<{width}}{'updates':>9}{'refused':>9}{'resets':>8}{'missing':>9}"
                 f"{'max gain':>12}{'trace':>12}{'|P-Pᵀ|':>10}"]  # fmt: skip
        lines += [
            f"{name:<{width}}{r.updates:>9}{r.refused:>9}{r.resets:>8}{r.missing:>9}"
            f"{r.largest_gain:>12.4g}{r.trace:>12.4g}{r.symmetry_error:>10.2g}"
            for name, r in self.items()
        ]
        return "\n".join(lines)


def health_of(P: Tensor, counters: Tensor) -> LayerHealth:
    """Reads the device's counters; the only place that waits for them."""
    read = dict(zip(_C.health_slots, counters.tolist()))
    return LayerHealth(
        **{name: int(read[name]) for name in ("updates", "refused", "resets", "missing")},
        largest_gain=read["largest_gain"],
        trace=float(torch.diagonal(P, dim1=-2, dim2=-1).sum()),
        symmetry_error=float((P - P.mT).abs().max()),
    )


class Reporting:
    """The part of `RLSOptimizer` that users look at."""

    def inverse_autocorrelation(self: Any, layer: nn.Module | str) -> Tensor:
        """The live matrix `P` of a layer, without a copy.

        Args:
            layer: The module or its qualified name; of recurrent ones, that of the weight.

        Returns:
            [n, n], or [groups, n, n] for a grouped convolution; the last row and column are the
            bias' where the layer has one. [groups * blocks, m, m] above `max_fan_in`: the blocks of
            m consecutive columns, the last filled up by columns that no input enters.

        Raises:
            ValueError: The RLS rule does not cover it.
            RuntimeError: It is on another process, by `shard_matrices`.
        """
        self._follow_groups()
        found = self._registry.find(layer)
        if self._processes.sharing is not None:
            self._processes.sharing.check_here(found.weight, found.name)
        group = self._registry.covered[found.weight].group
        return ensure_state(self.state, found, group, self._fallback)["P"]

    def coverage(self: Any) -> Coverage:
        """How each module of the model is trained, why, and the bytes of its `P`."""
        self._follow_groups()
        self._registry.search()
        return coverage_of(self._registry, self.state, advice.PATIENCE)

    def health(self: Any) -> Health:
        """The health of every `P`; reads counters from the device, so it waits for it."""
        self._follow_groups()
        covered = self._registry.covered.items()
        states = {one.layer.name: self.state.get(weight, {}) for weight, one in covered}
        return Health(
            (name, health_of(state["P"], state["health"]))
            for name, state in states.items()
            if "P" in state
        )
