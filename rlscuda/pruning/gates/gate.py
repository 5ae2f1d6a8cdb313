"""One gate: a residual branch whose modules run, or are passed by, as a draw has it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from rlscuda._torch import call_instead, called_as_itself
from rlscuda.pruning.blocks.finding import Block


class Gate:
    """The gate of one branch; while it is closed no module of the branch is called.

    What its stand-ins compute instead is what the model computes without the branch, so that a
    closed branch costs nothing, has no gradient, and shows no hook an input: its `P`, moments and
    statistics stay as they are. In eval mode a gate is open where its probability is above one
    half. Copies and pickles of the model have no gates.

    Args:
        block: The branch.
        price: What it must lower the loss by, in the units of the loss.
        theta: Probability that it is open.

    Attributes:
        open: As drawn for training.
        calls: Of the branch's modules since the last draw, whether it was open or not.
        below: Steps in a row that theta was close to 0.
        worth: What the branch lowers the loss by, a moving average.
    """

    def __init__(self, block: Block, price: float, theta: float):
        self.block, self.price, self.theta = block, price, theta
        self.open, self.calls, self.below, self.worth = True, 0, 0, 0.0

    @property
    def name(self) -> str:
        """That of the branch."""
        return self.block.name

    @property
    def decided(self) -> bool:
        """Whether the branch is kept where nothing is drawn any more."""
        return self.theta > 0.5


class Switch:
    """What is called instead of a module of a branch.

    Args:
        gate: Of the branch.
        name: Of the module.
        model: Of which the mode says whether a draw or the decision counts.
    """

    def __init__(self, gate: Gate, name: str, model: nn.Module):
        self._gate, self._stand_in = gate, gate.block.stand_ins[name]
        module = model.get_submodule(name)
        self._module, self._model = weakref.ref(module), weakref.ref(model)
        call_instead(module, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, or its stand-in's."""
        module, model, gate = self._module(), self._model(), self._gate
        assert module is not None
        gate.calls += 1
        if gate.open if model is not None and model.training else gate.decided:
            return called_as_itself(module, *args, **kwargs)
        return self._stand_in(*args, **kwargs)

    def remove(self) -> None:
        """Lets the module be called as ever."""
        module = self._module()
        if module is not None:
            call_instead(module, None)
