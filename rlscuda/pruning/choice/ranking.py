"""In which order the units of a coupling would go, by an importance: small where a loss is cheap.

`saliency` reads the inverse autocorrelation matrices of the layers that take the channels, its
*consumers*; the others are the usual baselines and need none.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import BatchNorm
from rlscuda.closed_form import formulas
from rlscuda.closed_form.few_rows import FewRows
from rlscuda.closed_form.greedy import Consumer, greedy_path
from rlscuda.optim.kinds.modules import has_inputs_first, is_consumer
from rlscuda.pruning.attention.moments import product_consumers
from rlscuda.pruning.couplings import Coupling, Family, Structure
from rlscuda.pruning.matrices.calibration import Known
from rlscuda.pruning.matrices.layers import layer_of, layer_weight

_NO_MATRIX = "no layer that takes its channels has an inverse autocorrelation matrix"


@dataclass(frozen=True)
class Candidate:
    """The order in which the units of one coupling are removed.

    Attributes:
        order: int64 [k], the units, first the one that is removed first.
        cost: float64 [k], what each removal costs, in units that all couplings share.
        units: Units the coupling has, k or more.
        gone: Units that earlier prunings have removed.
    """

    order: Tensor
    cost: Tensor
    units: int
    gone: int = 0

    def removable(self, ratio: float, round_to: int) -> int:
        """Units to remove so that `ratio` of the original ones is gone.

        At least one stays, and a multiple of `round_to` where there are as many.
        """
        wanted = int(ratio * (self.units + self.gone) + 1e-9) - self.gone
        return self.rounded(wanted, round_to)

    def rounded(self, removed: int, round_to: int) -> int:
        """At most `removed` units, so many that a multiple of `round_to` stays."""
        kept = self.units - max(0, min(removed, len(self.order)))
        return self.units - min(self.units, max(1, -(-kept // round_to)) * round_to)


@dataclass(frozen=True)
class Subject:
    """What an importance looks at.

    Attributes:
        coupling: The channels.
        modules: The model's live modules, by qualified name.
        consumers: Those of its members whose matrix is known, see `Consumer`.
        generator: For what is random.
    """

    coupling: Coupling
    modules: Mapping[str, nn.Module]
    consumers: Sequence[Consumer]
    generator: torch.Generator


class Unscored(Exception):
    """An importance does not apply to a coupling; says why."""


def rank(
    structure: Structure,
    modules: Mapping[str, nn.Module],
    matrices: Known,
    importance: str,
    selection: str,
    gone: Mapping[str, int],
    seed: int,
    progress: Callable[[str], None],
    wanted: Container[str] | None = None,
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
        progress: Called with what is done next.
        wanted: The couplings that may lose units; all by default. Others, whose layers then may
            have no matrices, are candidates without an order.

    Returns:
        The candidates by coupling, and the couplings that the importance does not apply to, with
        the reason.
    """
    generator = torch.Generator().manual_seed(seed)
    energy = cache(lambda name: layer_energy(modules[name], matrices[name]))
    families: dict[str, list[Family]] = {}
    for family in structure.families:
        families.setdefault(family.coupling, []).append(family)
    candidates: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    for coupling in structure.couplings:
        progress(f"ranking {coupling.name}")
        # the energy of a layer that takes nothing else is the sum of what the removals cost
        summed = selection == "greedy" and feeds_one_layer(coupling, modules)
        summed = summed and coupling.name not in families
        consumers = consumers_of(
            coupling, modules, matrices, (lambda _: [1.0]) if summed else energy
        )
        consumers += product_consumers(
            families.get(coupling.name, []), coupling.units, modules, matrices
        )
        subject = Subject(coupling, modules, consumers, generator)
        try:
            if selection == "greedy":
                order, cost = _greedy(subject)
                cost = cost / cost.sum() if summed and cost.sum() > 0 else cost
            else:
                order, cost = _once(subject, importance)
        except Unscored as error:
            if wanted is None or coupling.name in wanted:
                refused[coupling.name] = str(error)
                continue
            order = cost = torch.empty(0)
        last = coupling.units - 1  # which stays
        candidates[coupling.name] = Candidate(
            order[:last], cost[:last], coupling.units, gone.get(coupling.name, 0)
        )
    return candidates, refused


