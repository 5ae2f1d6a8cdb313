"""The moves of the weights of many layers, along products or directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.optim.forms import NORMALISED
from rlscuda.optim.moves import Move
from rlscuda.optim.ranks.shards import local

_complete_products = torch.ops.rlscuda.foreach_complete_products_.default
_weight_step = torch.ops.rlscuda.foreach_weight_step_.default


def complete_products(
    chunk: list[Move],
    biases: list[Tensor],
    bias_gradients: list[Tensor],
    bias_rows: list[Tensor],
) -> Tensor:
    """Adds to every product the bias' part that it lacks.

    Returns:
        The norms of the products and of the weights with their biases [2, matrices], each of all
        rows of a matrix.
    """
    norms = _complete_products(
        [move.product for move in chunk], [move.weight for move in chunk], biases, bias_rows,
        bias_gradients, [move.layer.groups for move in chunk],
    )  # fmt: skip
    shard = chunk[0].shard
    if shard is None:
        return norms
    squares = norms.square_()
    shard.sum(squares)
    return squares.sqrt_()


def move_weights(
    chunk: list[Move],
    group: dict[str, Any],
    h: Tensor,
    biases: list[Tensor],
    bias_gradients: list[Tensor],
    bias_rows: list[Tensor],
    norms: Tensor | None,
) -> None:
    """Everything of the weight updates that follows the products, in one fused pass.

    Args:
        chunk: The layers.
        group: Their parameter group.
        h: Of each matrix in turn, not finite where nothing may move.
        biases: Those in `P`, empty tensors where there are none.
        bias_gradients: Likewise.
        bias_rows: What `products` returned; empty tensors where they are complete.
        norms: What `complete_products` returned, where the trust ratio is to hold.
    """
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
    here = [i for i, move in enumerate(chunk) if move.outputs]  # not all rows on other processes
    if len(here) < len(chunk):
        if not here:
            return
        chunk = [chunk[i] for i in here]
        biases, bias_rows, bias_gradients = (
            [some[i] for i in here] for some in (biases, bias_rows, bias_gradients)
        )
        first, h = [first[i] for i in here] if first else [], h[here]
        norms = None if norms is None else norms[:, here]
    states = [move.state for move in chunk]
    _weight_step(
        [move.weight for move in chunk], biases, [move.product for move in chunk],
        [move.grad for move in chunk] if adaptive else [], bias_rows, bias_gradients, h,
        [move.layer.groups for move in chunk], first,
        [state["second_moment"] for state in states] if adaptive else [],
        [state["health"] for state in states], rate, norms, lr,
        0.0 if spectral else group["momentum"], group["beta2"], group["weight_decay"], group["eps"],
        # P is still far from the input's statistics while its gain is large: warm up with it
        group["gain"] if group["form"] in NORMALISED else 0.0,
        group["trust_ratio"] * (1 - group["momentum"]),  # which momentum sums up
        group["form"] == "paper",
    )  # fmt: skip


def biases_of(chunk: list[Move], P: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The biases in `P` and their gradients, empty tensors where there are none."""
    none = P.new_empty(0)
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
