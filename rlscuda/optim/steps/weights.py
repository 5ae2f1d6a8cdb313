"""The moves of the weights of many layers, along products or directions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import foreach_norm
from rlscuda.optim.forms import NORMALISED
from rlscuda.optim.moves import Move
from rlscuda.optim.ranks.shards import local

_weight_step = torch.ops.rlscuda.foreach_weight_step_.default


def move_weights(
    chunk: list[Move],
    group: dict[str, Any],
    h: Tensor,
    biases: list[Tensor],
    bias_gradients: list[Tensor],
    bias_rows: list[Tensor],
) -> None:
    """Everything of the weight updates that follows the products, in one fused pass."""
    states = [move.state for move in chunk]
    adaptive, spectral = (group["form"] == form for form in ("adaptive", "spectral"))
    first: list[Tensor] = []
    if adaptive:
        first = [state["first_moment"] for state in states]
    elif spectral:
        pass  # its direction is of the momentum already
    elif any("momentum_buffer" in state for state in states):
        first = [state["momentum_buffer"] for state in states]
    lr, rate = 1.0, None
    if isinstance(group["lr"], Tensor) and group["lr"].is_cuda and h.is_cuda:
        rate = group["lr"].to(h.device, torch.float32)  # read there, so that a graph follows it
    else:
        lr = float(group["lr"])
    divide_by_h = group["form"] == "paper"
    if group["trust_ratio"] < math.inf:
        _complete(chunk, bias_rows, bias_gradients)
        bias_rows = [h[:0]] * len(chunk)
        h = h if divide_by_h else torch.where(h.isfinite(), 1.0, h)
        longest = group["trust_ratio"] * (1 - group["momentum"])  # which momentum sums up
        h = _shortened(chunk, h, biases, (lr if rate is None else rate) / longest)
        divide_by_h = True
    here = [i for i, move in enumerate(chunk) if move.outputs]  # not all rows on other processes
    if len(here) < len(chunk):
        if not here:
            return
        chunk = [chunk[i] for i in here]
        biases, bias_rows, bias_gradients = (
            [some[i] for i in here] for some in (biases, bias_rows, bias_gradients)
        )
        first, h = [first[i] for i in here] if first else [], h[here]
    states = [move.state for move in chunk]
    _weight_step(
        [move.weight for move in chunk], biases, [move.product for move in chunk],
        [move.grad for move in chunk] if adaptive else [], bias_rows, bias_gradients, h,
        [move.layer.groups for move in chunk], first,
        [state["second_moment"] for state in states] if adaptive else [],
        [state["health"] for state in states], rate, lr, 0.0 if spectral else group["momentum"],
        group["beta2"], group["weight_decay"], group["eps"],
        # P is still far from the input's statistics while its gain is large: warm up with it
        group["gain"] if group["form"] in NORMALISED else 0.0, divide_by_h,
    )  # fmt: skip


def _complete(chunk: list[Move], bias_rows: list[Tensor], bias_gradients: list[Tensor]) -> None:
    """Adds to every product the bias' part that it lacks."""
    for move, row, gradient in zip(chunk, bias_rows, bias_gradients):
        if row.numel():
            product = move.product.view(move.layer.groups, -1, move.layer.fan_in)
            column = gradient.to(row.dtype).view(move.layer.groups, -1, 1)
            product.addcmul_(column, row.view(move.layer.groups, 1, -1))


def _shortened(chunk: list[Move], h: Tensor, biases: list[Tensor], rate: float | Tensor) -> Tensor:
    """h, larger where rate |D| / h would exceed the norm of a weight that is not zero.

    Norms are those of each matrix in turn: of the weight's rows with their biases.
    """
    products = [move.product for move in chunk]
    weights = [move.weight.detach() for move in chunk]
    groups = [move.layer.groups for move in chunk]
    tensors = products + weights + [bias.detach() for bias in biases]
    if max(groups) == 1:
        norms = torch.stack(foreach_norm(tensors, 2, h.dtype))
    else:
        parts = [t.reshape(n, t.numel() // n) for t, n in zip(tensors, 3 * groups)]
        norms = torch.cat([torch.linalg.vector_norm(p, dim=1, dtype=h.dtype) for p in parts])
    step, weight, bias = _of_all_rows(chunk, norms.view(3, -1))
    size = torch.hypot(weight, bias)
    return torch.where(size > 0, torch.maximum(h, rate * step / size), h)


def _of_all_rows(chunk: list[Move], norms: Tensor) -> Tensor:
    """Norms [3, matrices] of whole matrices, of those of the rows that are here."""
    if chunk[0].shard is None:
        return norms
    squares = norms.square()
    chunk[0].shard.sum(squares)
    return squares.sqrt()


def biases_of(chunk: list[Move], h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The biases in `P` and their gradients, empty tensors where there are none."""
    none = h[:0]
    biases: list[Tensor] = []
    gradients: list[Tensor] = []
    for move in chunk:
        bias: nn.Parameter | None = move.layer.bias_parameter if move.layer.bias else None
        if bias is None:
            biases.append(none)
            gradients.append(none)
        elif bias.grad is None or not move.moves_bias:  # since it was frozen or taken out
            biases.append(local(bias).detach().clone())
            gradients.append(torch.zeros_like(biases[-1]))
        else:
            biases.append(local(bias))
            gradients.append(local(bias.grad))
    return biases, gradients
