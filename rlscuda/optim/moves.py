"""A layer about to move: what a step has of it, and the memory that steps reuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlscuda._torch import foreach_copy_
from rlscuda.functional.gemm import multiply
from rlscuda.optim.layers import Layer
from rlscuda.optim.ranks.shards import Rows, local
from rlscuda.optim.staging import Factors, Stage, Summary

Workspace = dict[tuple[str, torch.dtype, torch.device], Tensor]


@dataclass(eq=False)
class Move:
    """One layer about to move.

    Attributes:
        layer: The layer.
        group: Its parameter group.
        stage: What is staged for this step.
        state: The tensors of its state, of its own rows where they lie on several processes.
        summary: What is staged of its input, or None.
        factors: The factors of its gradient, where they were kept and still hold all of it.
        moves_bias: Whether its bias, if in `P`, is still in a group.
        span: Steps that the update of its `P` stands for; 0 where `P` rests, see `span_of`.
        shard: Which rows it has here; None for all.
        weight: Its weight as the operators take it.
        grad: Its gradient as [c, n], contiguous, of the dtype of `P`.
        product: Where the product goes [c, fan_in].
        projected: X P [N, fan_in] for the factored product.
    """

    layer: Layer
    group: dict[str, Any]
    stage: Stage
    state: dict[str, Any]
    summary: Summary | None
    moves_bias: bool
    span: int = 1
    shard: Rows | None = None
    weight: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    product: Tensor = field(init=False)
    projected: Tensor | None = None
    factors: Factors | None = field(init=False)

    def __post_init__(self):
        weight = self.layer.weight
        assert weight.grad is not None
        self.weight = self.layer.plane(local(weight))
        self.grad = self.layer.as_rows(local(weight.grad))
        self.factors = self.stage.factors
        if self.factors is not None and (
            (self.summary is None and self.span)
            or not self.moves_bias
            or not self.factors.agree(self.layer, self.grad)
        ):
            self.factors = None

    @property
    def outputs(self) -> int:
        """The rows of its weight that are here."""
        return self.grad.shape[0]

    @property
    def rows(self) -> Tensor:
        """The summary [groups, r, fan_in] as `P` is; r = 0 where nothing is staged."""
        P, layer = self.state["P"], self.layer
        if self.summary is None:
            return P.new_empty(layer.groups, 0, layer.fan_in)
        return self.summary.rows.to(P)


def buffer(workspace: Workspace, name: str, P: Tensor, numel: int) -> Tensor:
    """`numel` uninitialised elements like those of P, from memory that every step reuses."""
    kept = workspace.get((name, P.dtype, P.device))
    if kept is None or kept.numel() < numel:
        kept = workspace[name, P.dtype, P.device] = P.new_empty(numel)
    return kept[:numel]


def prepare(chunk: list[Move], workspace: Workspace) -> None:
    """Gives every move its gradient in the dtype of `P`, and its product G P a place."""
    P = chunk[0].state["P"]
    if chunk[0].group["form"] != "spectral":  # whose product is made with the direction
        shapes = [(move.outputs, move.layer.fan_in) for move in chunk]
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
    first = first_of_each(chunk)
    for move in first.values():
        if move.factors is not None and move.layer.blocks == 1:
            move.projected = _project(move.layer, move.state["P"], move.factors.x, workspace)
    for move in chunk:
        if move.factors is not None:  # shown the same rows
            move.projected = first[id(move.state["P"])].projected


def first_of_each(chunk: list[Move]) -> dict[int, Move]:
    """The first layer of each `P`, which speaks for those that share it, by the id of that."""
    first: dict[int, Move] = {}
    for move in chunk:
        first.setdefault(id(move.state["P"]), move)
    return first


def _project(layer: Layer, P: Tensor, X: Tensor, workspace: Workspace) -> Tensor:
    """X P [N, fan_in] of the input rows, a bias' column of ones included."""
    name = f"projected {id(layer)}"  # several wait at once
    out = buffer(workspace, name, P, len(X) * layer.fan_in).view(len(X), layer.fan_in)
    if layer.bias:
        multiply(X, P[:-1], out, P[-1], varying=len(X))
    else:
        multiply(X, P, out, varying=len(X))
    return out
