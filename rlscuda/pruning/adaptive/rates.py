"""What a loss of the layers that take channels is worth at the network's output.

Removing channels is foreseen by how much the layers that take them lose, a share of each layer's
output; removing a block is measured at the network's output. Layers differ tenfold in how much of
their loss is seen there, so channels are put on one list with blocks by an exchange rate each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from rlscuda.pruning.choice.ranking import Candidate
from rlscuda.pruning.choice.targets import compensate_layers, lost_columns
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.matrices.calibration import Matrices
from rlscuda.pruning.running.batch_norms import settle
from rlscuda.pruning.running.calls import twice
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.transaction import pruned_copy

_SHARE = 0.25  # of a coupling's units, the cheapest, that are tried
_LEAST = 1e-3  # rate, for no coupling's units are all free because some are


def exchange_rates(
    structure: Structure,
    candidates: Mapping[str, Candidate],
    matrices: Matrices,
    loss: Callable[[nn.Module], float],
    loader: Iterable,
) -> dict[str, float]:
    """What the network loses without the cheapest quarter of each coupling, over what was foreseen.

    Args:
        structure: The couplings of the model; it is only read.
        candidates: The order of their units, and what the layers lose by each.
        matrices: Inverse autocorrelation matrices, by which the remaining weights make up for it.
        loss: Of a model, 0 of the whole one.
        loader: Batches by which batch norms follow.

    Returns:
        A rate >= 1e-3 by coupling; of those without a cost to compare with, none.
    """
    model, rates = structure.model, {}
    modules = dict(model.named_modules())
    for name, one in candidates.items():
        count = min(len(one.order), max(1, int(_SHARE * one.units)))
        foreseen = float(one.cost[:count].sum())
        if not foreseen > 0:
            continue
        removed = {name: one.order[:count].tolist()}
        surgery = plan(structure, removed)
        lost = lost_columns(structure.couplings, modules, removed)
        values, _ = compensate_layers(model, matrices, lost)
        trial = pruned_copy(model, surgery, values)
        settle(model, trial, surgery.tensors, twice(loader))
        rates[name] = max(_LEAST, loss(trial) / foreseen)
    return rates
