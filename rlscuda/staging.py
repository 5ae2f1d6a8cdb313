"""Staging: what a forward pass leaves for the next `step()`, and nothing of it in `P` before.

A forward hook summarises the layer's input; a hook on the output's gradient commits the summary.
So a forward that is never differentiated (eval, no_grad, a checkpointed segment's first run, an
unused branch) stages nothing, and one that is counts once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rlscuda.layers import Layer

_patch_mean = torch.ops.rlscuda.patch_mean.default
_patch_sketch = torch.ops.rlscuda.patch_sketch.default
_patch_sample = torch.ops.rlscuda.patch_sample.default
_factors_agree = torch.ops.rlscuda.factors_agree.default
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


@dataclass(slots=True)
class Summary:
    """The summary of some rows of a layer's im2col matrix, mergeable with that of others.

    Attributes:
        kind: `mean`, `sketch` or `sample`.
        rows: [groups, r, n].
        count: Rows summarised [r]; for `mean`, of each slice.
        keys: For `sample`, the [r] keys by which each row was drawn.
    """

    kind: str
    rows: Tensor
    count: list[int]
    keys: Tensor | None = None

    @property
    def total(self) -> int:
        """Rows summarised."""
        return sum(self.count) if self.kind == "mean" else self.count[0]

    def merge(self, other: Summary) -> Summary:
        """The summary of the rows of both."""
        count = [a + b for a, b in zip(self.count, other.count)]
        if self.keys is not None and other.keys is not None:
            first = self.keys <= other.keys
            rows = torch.where(first[:, None], self.rows, other.rows)
            return Summary("sample", rows, count, torch.minimum(self.keys, other.keys))
        power = 1.0 if self.kind == "mean" else 0.5

        def weighted(rows: Tensor, part: list[int]) -> Tensor:
            shares = [(p / max(c, 1)) ** power for p, c in zip(part, count)]
            if len(set(shares)) == 1:  # a number, which a GPU need not wait for
                return rows * shares[0]
            return rows * rows.new_tensor(shares)[:, None]

        rows = weighted(self.rows, self.count) + weighted(other.rows, other.count)
        return Summary(self.kind, rows, count)


def summarise(
    layer: Layer, images: Tensor, kind: str, rank: int, seed: int, offset: int
) -> Summary:
    """Summarises the input of a layer.

    Args:
        layer: The layer.
        images: Its input as [N, C, H, W], see `Layer.images`.
        kind: `mean`, `sketch` or `sample`.
        rank: Rows of the summary.
        seed: Seed of the random signs or draws.
        offset: What this step has seen before: im2col rows for `sketch`, else images.
    """
    bias, count = layer.bias, images.shape[0] * layer.positions(images)
    if kind == "sketch":
        rows = _patch_sketch(images, *layer.geometry, bias, rank, seed, offset)
        return Summary(kind, rows, [count] * rank)
    if kind == "sample":
        rows, keys = _patch_sample(images, *layer.geometry, bias, rank, seed, offset)
        return Summary(kind, rows, [count] * rank, keys)
    if rank == 1:
        return Summary(kind, _patch_mean(images, *layer.geometry, bias).unsqueeze(1), [count])
    slices = [images[(k - offset) % rank :: rank] for k in range(rank)]
    means = [_patch_mean(part, *layer.geometry, bias) if part.shape[0] else None for part in slices]
    filled = next(m for m in means if m is not None)
    rows = torch.stack([torch.zeros_like(filled) if m is None else m for m in means], dim=1)
    return Summary(kind, rows, [part.shape[0] * layer.positions(part) for part in slices])


@dataclass(slots=True)
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

    def agree(self, layer: Layer, grad: Tensor) -> bool:
        """Whether the input is what the forward saw, and delta^T [x, 1] still the whole gradient.

        A penalty on a parameter, another use of it, clipping and the like leave a gradient that
        the factors do not hold.
        """
        if self.x._version != self.version:
            return False
        bias = layer.bias_parameter if layer.bias else None
        grad_bias = None if bias is None else bias.grad
        if bias is not None and grad_bias is None:
            return False
        return _factors_agree(grad, self.x, self.delta.contiguous(), grad_bias)


class Stage:
    """What one layer has staged for the next step.

    Attributes:
        summary: Of every differentiated forward since the last `clear`, or None.
        calls: How many there were.
        factors: Of the only one, where they were kept.
        generation: Counts the calls of `clear`, so that a forward counts once between two.
    """

    def __init__(self):
        self.generation = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything staged."""
        self.summary: Summary | None = None
        self.calls = 0
        self.factors: Factors | None = None
        self.generation += 1
        self._seen = self._ahead = 0

    def reserve(self, size: int, recomputed: bool) -> int:
        """The offset, among all that a step sees, of a forward of `size` images or rows.

        A forward inside a backward pass recomputes a checkpointed segment: whether it is to count
        besides the first run shows only when its gradient comes, so it reserves nothing for good.
        """
        offset = max(self._ahead, self._seen) if recomputed else self._seen
        self._ahead = offset + size
        if not recomputed:
            self._seen = self._ahead
        return offset

    def overshoots(self, group: dict[str, Any]) -> bool:
        """Whether the paper's step along one row may go beyond twice the way to its minimum.

        There the error shrinks by 1 - (lr / gain) (h - forgetting) / h.
        """
        single = self.summary is not None and self.summary.total == 1
        return single and group["form"] == "paper" and float(group["lr"]) > 2 * group["gain"]

    def commit(self, summary: Summary, end: int, factors: Factors | None) -> None:
        """Takes in the summary of one differentiated forward, which ends at offset `end`."""
        self.summary = summary if self.summary is None else self.summary.merge(summary)
        self._seen = max(self._seen, end)
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
        if torch.compiler.is_compiling():
            self._break_graph(module, args, kwargs, output)
        else:
            self._observe_forward(module, args, kwargs, output)

    @torch._disable_dynamo
    def _break_graph(self, module, args, kwargs, output):
        self._observe_forward(module, args, kwargs, output)

    def _observe_forward(self, module, args, kwargs, output):
        layer, observe = self._layer(), self._observe()
        if layer is None or observe is None or layer.module is not module:
            return
        if module.training and output.requires_grad:
            observe(layer, args[0] if args else kwargs["input"], output)

    def __deepcopy__(self, memo):
        return ForwardHook()

    def __reduce__(self):
        return ForwardHook, ()


def remove_all(handles: Iterable[RemovableHandle]) -> None:
    """Removes hooks."""
    for handle in handles:
        handle.remove()


def summarisable(x: Tensor, output: Tensor) -> bool:
    """Whether an input is a plain dense tensor with elements, outside of `torch.func` transforms.

    What a transform such as `vmap` passes through the layers means nothing after it has returned.
    """
    plain = x.layout == torch.strided and x.numel() > 0
    return plain and not (_is_wrapped(x) or _is_wrapped(output))


def in_backward() -> bool:
    """Whether the autograd engine runs on this thread (a checkpointed segment is recomputed)."""
    return torch._C._current_graph_task_id() != -1
