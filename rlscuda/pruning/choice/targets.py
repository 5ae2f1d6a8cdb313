"""How far to go: from a ratio, a size or a loss to the cut that meets it, and its compensation.

Every coupling is a *candidate* with an order in which its units would be removed, and what each
removal costs. A *ladder* climbs all candidates together, from removing nothing to removing all
that may go, and a target is a height on it.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import own_parameters
from rlscuda.closed_form.formulas import compensate
from rlscuda.optim.kinds.modules import is_consumer
from rlscuda.pruning.attention.scale import rescaled
from rlscuda.pruning.choice.ranking import Candidate, share_of
from rlscuda.pruning.couplings import Coupling, Member, Structure
from rlscuda.pruning.matrices.calibration import Known
from rlscuda.pruning.matrices.layers import layer_values, layer_weight
from rlscuda.pruning.matrices.proven import NotProven
from rlscuda.pruning.report import CouplingChange
from rlscuda.pruning.running.measure import count_flops, count_parameters
from rlscuda.pruning.surgery.plan import Surgery, plan
from rlscuda.pruning.surgery.transaction import pruned_copy

Counts = dict[str, int]  # units removed, by coupling
TARGETS = ("ratio", "target_params", "target_flops", "max_loss")


@dataclass(frozen=True)
class Ladder:
    """Counts as a monotone function of one height in [0, 1].

    Attributes:
        candidates: By coupling.
        scope: `layer` removes the same share of every coupling; `global` takes the cheapest next
            unit of all couplings, whichever it is.
        round_to: What stays is a multiple of it, where the coupling has as many.
    """

    candidates: Mapping[str, Candidate]
    scope: str = "layer"
    round_to: int = 1

    def by_ratio(self, ratio: float | Mapping[str, float]) -> Counts:
        """The counts at a ratio of units; in scope `global`, of the units of all couplings.

        Raises:
            ValueError: A mapping in scope `global`, or one with a pattern that matches nothing.
        """
        if not isinstance(ratio, Mapping):
            return self.at(ratio)
        if self.scope == "global":
            raise ValueError("ratio must be one number in scope 'global', got a mapping")
        for pattern in ratio:
            if not any(fnmatchcase(name, pattern) for name in self.candidates):
                raise ValueError(f"ratio names {pattern!r}, which matches no coupling of "
                                 f"{sorted(self.candidates)}")  # fmt: skip
        return {
            name: candidate.removable(share_of(name, ratio), self.round_to)
            for name, candidate in self.candidates.items()
        }

    def at(self, height: float) -> Counts:
        """The counts when `height` of the original units are gone."""
        if self.scope == "layer":
            return {
                n: candidate.removable(height, self.round_to)
                for n, candidate in self.candidates.items()
            }
        counts = dict.fromkeys(self.candidates, 0)
        gone = sum(candidate.gone for candidate in self.candidates.values())
        wanted = int(height * (gone + sum(p.units for p in self.candidates.values())) + 1e-9) - gone
        heap = [(float(p.cost[0]), name) for name, p in self.candidates.items() if len(p.order)]
        heapq.heapify(heap)
        for _ in range(wanted):
            if not heap:
                break
            _, name = heapq.heappop(heap)
            counts[name] += 1
            candidate = self.candidates[name]
            if counts[name] < len(candidate.order):
                heapq.heappush(heap, (float(candidate.cost[counts[name]]), name))
        return {n: self.candidates[n].rounded(c, self.round_to) for n, c in counts.items()}

    def lowest(self, reached: Callable[[Counts], bool]) -> Counts:
        """The smallest cut at which `reached` holds, which must be monotone.

        Raises:
            ValueError: It does not hold even where everything that may go is gone.
        """
        if not reached(self.at(1.0)):
            raise ValueError("the target is out of reach, even with all but the last units removed")
        low, high = 0.0, 1.0
        for _ in range(self._halvings()):
            middle = (low + high) / 2
            low, high = (low, middle) if reached(self.at(middle)) else (middle, high)
        return self.at(high)

    def highest(self, allowed: Callable[[Counts], bool]) -> Counts:
        """The largest cut that is still `allowed`, found by halving; nothing where none is."""
        low, high = 0.0, 1.0
        best = dict.fromkeys(self.candidates, 0)
        for _ in range(self._halvings()):
            middle = (low + high) / 2
            counts = self.at(middle)
            if counts == best or allowed(counts):
                low, best = middle, counts
            else:
                high = middle
        return best

    def _halvings(self) -> int:
        """Halvings of the ladder after which two heights differ by less than one unit."""
        total = sum(candidate.units + candidate.gone for candidate in self.candidates.values())
        return max(1, total).bit_length() + 1


def check_ratio(ratio: object) -> None:
    """Raises ValueError where `ratio` is not a share in [0, 1) or a mapping of names to such."""
    shares = ratio if isinstance(ratio, Mapping) else {"": ratio}
    for name, value in shares.items():
        if not isinstance(name, str):
            raise ValueError(f"ratio must be by name or shell pattern, got the key {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"ratio must be in [0, 1), got {value!r}")


def checked_target(targets: Mapping[str, Any]) -> tuple[str, Any]:
    """The one target that is given, by name.

    Raises:
        ValueError: None or several are, or it is out of its range.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(TARGETS)} must be given, got "
                         f"{', '.join(given) or 'none'}")  # fmt: skip
    ((name, value),) = given.items()
    if name == "ratio":
        check_ratio(value)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    elif name == "max_loss" and not 0 <= value < float("inf"):
        raise ValueError(f"max_loss must be >= 0, got {value}")
    elif name != "max_loss" and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be > 0, got {value}")
    return name, value


