"""What the network loses without the cheapest units of each coupling, measured on other samples.

A removal's cost is foreseen by the layers that take the channels: a share of each layer's output,
on the rows that its matrix is of. The network's output shows more of some layers' losses than of
others', tenfold, and a wide layer that saw few rows seems to lose nothing, for it can be fitted to
any rows as few as that. So before couplings compete, each is tried: without some of its units, made
up for from one half of the batches, the network is run on the other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from rlscuda.pruning.choice.ranking import Candidate
from rlscuda.pruning.choice.targets import Ladder, Search
from rlscuda.pruning.running.batch_norms import settle
from rlscuda.pruning.running.calls import isolated_copy, output_tensors
from rlscuda.pruning.running.distortion import distortion
from rlscuda.pruning.surgery.plan import Surgery
from rlscuda.pruning.surgery.transaction import pruned_copy

SHARES = (0.25, 0.75)  # of a coupling's units, the cheapest, that are tried
SAMPLES = 64  # of either half that a trial is run on, or the first batch of more
_LEAST = 1e-3  # of a loss, that of a further share of the units, which chance may hide

Pairs = Callable[[Surgery], Iterable[tuple[Any, Any]]]


class EveryOther:
    """The first, third, fifth ... batch of a loader."""

    def __init__(self, loader: Iterable):
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return islice(self._loader, 0, None, 2)


def measured(
    search: Search,
    candidates: dict[str, Candidate],
    loader: Iterable,
    pairs: Pairs,
    calibrated: Callable[[nn.Module, Iterable], dict[str, Any]] | None,
    adapt_norms: bool,
    progress: Callable[[str], None],
) -> dict[str, Candidate]:
    """Candidates whose costs add up to what the network loses without them.

    Within each share of a coupling's units the costs keep their proportions.

    Args:
        search: Cuts of the model.
        candidates: The order of each coupling's units, and their foreseen costs.
        loader: Batches.
        pairs: Each of them as the model, and as what a surgery leaves of it, take it.
        calibrated: The matrices of a model by a loader; None where those of the search are of other
            samples.
        adapt_norms: Whether batch norms follow.
        progress: Called with what is done next.

    Returns:
        Those candidates with other costs, `distortion` of the output; as they are of a loader with
        one batch, and, with a warning, where outputs cannot be compared.
    """
    if sum(1 for _ in islice(loader, 2)) < 2:
        return candidates
    progress("measuring: calibrating on every other batch")
    matrices = (
        search.matrices if calibrated is None else calibrated(search.model, EveryOther(loader))
    )
    how = search.compensate, search.settle, None, search.turned
    search = Search(search.model, search.structure, search.inputs, matrices, *how)
    whole, ladder = isolated_copy(search.model), Ladder(candidates, "global")
    found = {}
    for name, one in candidates.items():
        progress(f"measuring {name}")
        counts = sorted({min(len(one.order), max(1, int(share * one.units))) for share in SHARES})
        try:
            losses = [
                _loss(whole, search, ladder, {name: count}, pairs, adapt_norms)
                for count in counts
                if count
            ]
        except ValueError as error:
            warnings.warn(
                f"couplings compete by what is foreseen of their costs, not by what is measured, "
                f"for without units of {name}: {error}",
                stacklevel=5,
            )
            return candidates
        found[name] = replace(one, cost=_costs(one.cost, counts, losses))
    return found


def _loss(
    whole: nn.Module,
    search: Search,
    ladder: Ladder,
    counts: dict[str, int],
    pairs: Pairs,
    adapt_norms: bool,
) -> float:
    """The distortion of the output by a cut; infinite where it is no number."""
    cut = search.cut(ladder, counts)
    trial = pruned_copy(search.model, cut.surgery, search.compensated(cut)[0])
    if adapt_norms:
        settle(whole, trial, cut.surgery.tensors, _some(pairs(cut.surgery), 0))
    loss = distortion(whole, trial, _some(pairs(cut.surgery), 1))
    return loss if math.isfinite(loss) else math.inf


def _some(pairs: Iterable[tuple[Any, Any]], first: int) -> Iterator[tuple[Any, Any]]:
    """Every other of the batches, until there are samples enough."""
    samples = 0
    for pair in islice(pairs, first, None, 2):
        yield pair
        samples += max(len(x) for x in output_tensors(pair[0]) if x.dim())
        if samples >= SAMPLES:
            break


def _costs(foreseen: Tensor, counts: Sequence[int], losses: Sequence[float]) -> Tensor:
    """Costs [k] that add up to the losses at these counts; beyond the last as in the share before.

    Args:
        foreseen: Of each unit, [k].
        counts: Units that are gone, ascending.
        losses: Of the network without them.
    """
    costs, start, last = foreseen.clone(), 0, 0.0
    for count, loss in zip(counts, losses):
        rise = max(loss - last, _LEAST * loss) if math.isfinite(last) else math.inf
        end = len(costs) if count == counts[-1] else count
        total = float(foreseen[start:count].sum())
        if math.isfinite(rise) and total > 0:
            costs[start:end] = foreseen[start:end] * (rise / total)
        else:
            costs[start:end] = rise / (count - start)
        start, last = count, max(loss, last)
    return costs
