"""Importances: one number for each unit of a coupling, small where its loss is cheap.

`saliency` and its diagonal read the inverse autocorrelation matrix; the products of weights and
matrix entries are variants in the spirit of the RLS papers, whose own score was not published in
full; the others are the usual baselines and need no matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlscuda.closed_form import formulas as algebra
from rlscuda.closed_form.formulas import Consumer
from rlscuda.pruning.structure.trace import Coupling

_NORMS = (nn.modules.batchnorm._BatchNorm,)


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


def _over_consumers(score: Callable[[Consumer], Tensor]) -> Callable[[Subject], Tensor]:
    def importance(subject: Subject) -> Tensor:
        if not subject.consumers:
            raise Unscored("no layer that takes its channels has an inverse autocorrelation matrix")
        return torch.stack([c.weight * score(c) for c in subject.consumers]).sum(0)

    return importance


def _columns(consumer: Consumer, values: Tensor) -> Tensor:
    """Sums values [n] of columns over each unit's block: [units]."""
    return values[consumer.blocks].sum(-1)


def _magnitudes(consumer: Consumer) -> tuple[Tensor, Tensor]:
    """The sums of |W| over the outputs [n], and the diagonal of P [n]."""
    return consumer.W.abs().sum(0), consumer.P.diagonal()


def _weight_times_p(consumer: Consumer) -> Tensor:
    magnitude, diagonal = _magnitudes(consumer)
    return _columns(consumer, magnitude * diagonal)


def _weight_over_p(consumer: Consumer) -> Tensor:
    magnitude, diagonal = _magnitudes(consumer)
    return _columns(consumer, magnitude / diagonal)


def _filters(subject: Subject) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The weights that make each unit, or, of raw inputs, take it; with their gradients.

    Yields:
        [units, numel] float64 each.
    """
    members = subject.coupling.members
    producers = [m for m in members if m.kind == "out"]
    for member in producers or [m for m in members if m.kind == "in"]:
        module = subject.modules.get(member.name)
        weight = getattr(module, "weight", None)
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or weight is None:
            continue
        axis = int((member.kind == "in") != bool(getattr(module, "transposed", False)))
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
        if isinstance(module := subject.modules.get(member.name), _NORMS) and module.affine
    ]
    if not scales:
        raise Unscored("no batch norm scales its channels")
    return torch.stack(scales).sum(0)


def _random(subject: Subject) -> Tensor:
    return torch.rand(subject.coupling.units, generator=subject.generator, dtype=torch.float64)


IMPORTANCES: dict[str, Callable[[Subject], Tensor]] = {
    "saliency": _over_consumers(lambda c: algebra.block_saliency(c.P, c.W, c.blocks)),
    "saliency_diagonal": _over_consumers(lambda c: algebra.diagonal_saliency(c.P, c.W, c.blocks)),
    "weight_times_p": _over_consumers(_weight_times_p),
    "weight_over_p": _over_consumers(_weight_over_p),
    "l1": _over_filters(lambda weight: weight.abs().sum(1)),
    "l2": _over_filters(lambda weight: weight.square().sum(1).sqrt()),
    "taylor": _taylor,
    "bn_scale": _norm_scale,
    "random": _random,
}
WITHOUT_MATRIX = ("l1", "l2", "taylor", "bn_scale", "random")
