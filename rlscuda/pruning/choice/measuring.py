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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.pruning.choice.ranking import Candidate
from rlscuda.pruning.choice.targets import Ladder, Search
from rlscuda.pruning.running.batch_norms import Seen, settle
from rlscuda.pruning.running.calls import isolated_copy, output_tensors, rng_kept, running
from rlscuda.pruning.running.distortion import distortion
from rlscuda.pruning.surgery.plan import Surgery
from rlscuda.pruning.surgery.transaction import pruned_copy

SHARES = (0.25, 0.75)  # of a coupling's units, the cheapest, that are tried
SAMPLES = 64  # of either half that a trial is run on, or the first batch of more
_LEAST = 1e-3  # of a loss, that of a further share of the units, which chance may hide

# what a surgery leaves of the model takes of batches, beside what the model itself takes
Pairs = Callable[[Surgery, Iterable], Iterable[tuple[Any, Any]]]


class EveryOther:
    """The first, third, fifth ... batch of a loader, or the second, fourth, sixth ... ."""

    def __init__(self, loader: Iterable, first: int = 0):
        self._loader, self._first = loader, first

    def __iter__(self) -> Iterator[Any]:
        return islice(self._loader, self._first, None, 2)


def in_halves(loader: Iterable) -> tuple[Iterable, Iterable]:
    """Batches to fit by and others to judge by; all for either where there are less than four."""
    with torch.random.fork_rng(devices=[]):  # by which loaders shuffle
        count = sum(1 for _ in islice(loader, 4))
    if count < 4:
        return loader, loader
    return EveryOther(loader), EveryOther(loader, 1)


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
        pairs: Of a surgery and batches, each as the model, and as what is left of it, take it.
        calibrated: The matrices of a model by a loader; None where those of the search are of other
            samples.
        adapt_norms: Whether batch norms follow.
        progress: Called with what is done next.

    Returns:
        Those candidates with other costs, `distortion` of the output; as they are of a loader with
        one batch, and, with a warning, where outputs cannot be compared.
    """
    known, others = (_some(EveryOther(loader, first), search.model) for first in (0, 1))
    if not others:
        return candidates
    progress("measuring: calibrating on every other batch")
    model, matrices = search.model, search.matrices
    if calibrated is not None:
        matrices = calibrated(model, EveryOther(loader))
    how = search.compensate, search.settle, None, search.turned
    search = Search(model, search.structure, search.inputs, matrices, *how)
    trials = _Trials(search, candidates, known if adapt_norms else [], others, pairs)
    found = {}
    for name, one in candidates.items():
        progress(f"measuring {name}")
        counts = sorted({min(len(one.order), max(1, int(share * one.units))) for share in SHARES})
        try:
            losses = [trials.loss({name: count}) for count in counts if count]
        except ValueError as error:
            warnings.warn(
                f"couplings compete by what is foreseen of their costs, not by what is measured, "
                f"for without units of {name}: {error}",
                stacklevel=5,
            )
            return candidates
        found[name] = replace(one, cost=_costs(one.cost, counts, losses))
    return found


class _Trials:
    """What the network loses by cuts.

    Args:
        search: Cuts of it.
        candidates: The order of each coupling's units.
        known: Batches by which batch norms follow; none where they do not.
        others: Those that the loss is of.
        pairs: See `measured`.
    """

    def __init__(
        self,
        search: Search,
        candidates: Mapping[str, Candidate],
        known: list[Any],
        others: list[Any],
        pairs: Pairs,
    ):
        self._search, self._ladder = search, Ladder(candidates, "global")
        self._whole, self._pairs = isolated_copy(search.model), pairs
        self._known, self._others = known, others
        self._seen = Seen(search.model, known)

    def loss(self, counts: dict[str, int]) -> float:
        """The distortion of the output by a cut; infinite where it is no number."""
        cut = self._search.cut(self._ladder, counts)
        trial = pruned_copy(self._search.model, cut.surgery, self._search.compensated(cut)[0])
        if self._known:
            settle(self._seen, trial, cut.surgery.tensors, self._pairs(cut.surgery, self._known))
        with running("the pruned model fails on loader"):
            loss = distortion(self._whole, trial, self._pairs(cut.surgery, self._others))
        return loss if math.isfinite(loss) else math.inf


def _some(batches: Iterable, model: nn.Module) -> list[Any]:
    """Batches, until there are samples enough; drawn as whatever runs the model draws them."""
    found, samples = [], 0
    with rng_kept(model):
        for batch in batches:
            found.append(batch)
            samples += max((len(x) for x in output_tensors(batch) if x.dim()), default=1)
            if samples >= SAMPLES:
                break
    return found


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
