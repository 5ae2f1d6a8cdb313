"""One list of channels and blocks, by what each costs for what it saves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rlscuda.pruning.adaptive.penalties.ledger import BLOCK
from rlscuda.pruning.blocks.finding import Block
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.choice.ranking import Candidate
from rlscuda.pruning.choice.targets import Counts, Ladder
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.running.calls import ExampleInputs, all_tensors
from rlscuda.pruning.running.measure import count_flops
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.transaction import pruned_copy

PRICES = ("params", "flops")
_PATIENCE = 2  # blocks more that are tried after the best number


@dataclass(frozen=True)
class BlockCandidate(Candidate):
    """A block on the list: one unit, which may go."""

    def rounded(self, removed: int, round_to: int) -> int:
        """All or nothing."""
        return min(removed, len(self.order))


class Sizes:
    """How large a model is without some of its channels and blocks; it is only read.

    Args:
        model: The model.
        structure: Its couplings.
        blocks: Those that may go.
        inputs: What it can be called with.
        kind: One of `PRICES`.

    Attributes:
        whole: Its size.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        blocks: Sequence[Block],
        inputs: ExampleInputs,
        kind: str,
    ):
        self._model, self._structure, self._inputs, self._kind = model, structure, inputs, kind
        self._blocks = {block.name: block for block in blocks}
        self.whole = self.without({}, ())

    def without(self, removed: Mapping[str, Sequence[int]], blocks: Iterable[str]) -> int:
        """The size without units of couplings and without blocks."""
        gone = [self._blocks[name] for name in blocks]
        surgery = plan(self._structure, removed)
        if self._kind == "flops":
            copy = pruned_copy(self._model, surgery, {})
            for block in gone:
                copy = with_stand_ins(copy, block.stand_ins)
            return count_flops(copy, surgery.slice_inputs(self._inputs))
        inside = tuple(f"{module}." for block in gone for module in block.modules)
        counted: dict[int, int] = {}  # of parameters that something is left of, shared ones once
        buffers = {name for name, _ in self._model.named_buffers(remove_duplicate=False)}
        for name, tensor in all_tensors(self._model).items():
            if name not in buffers and not name.startswith(inside or "\0"):
                kept = surgery.tensors.get(name)
                shape = tuple(tensor.shape) if kept is None else kept.shape
                counted[id(tensor)] = torch.Size(shape).numel()
        return sum(counted.values())

    def gains(self, names: Iterable[str]) -> dict[str, float]:
        """What removing one unit of each coupling, or a block, saves; 0 where nothing can go."""
        units = {coupling.name: coupling.units for coupling in self._structure.couplings}
        found = {}
        for name in names:
            if name.startswith(BLOCK):
                left = self.without({}, [name.removeprefix(BLOCK)])
            elif units[name] > 1:
                left = self.without({name: [0]}, ())
            else:
                left = self.whole
            found[name] = float(self.whole - left)
        return found


@dataclass(frozen=True, eq=False)
class Selection:
    """What is to go.

    Attributes:
        removed: Units by coupling, in the order of their removal.
        blocks: Names of blocks.
    """

    removed: dict[str, list[int]]
    blocks: list[str]

    @property
    def empty(self) -> bool:
        """Whether nothing goes."""
        return not self.blocks and not any(self.removed.values())


def by_measure(measures: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Candidate]:
    """Couplings and blocks as candidates, the units of least measure first."""
    found: dict[str, Candidate] = {}
    for name in names:
        values = measures[name].cpu()
        order = values.argsort(stable=True)
        if name.startswith(BLOCK):
            found[name] = BlockCandidate(order, values[order], 1)
        else:
            last = len(order) - 1  # which stays
            found[name] = Candidate(order[:last], values[order][:last], len(order))
    return found


def only(candidates: Mapping[str, Candidate], units: Mapping[str, Tensor]) -> dict[str, Candidate]:
    """Candidates of which only some units may go, bool [units]."""
    found = {}
    for name, one in candidates.items():
        may = units[name][one.order]
        found[name] = type(one)(one.order[may], one.cost[may], one.units)
    return found


