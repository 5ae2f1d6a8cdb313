"""One step of many layers: an operator call for all of them, and a matrix product for each.

paper     D = G P_old, then P moves, then W along D / h
natural   P moves, then W along D = G P_new
adaptive  likewise, D normalised by row
spectral  P moves, then W along the direction that G's momentum has in the metric of P
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import foreach_copy_, foreach_norm
from rlscuda.optim.forms import NORMALISED
from rlscuda.optim.layers import Layer, normalised
from rlscuda.optim.spectral import write_directions
from rlscuda.optim.staging import Factors, Summary

_nonfinite = torch.ops.rlscuda.nonfinite.default
_rls_update = torch.ops.rlscuda.foreach_rls_update_.default
_weight_step = torch.ops.rlscuda.foreach_weight_step_.default

# Bytes of products that wait for their weight step: what a cache holds, or what fills a GPU.
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}

Workspace = dict[tuple[str, torch.dtype, torch.device], Tensor]


@dataclass(eq=False)
class Move:
    """One layer about to move.

    Attributes:
        layer: The layer.
        group: Its parameter group.
        state: Its state.
        summary: What is staged of its input, or None.
        factors: The factors of its gradient, where they were kept and still hold all of it.
        moves_bias: Whether its bias, if in `P`, is still in a group.
        weight: Its weight as the operators take it.
        grad: Its gradient as [c, n], contiguous, of the dtype of `P`.
        product: Where the product goes [c, fan_in].
        projected: X P [N, fan_in] for the factored product.
    """

    layer: Layer
    group: dict[str, Any]
    state: dict[str, Any]
    summary: Summary | None
    factors: Factors | None
    moves_bias: bool
    weight: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    product: Tensor = field(init=False)
    projected: Tensor | None = None

    def __post_init__(self):
        weight = self.layer.weight
        assert weight.grad is not None
        self.weight = self.layer.plane_weight
        self.grad = self.layer.as_rows(weight.grad)
        if self.factors is not None and (
            self.summary is None
            or self.group["form"] == "spectral"  # whose product is of the momentum
            or not self.moves_bias
            or not self.factors.agree(self.layer, self.grad)
        ):
            self.factors = None

    @property
    def rows(self) -> Tensor:
        """The summary [groups, r, fan_in] in the dtype of `P`; r = 0 where nothing is staged."""
        P, layer = self.state["P"], self.layer
        if self.summary is None:
            return P.new_empty(layer.groups, 0, layer.fan_in)
        return self.summary.rows.to(P.dtype)


def buffer(workspace: Workspace, name: str, P: Tensor, numel: int) -> Tensor:
    """`numel` uninitialised elements like those of P, from memory that every step reuses."""
    kept = workspace.get((name, P.dtype, P.device))
    if kept is None or kept.numel() < numel:
        kept = workspace[name, P.dtype, P.device] = P.new_empty(numel)
    return kept[:numel]


def step_layers(moves: list[Move], workspace: Workspace) -> None:
    """Updates the matrix of every layer and moves its weight; a non-finite gradient voids it all.

    Args:
        moves: The layers.
        workspace: Memory kept from step to step.
    """
    found_inf = _found_inf(moves)
    batches: dict[tuple, list[Move]] = {}
    for move in moves:
        P, weight = move.state["P"], move.layer.weight
        key = (id(move.group), P.dtype, weight.dtype, P.device, move.layer.blocks > 1)
        batches.setdefault(key, []).append(move)
    for batch in batches.values():
        for chunk in _chunks(batch):
            P = chunk[0].state["P"]
            _step_chunk(chunk, found_inf.get(P.device), workspace)


def _found_inf(moves: list[Move]) -> dict[torch.device, Tensor]:
    """One bool a device: whether any gradient is not finite; where factors agree, theirs is."""
    gradients: dict[torch.device, list[Tensor]] = {}
    for move in moves:
        if move.factors is None:
            given = [p.grad for p in move.layer.parameters() if p.grad is not None]
            gradients.setdefault(move.layer.weight.device, []).extend(given)
    flags = {device: _nonfinite(tensors) for device, tensors in gradients.items()}
    if len(flags) > 1:
        first = next(iter(flags))
        anywhere = torch.stack([flag.to(first, non_blocking=True) for flag in flags.values()]).any()
        flags = {device: anywhere.to(device, non_blocking=True) for device in flags}
    return flags


def _chunks(batch: list[Move]) -> Iterator[list[Move]]:
    """Parts of a batch whose products fit the workspace together."""
    limit = _CHUNK_BYTES.get(batch[0].layer.weight.device.type, 0)
    together: dict[int, list[Move]] = {}  # layers that share a P step with it
    for move in batch:
        together.setdefault(id(move.state["P"]), []).append(move)
    chunk: list[Move] = []
    used = 0
    for moves in together.values():
        elements = sum(move.layer.outputs * move.layer.fan_in for move in moves)
        size = elements * moves[0].state["P"].element_size()
        if chunk and used + size > limit:
            yield chunk
            chunk, used = [], 0
        chunk += moves
        used += size
    yield chunk


def _first(chunk: list[Move]) -> dict[int, Move]:
    """The first layer of each `P`, which speaks for those that share it, by the id of that."""
    first: dict[int, Move] = {}
    for move in chunk:
        first.setdefault(id(move.state["P"]), move)
    return first


def _step_chunk(chunk: list[Move], found_inf: Tensor | None, workspace: Workspace) -> None:
    """The step of layers of one group, dtype and device."""
    group, P = chunk[0].group, chunk[0].state["P"]
    form = group["form"]
    _prepare(chunk, workspace)
    if form == "paper":  # its product is with the P of before the update
        bias_rows = _products(chunk, P, copy=True)
    h = _update_matrices(chunk, group, found_inf)
    biases, bias_gradients = _biases(chunk, h)
    if form == "spectral":
        bias_rows = [h[:0]] * len(chunk)
        write_directions(chunk, bias_gradients, h, group)
    elif form != "paper":
        bias_rows = _products(chunk, P, copy=False)
    _move_weights(chunk, group, h, biases, bias_gradients, bias_rows)


def _prepare(chunk: list[Move], workspace: Workspace) -> None:
    """Gives every move its gradient in the dtype of `P`, and its product a place."""
    P = chunk[0].state["P"]
    shapes = [(move.layer.outputs, move.layer.fan_in) for move in chunk]
    products = buffer(workspace, "product", P, sum(rows * n for rows, n in shapes))
    start = 0
    for move, (rows, n) in zip(chunk, shapes):
        move.product = products[start : start + rows * n].view(rows, n)
        start += rows * n
    converted = [m for m in chunk if m.grad.dtype != P.dtype or not m.grad.is_contiguous()]
    if converted:
        copies = [torch.empty_like(m.grad, dtype=P.dtype, memory_format=torch.contiguous_format)
                  for m in converted]  # fmt: skip
        foreach_copy_(copies, [m.grad for m in converted])
        for move, copy in zip(converted, copies):
            move.grad = copy
    first = _first(chunk)
    for move in first.values():
        if move.factors is not None and move.layer.blocks == 1:
            move.projected = _project(move.layer, move.state["P"], move.factors.x, workspace)
    for move in chunk:
        if move.factors is not None:  # shown the same rows
            move.projected = first[id(move.state["P"])].projected


def _project(layer: Layer, P: Tensor, X: Tensor, workspace: Workspace) -> Tensor:
    """X P [N, fan_in] of the input rows, a bias' column of ones included."""
    name = f"projected {id(layer)}"  # several wait at once
    out = buffer(workspace, name, P, len(X) * layer.fan_in).view(len(X), layer.fan_in)
    if layer.bias:
        return torch.addmm(P[-1], X, P[:-1], out=out)
    return torch.mm(X, P, out=out)