@dataclass(frozen=True)
class Cut:
    """What goes, and what it does to the rest.

    Attributes:
        removed: Units by coupling, in the order of their removal.
        lost: im2col columns that each layer loses.
        surgery: What remains of every tensor.
    """

    removed: dict[str, list[int]]
    lost: dict[str, Tensor]
    surgery: Surgery


class Search:
    """Cuts of one model, of any height.

    Args:
        model: The model.
        structure: Its couplings.
        example_inputs: What it can be called with.
        matrices: Inverse autocorrelation matrices by layer.
        compensate: Whether the remaining weights make up for what goes.
        settle: Called with a pruned copy and its surgery before it is evaluated.
        refit: Makes of a surgery and compensated values those of layers fitted in turn, see
            `rlscuda.pruning.choice.refitting`; None where nothing is.
        turned: Values of the model's parameters by name that differ from those it is to be given.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        example_inputs: Any,
        matrices: dict[str, Any],
        compensate: bool,
        settle: Callable[[nn.Module, Surgery], Any],
        refit: Callable[[Surgery, Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
        turned: Mapping[str, Tensor] | None = None,
    ):
        self.model, self.structure, self.inputs = model, structure, example_inputs
        self.matrices, self.compensate, self.settle = matrices, compensate, settle
        self.refit, self.turned = refit, turned or {}

    def find(
        self,
        ladder: Ladder,
        kind: str,
        value: Any,
        evaluate: Callable[[nn.Module], float],
    ) -> Cut:
        """The cut that meets a target.

        Args:
            ladder: The order of removal.
            kind: `ratio`, `target_params`, `target_flops` or `max_loss`.
            value: Of the target; sizes below 1 are shares of the size now.
            evaluate: The validation loss of a model, for `max_loss`.

        Raises:
            ValueError: The target is out of reach.
        """
        if kind == "ratio":
            return self.cut(ladder, ladder.by_ratio(value))
        whole = self.cut(ladder, {})  # of which a copy is tried, as of all others
        if kind == "max_loss":
            loss = self._loss(evaluate, whole)
            if not math.isfinite(loss):
                raise ValueError(f"evaluate must give a finite loss of the whole model, got {loss}")
            limit = loss + value * abs(loss)
            return self.cut(
                ladder,
                ladder.highest(lambda c: self._loss(evaluate, self.cut(ladder, c)) <= limit),
            )
        size = self._size(kind, whole)
        limit = value if value >= 1 else value * size
        if size <= limit:
            return whole
        if ladder.scope == "global":
            ladder = self._for_what_they_save(ladder, kind, size)
        return self.cut(
            ladder, ladder.lowest(lambda c: self._size(kind, self.cut(ladder, c)) <= limit)
        )

    def _for_what_they_save(self, ladder: Ladder, kind: str, size: int) -> Ladder:
        """The ladder with each cost over what a unit of the coupling saves of the size."""
        candidates = {}
        for name, one in ladder.candidates.items():
            left = self._size(kind, self.cut(ladder, {name: min(1, len(one.order))}))
            saved = float(size - left) if left < size else 0.0
            cost = one.cost / saved if saved else torch.full_like(one.cost, math.inf)
            candidates[name] = replace(one, cost=cost)
        return replace(ladder, candidates=candidates)

    def cut(self, ladder: Ladder, counts: Counts) -> Cut:
        """The cut that removes so many units of each coupling."""
        removed = {
            name: ladder.candidates[name].order[:count].tolist()
            for name, count in counts.items()
            if count
        }
        lost = lost_columns(self.structure.couplings, dict(self.model.named_modules()), removed)
        return Cut(removed, lost, plan(self.structure, removed))

    def compensated(self, cut: Cut) -> tuple[dict[str, Tensor], dict[str, str]]:
        """New values of the weights and biases that a cut leaves; layers without any, and why."""
        if not cut.removed:
            return {}, {}
        how = self.structure.families, cut.removed, cut.surgery.attributes
        scaled = partial(rescaled, self.model, *how)
        if not self.compensate:
            return scaled({}), {}
        elsewhere = self.structure.elsewhere & cut.lost.keys()
        lost = {name: columns for name, columns in cut.lost.items() if name not in elsewhere}
        values, reasons = compensate_layers(self.model, self.matrices, lost)
        reasons |= dict.fromkeys(elsewhere, "its weight is also used outside of it")
        values = scaled({**self.turned, **values})
        if self.refit is not None:
            values = self.refit(cut.surgery, values)
        modules = dict(self.model.named_modules())
        return values, reasons | without_rule(self.structure.couplings, modules, cut.removed)

    def _loss(self, evaluate: Callable[[nn.Module], float], cut: Cut) -> float:
        pruned = pruned_copy(self.model, cut.surgery, self.compensated(cut)[0])
        if cut.removed:
            self.settle(pruned, cut.surgery)
        return evaluate(pruned)

    def _size(self, kind: str, cut: Cut) -> int:
        """Parameters or FLOPs of the model after a cut, whatever its values."""
        pruned = pruned_copy(self.model, cut.surgery, {})
        if kind == "target_params":
            return count_parameters(pruned)
        return count_flops(pruned, cut.surgery.slice_inputs(self.inputs))


def lost_columns(
    couplings: Sequence[Coupling],
    modules: Mapping[str, nn.Module],
    removed: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """The im2col columns of each group that consumers lose; int64, ascending; see `is_consumer`."""
    lost: dict[str, list[Tensor]] = {}
    for member, units in _losing(couplings, removed):
        module: Any = modules.get(member.name)
        if member.kind == "in" and is_consumer(module):
            lost.setdefault(member.name, []).append(member.columns(module)[units].flatten())
    return {name: torch.cat(parts).sort().values for name, parts in lost.items()}


def without_rule(
    couplings: Sequence[Coupling],
    modules: Mapping[str, nn.Module],
    removed: Mapping[str, Sequence[int]],
) -> dict[str, str]:
    """Layers of other kinds that lose inputs too, and why nothing makes up for them."""
    reasons = {}
    for member, _ in _losing(couplings, removed):
        module: Any = modules.get(member.name)
        mixes = member.kind == "in" or isinstance(module, nn.MultiheadAttention)
        if mixes and not is_consumer(module):
            reasons[member.name] = f"there is no rule for {type(module).__name__}"
    return reasons


def _losing(
    couplings: Sequence[Coupling], removed: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Member, Tensor]]:
    """The members of all couplings that lose some units, and these, int64."""
    for coupling in couplings:
        units = torch.tensor(removed.get(coupling.name, ()), dtype=torch.int64)
        for member in coupling.members if len(units) else ():
            yield member, units


def compensate_layers(
    model: nn.Module, matrices: Known, lost: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights and biases that make up best for the lost inputs, in their full shapes.

    Args:
        model: The model.
        matrices: Inverse autocorrelation matrices by layer.
        lost: Columns that each layer loses, see `lost_columns`.

    Returns:
        New values by parameter name, of the parameters' dtypes and devices; and the layers that
        could not be compensated, with the reason.
    """
    modules = dict(model.named_modules())
    holders = parameter_holders(model)
    values: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, columns in lost.items():
        module = modules[name]
        if name not in matrices:
            reasons[name] = "its inverse autocorrelation matrix is not known"
            continue
        if any(p is not None and holders[id(p)] > 1 for p in own_parameters(module).values()):
            reasons[name] = "it shares its parameters with another layer"
            continue
        P = matrices[name]
        W = torch.stack([
            compensate(p, w, columns.to(P.device))
            for p, w in zip(P, layer_weight(module, P))
        ])  # fmt: skip
        try:
            values |= {f"{name}.{own}": new for own, new in layer_values(module, W).items()}
        except NotProven as error:
            reasons[name] = str(error)
    return values, reasons


def parameter_holders(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for m in model.modules() for p in own_parameters(m).values())


def changes_of(
    structure: Structure, candidates: Mapping[str, Candidate], removed: Mapping[str, list[int]]
) -> list[CouplingChange]:
    """What became of every coupling that was ranked, in the network's order."""
    return [
        CouplingChange(
            name=coupling.name,
            members=[member.name for member in coupling.members],
            before=coupling.units,
            after=coupling.units - len(removed.get(coupling.name, [])),
            removed=removed.get(coupling.name, []),
            cost=candidates[coupling.name].cost.tolist(),
        )
        for coupling in structure.couplings
        if coupling.name in candidates
    ]
