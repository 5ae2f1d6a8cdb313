"""Staging: what a forward pass leaves for the next `step()`, and nothing of it in `P` before.

A forward hook summarises the layer's input; a hook on the output's gradient commits the summary.
So a forward that is never differentiated (eval, no_grad, a checkpointed segment's first run, an
unused branch) stages nothing, and one that is counts once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlscuda.layers import Layer

_ops = torch.ops.rlscuda


@dataclass
class Summary:
    """The summary of some rows of a layer's im2col matrix, mergeable with that of others.

    Attributes:
        kind: `mean`, `sketch` or `sample`.
        rows: [groups, r, n].
        count: Rows summarised; for `mean` of each slice [r].
        keys: For `sample`, the [r] keys by which each row was drawn.
    """

    kind: str
    rows: Tensor
    count: list[int]
    keys: Tensor | None = None

    def merge(self, other: Summary) -> Summary:
        """The summary of the rows of both."""
        count = [a + b for a, b in zip(self.count, other.count)]
        if self.kind == "sample":
            first = self.keys <= other.keys
            rows = torch.where(first[:, None], self.rows, other.rows)
            return Summary("sample", rows, count, torch.minimum(self.keys, other.keys))
        power = 1.0 if self.kind == "mean" else 0.5

        def share(part: list[int]) -> Tensor:
            ratio = [(p / max(c, 1)) ** power for p, c in zip(part, count)]
            return self.rows.new_tensor(ratio)[:, None]

        return Summary(
            self.kind, self.rows * share(self.count) + other.rows * share(other.count), count
        )


def summarise(
    layer: Layer, images: Tensor, kind: str, rank: int, seed: int, offset: tuple[int, int]
) -> Summary:
    """Summarises the input of a layer.

    Args:
        layer: The layer.
        images: Its input as [N, C, H, W], see `Layer.images`.
        kind: `mean`, `sketch` or `sample`.
        rank: Rows of the summary.
        seed: Seed of the random signs or draws.
        offset: Images and im2col rows that this step has seen before.
    """
    bias = layer.bias
    n, positions = images.shape[0], layer.positions(images)
    if kind == "sketch":
        rows = _ops.patch_sketch.default(images, *layer.geometry, bias, rank, seed, offset[1])
        return Summary(kind, rows, [n * positions] * rank)
    if kind == "sample":
        rows, keys = _ops.patch_sample.default(images, *layer.geometry, bias, rank, seed, offset[0])
        return Summary(kind, rows, [n] * rank, keys)
    if rank == 1:
        rows = _ops.patch_mean.default(images, *layer.geometry, bias).unsqueeze(1)
        return Summary(kind, rows, [n * positions])
    slices = [images[(k - offset[0]) % rank :: rank] for k in range(rank)]
    means = [
        _ops.patch_mean.default(part, *layer.geometry, bias) if part.shape[0] else None
        for part in slices
    ]
    filled = next(m for m in means if m is not None)
    rows = torch.stack([torch.zeros_like(filled) if m is None else m for m in means], dim=1)
    return Summary(kind, rows, [part.shape[0] * positions for part in slices])


@dataclass
class Factors:
    """The factors of a Linear layer's gradient: G = delta^T x, for the factored product.

    Attributes:
        x: Input rows [N, n].
        delta: Gradient of the output [N, c].
        version: Version counter of the input when it was seen.
    """

    x: Tensor
    delta: Tensor
    version: int

    def intact(self) -> bool:
        """Whether the input is still what the forward saw."""
        return self.x._version == self.version


class Stage:
    """What one layer has staged for the next step."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forgets everything staged."""
        self.summary: Summary | None = None
        self.calls = 0
        self.images = self.rows = 0
        self.factors: Factors | None = None

    def commit(self, summary: Summary, factors: Factors | None) -> None:
        """Takes in the summary of one differentiated forward."""
        self.summary = summary if self.summary is None else self.summary.merge(summary)
        self.calls += 1
        self.factors = factors if self.calls == 1 else None


class ForwardHook:
    """Forward hook of one layer; inert in copies of its module and once its optimizer is gone.

    Args:
        layer: The layer whose input to observe.
        observe: Bound method (layer, input, output) of the optimizer.
    """

    def __init__(self, layer: Layer | None = None, observe: Callable | None = None):
        self._layer = weakref.ref(layer) if layer is not None else lambda: None
        self._observe = weakref.WeakMethod(observe) if observe is not None else lambda: None

    def __call__(self, module, args, kwargs, output):
        """Passes on a forward that may be differentiated."""
        layer, observe = self._layer(), self._observe()
        if observe is None or layer.module is not module:
            return
        if module.training and output.requires_grad:
            if torch.compiler.is_compiling():  # the tracer must not follow: break the graph here
                observe = torch.compiler.disable(observe)
            observe(layer, args[0] if args else kwargs["input"], output)

    def __deepcopy__(self, memo):
        return ForwardHook()

    def __reduce__(self):
        return ForwardHook, ()


def in_backward() -> bool:
    """Whether the autograd engine runs on this thread (a checkpointed segment is recomputed)."""
    return torch._C._current_graph_task_id() != -1