def _products(chunk: list[Move], P: Tensor, copy: bool) -> list[Tensor]:
    """Writes every product G P, without a bias' part unless it goes through the factors.

    Returns:
        For each layer the row of `P` [n] or [groups, n] that the bias' part takes, an empty tensor
        where it takes none; copies, if `P` is still to change.
    """
    none = P.new_empty(0)
    bias_rows = [none] * len(chunk)
    for i, move in enumerate(chunk):
        layer, matrix = move.layer, move.state["P"]
        if move.factors is not None:
            projected = move.projected
            if projected is None:  # by the P of now
                x = move.factors.x
                projected = P.new_empty(len(x), layer.fan_in)
                layer.multiply(x, matrix, out=projected)
                if layer.bias:
                    projected += layer.bias_row(matrix)
            torch.mm(move.factors.delta.t(), projected, out=move.product)
            continue
        layer.multiply(move.grad, matrix, out=move.product)
        if layer.bias:
            bias_rows[i] = layer.bias_row(matrix)
    if not copy or all(row is none for row in bias_rows):
        return bias_rows
    copies = torch.cat([row.flatten() for row in bias_rows]).split([r.numel() for r in bias_rows])
    return [part.view(row.shape) for part, row in zip(copies, bias_rows)]


def _update_matrices(chunk: list[Move], group: dict[str, Any], found_inf: Tensor | None) -> Tensor:
    """Updates every `P`; returns h of each group in turn, NaN where its weight may not move."""
    first = _first(chunk)
    moves = list(first.values())
    layers, states = [move.layer for move in moves], [move.state for move in moves]
    projection, projected, inputs = _projections(moves, group)
    shrinkage, blocked, rows = group["shrinkage"], layers[0].blocks > 1, [m.rows for m in moves]
    powers = [state["power"] for state in states] if "power" in states[0] else []
    if blocked and powers:  # the operator takes one a matrix: here all blocks of a group share it
        rows = [
            normalised(r, state["power"], state["health"], group["gain"], found_inf)
            for r, state in zip(rows, states)
        ]
        powers = []
    h = _rls_update(
        [state["P"] for state in states], [layer.split(r) for layer, r in zip(layers, rows)],
        powers, [state["health"] for state in states], found_inf, projection, projected, inputs,
        group["forgetting"], group["gain"], 1 - shrinkage, shrinkage * group["initial_scale"],
        group["drift"] or 0.0, group["initial_scale"], group["form"] in NORMALISED,
    )  # fmt: skip
    if not blocked and len(moves) == len(chunk):
        return h
    parts = list(h.split([layer.groups * layer.blocks for layer in layers]))
    if blocked:  # lambda + kappa s P s of the whole row: every block has added its part to lambda
        least = group["forgetting"]
        parts = [(p - least).view(one.groups, -1).sum(1) + least for p, one in zip(parts, layers)]
    own = dict(zip(first, parts))
    return torch.cat([own[id(move.state["P"])] for move in chunk])