def _greedy(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """All units, each the cheapest once those before it are gone."""
    if not subject.consumers:
        raise Unscored(_NO_MATRIX)
    path = greedy_path(subject.consumers, subject.coupling.units)
    return path.order, path.cost


def _once(subject: Subject, importance: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All units by their scores."""
    scores = IMPORTANCES[importance](subject).cpu()
    order = scores.argsort(stable=True)
    return order, scores[order]


def units_gone(original: dict[str, int], couplings: list[Coupling]) -> dict[str, int]:
    """Units that each coupling has lost since it was first seen, which is noted in `original`."""
    return {c.name: original.setdefault(c.name, c.units) - c.units for c in couplings}


def share_of(name: str, ratio: Mapping[str, float]) -> float:
    """That of the first pattern which matches, 0 where none does."""
    return next((float(share) for one, share in ratio.items() if fnmatchcase(name, one)), 0.0)


def targeted(couplings: Sequence[Coupling], value: Any) -> dict[str, Coupling]:
    """The couplings by name that a target of this value may cut: all, or those a mapping names."""
    every = {coupling.name: coupling for coupling in couplings}
    if not isinstance(value, Mapping):
        return every
    return {name: coupling for name, coupling in every.items() if share_of(name, value) > 0}


def layer_energy(module: Any, P: Tensor | FewRows) -> list[float]:
    """What losing all its inputs would cost a layer: the variance of its outputs, once a group."""
    inputs = torch.arange(layer_of(module).columns, device=P.device)
    parts = [formulas.output_energy(p, w, inputs) for p, w in zip(P, layer_weight(module, P))]
    return [sum(parts)] * len(parts)


def consumers_of(
    coupling: Coupling,
    modules: Mapping[str, Any],
    matrices: Known,
    energy: Callable[[str], list[float]],
) -> list[Consumer]:
    """The consumers of one coupling whose matrix is known, each in units of its output's energy.

    Args:
        coupling: The coupling.
        modules: The model's modules by name.
        matrices: Inverse autocorrelation matrices by layer.
        energy: Name of a layer -> its `layer_energy`.
    """
    found = []
    for member in coupling.members:
        if member.kind == "in" and member.name in matrices:
            module, P = modules[member.name], matrices[member.name]
            blocks = member.columns(module).to(P.device)
            for p, w, scale in zip(P, layer_weight(module, P), energy(member.name)):
                found.append(Consumer(p, w, blocks, 1 / scale if scale > 0 else 0.0))
    return found


def feeds_one_layer(coupling: Coupling, modules: Mapping[str, Any]) -> bool:
    """Whether one layer, ungrouped, takes the channels, and nothing but them."""
    consumers = [member for member in coupling.members if member.kind == "in"]
    if len(consumers) != 1:
        return False
    module = modules[consumers[0].name]
    if not is_consumer(module) or getattr(module, "groups", 1) > 1:
        return False
    return consumers[0].columns(module).numel() == layer_of(module).columns


def _filters(subject: Subject) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The weights that make each unit, or, of raw inputs, take it; with their gradients.

    Yields:
        [units, numel] float64 each.
    """
    members = subject.coupling.members
    producers = [m for m in members if m.kind == "out"]
    for member in producers or [m for m in members if m.kind == "in"]:
        module: Any = subject.modules.get(member.name)
        weight = getattr(module, "weight", None)
        if not is_consumer(module) or weight is None:
            continue
        axis = int((member.kind == "in") != has_inputs_first(module))
        if axis == 1 and getattr(module, "groups", 1) > 1:
            continue  # its units lie in all groups at once

        def rows(tensor: Tensor, axis: int = axis, indices: Tensor = member.indices) -> Tensor:
            return tensor.detach().double().movedim(axis, 0)[indices].flatten(1)

        yield rows(weight), None if weight.grad is None else rows(weight.grad)


def _over_filters(score: Callable[[Tensor], Tensor]) -> Callable[[Subject], Tensor]:
    def importance(subject: Subject) -> Tensor:
        scores = [score(weight) for weight, _ in _filters(subject)]
        if not scores:
            raise Unscored("no Linear or convolution makes its channels")
        return _sum_of_shares(scores)

    return importance


def _sum_of_shares(scores: Sequence[Tensor]) -> Tensor:
    """The sum of several scores [units], each in units of its mean."""
    return torch.stack([s / s.mean().clamp_min(torch.finfo(s.dtype).tiny) for s in scores]).sum(0)


def _taylor(subject: Subject) -> Tensor:
    parameters = (p for module in subject.modules.values() for p in module.parameters(False))
    if all(parameter.grad is None for parameter in parameters):
        raise ValueError("importance 'taylor' needs gradients: run backward over some batches and "
                         "do not clear them before pruning")  # fmt: skip
    scores = [
        (weight * grad).sum(1).square() for weight, grad in _filters(subject) if grad is not None
    ]
    if not scores:
        raise Unscored("no Linear or convolution that makes its channels has a gradient")
    return _sum_of_shares(scores)


def _norm_scale(subject: Subject) -> Tensor:
    scales = [
        module.weight.detach().double().abs()[member.indices].sum(1)
        for member in subject.coupling.members
        if isinstance(module := subject.modules.get(member.name), BatchNorm) and module.affine
    ]
    if not scales:
        raise Unscored("no batch norm scales its channels")
    return torch.stack(scales).sum(0)


def _random(subject: Subject) -> Tensor:
    return torch.rand(subject.coupling.units, generator=subject.generator, dtype=torch.float64)


def _saliency(subject: Subject) -> Tensor:
    if not subject.consumers:
        raise Unscored(_NO_MATRIX)
    scores = [c.weight * formulas.block_saliency(c.P, c.W, c.blocks) for c in subject.consumers]
    return torch.stack(scores).sum(0)


IMPORTANCES: dict[str, Callable[[Subject], Tensor]] = {
    "saliency": _saliency,
    "l1": _over_filters(lambda weight: weight.abs().sum(1)),
    "l2": _over_filters(lambda weight: weight.square().sum(1).sqrt()),
    "taylor": _taylor,
    "bn_scale": _norm_scale,
    "random": _random,
}
WITHOUT_MATRIX = tuple(name for name in IMPORTANCES if name != "saliency")
