r"""What a branch is worth now: the loss with it, and without.

With independent gates of probabilities :math:`\theta` the expected loss is linear in each of them,
so that

.. math:: \partial E[\ell] / \partial \theta_l = E[\ell \mid \xi_l = 1] - E[\ell \mid \xi_l = 0]

and the difference of two losses, the other gates as drawn, is an unbiased estimate. The gradient of
the loss with respect to an open gate would be free, but says nothing: weights that have converged
cannot be scaled to advantage, so that it is close to 0 whatever the branch is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlscuda.pruning.gates.gate import Gate
from rlscuda.pruning.options import checked_loss
from rlscuda.pruning.running.calls import rng_kept

Closure = Callable[[], Tensor | float]


def differences(
    model: nn.Module, gates: Iterable[Gate], closure: Closure, drawn: float | None
) -> dict[Gate, float]:
    """The loss with a branch less that without it, of each gate, the others as they are.

    The model, its running statistics and the random state are as before; every forward sees the
    same random numbers.

    Args:
        model: The model.
        gates: Those asked for.
        closure: Gives the loss of a batch, by a forward.
        drawn: The loss with all gates as they are, where it is known.

    Raises:
        TypeError: The closure gives no number.
    """
    with torch.no_grad(), _kept(model):
        now = _value(model, closure) if drawn is None else drawn
        return {gate: _other(model, gate, closure, now) for gate in gates}


def _other(model: nn.Module, gate: Gate, closure: Closure, now: float) -> float:
    """The difference for a gate, given the loss as it is now."""
    gate.open = not gate.open
    try:
        turned = _value(model, closure)
    finally:
        gate.open = not gate.open
    return now - turned if gate.open else turned - now


def _value(model: nn.Module, closure: Closure) -> float:
    with rng_kept(model):
        return checked_loss(closure(), "closure")


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Leaves the buffers of a model, as running statistics, as they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
