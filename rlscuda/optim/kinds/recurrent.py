"""Recurrent modules: their weights, and the input rows of each that a call shows.

A call of `nn.RNN`, `nn.GRU` or `nn.LSTM` runs its layers and time steps out of sight. Its input is
that of the first layer's `weight_ih`; the hidden states it returns are, a step later, the input of
the last layer's `weight_hh`. A cell shows both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM, *CELLS)


def weights_of(module: Any) -> list[str]:
    """The names of a module's weights, those of one input side by side."""
    if isinstance(module, CELLS):
        return ["weight_ih", "weight_hh"]
    kinds = ("ih", "hh", "hr")[: 3 if module.proj_size else 2]
    ways = ("", "_reverse")[: 1 + module.bidirectional]
    return [f"weight_{k}_l{i}{w}" for i in range(module.num_layers) for k in kinds for w in ways]


def hides(module: Any, weight: str) -> bool:
    """Whether the input of a weight stays inside of the call."""
    if isinstance(module, CELLS):
        return False
    kind, layer = weight.split("_")[1:3]
    return layer != {"ih": "l0", "hh": f"l{module.num_layers - 1}"}.get(kind)


def input_of(module: Any, weight: str, args: tuple, named: dict[str, Any], output: Any) -> Tensor:
    """The input rows of a weight in a call [..., n], before its n as the module's input has them.

    Those of a packed input are [rows, n], in any order.

    Args:
        module: The module.
        weight: The name of one of its weights that `hides` nothing.
        args: What it was called with.
        named: Likewise, by name.
        output: What it returned.
    """
    given = {**dict(zip(("input", "hx"), args)), **named}
    x, state = given["input"], given.get("hx")
    if "_ih" in weight:
        return x.data if isinstance(x, PackedSequence) else x
    if state is not None and not isinstance(state, Tensor):
        state = state[0]  # of (h, c)
    if isinstance(module, CELLS):
        hidden = output if isinstance(output, Tensor) else output[0]
        return torch.zeros_like(hidden) if state is None else state
    back, ways = weight.endswith("_reverse"), 1 + module.bidirectional
    steps = output[0].data.detach().chunk(ways, -1)[back]
    first = None if state is None else state.detach()[back - ways]
    if isinstance(x, PackedSequence):
        return _packed_before(steps, first, x.batch_sizes.tolist(), back)
    time = 1 if module.batch_first and x.dim() == 3 else 0
    first = torch.zeros_like(steps.select(time, 0)) if first is None else first
    length, first = steps.shape[time] - 1, first.unsqueeze(time)
    parts = (
        (steps.narrow(time, 1, length), first) if back else (first, steps.narrow(time, 0, length))
    )
    return torch.cat(parts, time)


def _packed_before(steps: Tensor, first: Tensor | None, sizes: list[int], back: bool) -> Tensor:
    """The hidden states [rows, h] before each of packed ones, in any order."""
    first = steps.new_zeros(sizes[0], steps.shape[1]) if first is None else first
    if back:
        return torch.cat((first, steps[sizes[0] :]))
    going_on = [part[:size] for part, size in zip(steps.split(sizes), sizes[1:])]
    return torch.cat((first, *going_on))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a call returned."""
    if isinstance(output, Tensor):
        return [output]
    parts = output if isinstance(output, tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