def _projections(
    chunk: list[Move], group: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the update may use of rows X P known already, and what it turns into rows X P_new.

    Returns:
        S P where the summary is the mean of X; X P; X. No tensors at all without factors, and empty
        ones for a layer without.
    """
    none = chunk[0].product[:0]
    mean = group["summary"] == "mean" and group["rank"] == 1
    turns = group["form"] != "paper"
    if all(move.factors is None for move in chunk):
        return [], [], []
    parts = [
        (
            move.projected.mean(0, keepdim=True) if mean else none,
            move.projected if turns else none,
            move.factors.x if turns else none,
        )
        if move.factors is not None and move.projected is not None
        else (none, none, none)
        for move in chunk
    ]
    projection, projected, inputs = (list(part) for part in zip(*parts))
    return projection, projected, inputs


def _move_weights(
    chunk: list[Move],
    group: dict[str, Any],
    h: Tensor,
    biases: list[Tensor],
    bias_gradients: list[Tensor],
    bias_rows: list[Tensor],
) -> None:
    """Everything of the weight updates that follows the products, in one fused pass."""
    layers, states = [move.layer for move in chunk], [move.state for move in chunk]
    adaptive, spectral = (group["form"] == form for form in ("adaptive", "spectral"))
    first: list[Tensor] = []
    if adaptive:
        first = [state["first_moment"] for state in states]
    elif spectral:
        pass  # its direction is of the momentum already
    elif group["momentum"] or any("momentum_buffer" in state for state in states):
        for move, state in zip(chunk, states):
            if "momentum_buffer" not in state:  # a scheduler turned momentum on
                state["momentum_buffer"] = torch.zeros_like(move.product)
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
    _weight_step(
        [move.weight for move in chunk], biases, [move.product for move in chunk],
        [move.grad for move in chunk] if adaptive else [], bias_rows, bias_gradients, h,
        [layer.groups for layer in layers], first,
        [state["second_moment"] for state in states] if adaptive else [],
        [state["health"] for state in states], rate, lr, 0.0 if spectral else group["momentum"],
        group["beta2"], group["weight_decay"], group["eps"],
        # P is still far from the input's statistics while its gain is large: warm up with it
        group["gain"] if adaptive or spectral else 0.0, divide_by_h,
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
    weights = [move.layer.weight.detach() for move in chunk]
    groups = [move.layer.groups for move in chunk]
    tensors = products + weights + [bias.detach() for bias in biases]
    if max(groups) == 1:
        norms = torch.stack(foreach_norm(tensors, 2, h.dtype))
    else:
        parts = [t.reshape(n, t.numel() // n) for t, n in zip(tensors, 3 * groups)]
        norms = torch.cat([torch.linalg.vector_norm(p, dim=1, dtype=h.dtype) for p in parts])
    step, weight, bias = norms.view(3, -1)
    size = torch.hypot(weight, bias)
    return torch.where(size > 0, torch.maximum(h, rate * step / size), h)


def _biases(chunk: list[Move], h: Tensor) -> tuple[list[Tensor], list[Tensor]]:
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
            biases.append(bias.detach().clone())
            gradients.append(torch.zeros_like(biases[-1]))
        else:
            biases.append(bias)
            gradients.append(bias.grad)
    return biases, gradients
