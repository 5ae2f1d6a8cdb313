"""The order in which each coupling's units would go, by an importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import nn

from rlscuda.closed_form import formulas as algebra
from rlscuda.pruning.choice.consumers import (
    Matrices,
    consumers_of,
    feeds_one_layer,
    output_energy,
)
from rlscuda.pruning.choice.importances import IMPORTANCES, Subject, Unscored
from rlscuda.pruning.choice.ladder import Candidate
from rlscuda.pruning.structure.trace import Coupling, Structure


def rank(
    structure: Structure,
    modules: Mapping[str, nn.Module],
    matrices: Matrices,
    importance: str,
    selection: str,
    gone: Mapping[str, int],
    seed: int,
    progress: Callable[[str], None],
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Ranks the units of every coupling.

    Args:
        structure: The couplings.
        modules: The model's modules by name.
        matrices: Inverse autocorrelation matrices by layer.
        importance: A name in `IMPORTANCES`.
        selection: `greedy` or `one-shot`.
        gone: Units that each coupling has lost before.
        seed: Of random importances.
        progress: Called with the name of each coupling before it is ranked.

    Returns:
        The candidates by coupling, and the couplings that the importance does not apply to, with
        the reason.
    """
    generator = torch.Generator().manual_seed(seed)
    energy = cache(lambda name: output_energy(modules[name], matrices[name]))
    candidates: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    for coupling in structure.couplings:
        progress(coupling.name)
        # the energy of a layer that takes nothing else is the sum of what the removals cost
        summed = selection == "greedy" and feeds_one_layer(coupling, modules)
        consumers = consumers_of(
            coupling, modules, matrices, (lambda _: [1.0]) if summed else energy
        )
        subject = Subject(coupling, modules, consumers, generator)
        try:
            if selection == "greedy":
                order, cost = _greedy(subject)
                cost = cost / cost.sum() if summed and cost.sum() > 0 else cost
            else:
                order, cost = _once(subject, importance)
        except Unscored as error:
            refused[coupling.name] = str(error)
            continue
        last = coupling.units - 1  # which stays
        candidates[coupling.name] = Candidate(
            order[:last], cost[:last], coupling.units, gone.get(coupling.name, 0)
        )
    return candidates, refused


def _greedy(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """All units, each the cheapest once those before it are gone."""
    if not subject.consumers:
        raise Unscored("no layer that takes its channels has an inverse autocorrelation matrix")
    path = algebra.greedy_path(subject.consumers, subject.coupling.units)
    return path.order, path.cost


def _once(subject: Subject, importance: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All units by their scores."""
    scores = IMPORTANCES[importance](subject).cpu()
    order = scores.argsort(stable=True)
    return order, scores[order]


def units_gone(original: dict[str, int], couplings: list[Coupling]) -> dict[str, int]:
    """Units that each coupling has lost since it was first seen, which is noted in `original`."""
    return {c.name: original.setdefault(c.name, c.units) - c.units for c in couplings}