class OneList:
    """Channels and blocks, priced by what they cost over what they save.

    Args:
        candidates: Couplings and blocks.
        gains: What a unit of each saves.
        sizes: Of the model.
        round_to: What stays of a coupling is a multiple of it, where it has as many.
        inner: Name of a block -> the couplings that are gone with it.
    """

    def __init__(
        self,
        candidates: Mapping[str, Candidate],
        gains: Mapping[str, float],
        sizes: Sizes,
        round_to: int,
        inner: Mapping[str, Iterable[str]],
    ):
        self._sizes, self._inner, self._candidates = sizes, inner, candidates
        self._priced = {
            name: type(one)(one.order, one.cost / gains[name], one.units, one.gone)
            for name, one in candidates.items()
            if gains.get(name, 0) > 0
        }
        channels = {n: one for n, one in self._priced.items() if not n.startswith(BLOCK)}
        self._ladder = Ladder(channels, "global", round_to)
        blocks = [n for n, one in self._priced.items() if n.startswith(BLOCK) and len(one.order)]
        blocks.sort(key=lambda name: (float(self._priced[name].cost[0]), name))
        self._blocks = [name.removeprefix(BLOCK) for name in blocks]

    def everything(self) -> Selection:
        """All that may go."""
        return self._selection(self._blocks, self._ladder.at(1.0))

    def cheapest(self, limit: float) -> Selection:
        """What costs least of all that makes the model as small as a limit.

        Blocks go in the order of their price, save those whose going the limit does not ask for,
        and for each number of them channels do the rest in the order of theirs; everything that
        may go where the limit is out of reach.
        """
        best, least, worse = self.everything(), math.inf, 0
        for count in range(len(self._blocks) + 1):
            blocks = self._needed(limit, self._blocks[:count])
            try:
                counts = self._ladder.lowest(partial(self._reached, limit, blocks))
            except ValueError:  # out of reach with so few blocks gone
                continue
            selection = self._selection(blocks, counts)
            cost = self._cost(selection)
            best, least, worse = (selection, cost, 0) if cost < least else (best, least, worse + 1)
            if worse == _PATIENCE or not any(selection.removed.values()):
                break
        return best

    def part(self, whole: Selection, goal: float) -> Selection:
        """As much of a selection, the cheapest first, as leaves the model no smaller than a goal.

        Of its blocks, one that is too large for that waits and lets others go before it.
        """
        blocks: list[str] = []
        for name in self._blocks:
            if name in whole.blocks and self._size([*blocks, name], {}) >= goal:
                blocks.append(name)
        chosen = {}
        for name, units in whole.removed.items():
            one, count = self._priced[name], len(units)
            chosen[name] = Candidate(one.order[:count], one.cost[:count], one.units, one.gone)
        ladder = Ladder(chosen, "global", self._ladder.round_to)
        return self._selection(blocks, ladder.highest(lambda c: self._size(blocks, c) >= goal))

    def _needed(self, limit: float, blocks: list[str]) -> list[str]:
        """Blocks without those that a limit does not ask for, of which the dearest stay first."""
        for name in sorted(blocks, key=self._cost_of, reverse=True):
            others = [other for other in blocks if other != name]
            blocks = others if self._size(others, {}) <= limit else blocks
        return blocks

    def _reached(self, limit: float, blocks: list[str], counts: Counts) -> bool:
        return self._size(blocks, counts) <= limit

    def _size(self, blocks: list[str], counts: Counts) -> int:
        selection = self._selection(blocks, counts)
        return self._sizes.without(selection.removed, selection.blocks)

    def _selection(self, blocks: list[str], counts: Counts) -> Selection:
        covered = {name for block in blocks for name in self._inner[block]}
        return Selection(
            {
                name: self._candidates[name].order[:count].tolist()
                for name, count in counts.items()
                if count and name not in covered
            },
            blocks,
        )

    def _cost_of(self, block: str) -> float:
        return float(self._candidates[BLOCK + block].cost[0])

    def _cost(self, selection: Selection) -> float:
        of_blocks = sum(map(self._cost_of, selection.blocks))
        removed = selection.removed.items()
        return of_blocks + sum(float(self._candidates[n].cost[: len(u)].sum()) for n, u in removed)


def inner_couplings(structure: Structure, block: Block) -> list[str]:
    """The couplings that all lie in a block."""
    inside = tuple(f"{module}." for module in block.modules)
    return [
        coupling.name
        for coupling in structure.couplings
        if all(f"{member.name}.".startswith(inside) for member in coupling.members)
    ]
