"""Staging: what a forward pass leaves for the next `step()`, and nothing of it in `P` before.

A forward hook summarises the layer's input; a hook on the output's gradient commits the summary,
in a backward pass that computes the weight's, too. So a forward that is never differentiated
(validation, no_grad, a checkpointed segment's first run, an unused branch), or by its input alone,
stages nothing, and one that is counts once, in training mode or not.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlscuda._torch import (
    accumulator_near,
    gradient_comes,
    in_backward,
    is_dtensor,
    is_transformed,
    origin,
    version_of,
)
from rlscuda.optim.forms import rank_of
from rlscuda.optim.layers import Layer
from rlscuda.optim.ranks.shards import local

_patch_mean = torch.ops.rlscuda.patch_mean.default
_patch_sketch = torch.ops.rlscuda.patch_sketch.default
_patch_sample = torch.ops.rlscuda.patch_sample.default
_factors_agree = torch.ops.rlscuda.factors_agree.default
_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that layers and steps do not share seeds


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
        if version_of(self.x) != self.version:
            return False
        bias = layer.bias_parameter if layer.bias else None
        grad_bias = None if bias is None else bias.grad
        if bias is not None and grad_bias is None:
            return False
        return _factors_agree(grad, self.x, self.delta.contiguous(), grad_bias)


@dataclass(eq=False, slots=True)
class Shown:
    """The summary of one input of a layer, and what says whether another was shown the same.

    Attributes:
        x: The input, as the forward had it.
        version: Its version counter.
        layer: The layer.
        group: Its parameter group.
        index: Rows of it that take part; None for all.
        summary: Their summary.
        token: Number of the input, one for each that is summarised.
    """

    x: weakref.ref[Tensor]
    version: int
    layer: Layer
    group: dict[str, Any]
    index: Tensor | None
    summary: Summary
    token: int

    def serves(self, x: Tensor, layer: Layer, group: dict[str, Any], index: Tensor | None) -> bool:
        """Whether the summary is that of an input of another layer, too."""
        same = self.x() is x and self.version == version_of(x) and self.index is index
        return same and self.group is group and self.layer.alike(layer)


Part = tuple[Shown, int, int]  # of a step: the summary, its offset and its size


class Inputs:
    """What layers have in common: the mask of rows, and the last input, of which several may be.

    Attributes:
        shape: Of the mask that is entered, see `RLSOptimizer.mask`: of an input without features.
        index: Places of the rows that take part; None outside of any.
        left: Shapes of masks that were left since the last `clear`.
        last: The last input that was summarised.
    """

    _numbers = itertools.count()

    def __init__(self):
        self.shape: torch.Size | None = None
        self.index: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets masks that were left, and inputs."""
        self.left: set[torch.Size] = set()
        self.last: Shown | None = None

    def note(
        self, x: Tensor, layer: Layer, group: dict[str, Any], index: Tensor | None, summary: Summary
    ) -> Shown:
        """Keeps the summary of an input for layers that are shown it too."""
        seen = version_of(x)
        number = next(self._numbers)
        self.last = Shown(weakref.ref(x), seen, layer, group, index, summary, number)
        return self.last

    @contextmanager
    def entered(self, mask: Tensor) -> Iterator[None]:
        """Lets a mask hold inside.

        Raises:
            TypeError: It is no bool tensor.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {got}")
        outside = self.shape, self.index
        self.shape, self.index = mask.shape, mask.flatten().nonzero()[:, 0]
        try:
            yield
        finally:
            self.shape, self.index = outside
            self.left.add(mask.shape)

    def take(self, layer: Layer, x: Tensor) -> Tensor:
        """The rows [k, n] of an input of the mask's shape that take part; any other as it is.

        Raises:
            RuntimeError: A checkpointed segment is recomputed where its mask does not hold.
        """
        if self.index is None and not self.left or layer.weight.dim() != 2:
            return x
        leading = x.shape[:-1]
        if leading == self.shape and self.index is not None:
            return x.flatten(0, -2).index_select(0, self.index.to(x.device))
        if leading in self.left and in_backward():
            raise RuntimeError(
                f"the input of {layer.name!r} is recomputed outside of the mask of its shape "
                f"{list(leading)}: let mask() enclose backward() too"
            )
        return x


class Stage:
    """What one layer has staged for the next step.

    Attributes:
        summary: Of every differentiated forward since the last `clear`, or None.
        calls: How many there were.
        factors: Of the only one, where they were kept.
        generation: Counts the calls of `clear`, so that a forward counts once between two.
        missed: Steps in a row that found nothing staged.
        taken: Images, or rows of a sketch, that were summarised.
        order: Number of the sizes of the forwards, in turn: the same where they were the same.
        shown: Numbers of the inputs it was shown.
        tokens: Those of them that are in the summary.
    """

    def __init__(self):
        self.generation = self.missed = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything staged."""
        self.summary: Summary | None = None
        self.calls = self.taken = self.order = 0
        self.factors: Factors | None = None
        self.generation += 1
        self.shown: set[int] = set()
        self.tokens: set[int] = set()
        self._seen = self._ahead = 0

    def reserve(self, size: int, tentative: bool) -> int:
        """The offset, among all that a step sees, of a forward of `size` images or rows.

        A forward inside a backward pass recomputes a checkpointed segment, and one in eval mode may
        be of a validation: whether it is to count shows only when its gradient comes, so it
        reserves nothing for good.
        """
        offset = max(self._ahead, self._seen) if tentative else self._seen
        self._ahead = offset + size
        if not tentative:
            self._seen = self._ahead
        return offset

    def overshoots(self, group: dict[str, Any]) -> bool:
        """Whether the paper's step along one row may go beyond twice the way to its minimum.

        There the error shrinks by 1 - (lr / gain) (h - forgetting) / h.
        """
        single = self.summary is not None and self.summary.total == 1
        return single and group["form"] == "paper" and float(group["lr"]) > 2 * group["gain"]

    def commit(self, part: Part | None, factors: Factors | None) -> None:
        """Takes in what one differentiated forward has shown, and the factors of its gradient."""
        self.calls += 1
        self.factors = factors if self.calls == 1 else None
        if part is None:
            return
        shown, start, size = part
        self.tokens.add(shown.token)
        before, summary = self.summary, shown.summary
        alike = before is not None and before.rows.shape == summary.rows.shape
        self.summary = before.merge(summary) if before is not None and alike else summary
        self._seen = max(self._seen, start + size)
        self.taken += size
        self.order = hash((self.order, start, size)) & (2**62 - 1)

    def _show(
        self,
        layer: Layer,
        group: dict[str, Any],
        step: int,
        inputs: Inputs,
        place: tuple[int, int],
        given: Tensor,
        rows: Tensor,
        index: Tensor | None,
        rank: int,
    ) -> Part:
        """The summary of the rows of one input that take part, see `observe`."""
        images = layer.images(rows)
        size = images.shape[0] * (layer.positions(images) if group["summary"] == "sketch" else 1)
        offset = self.reserve(size, tentative=in_backward() or not layer.module.training)
        last = inputs.last
        if last is None or last.token in self.shown or not last.serves(given, layer, group, index):
            seed = (group["seed"] + _SEED_STRIDE * (1 + layer.index + (step << 16))) & (2**63 - 1)
            drawn = offset * place[1] + size * place[0]  # as if all ranks were shown in turn
            summary = summarise(layer, images, group["summary"], rank, seed, drawn)
            last = inputs.note(given, layer, group, index, summary)
        self.shown.add(last.token)
        return last, offset, size

    def observe(
        self,
        layer: Layer,
        group: dict[str, Any],
        step: int,
        inputs: Inputs,
        place: tuple[int, int],
        x: Tensor,
        outputs: Sequence[Tensor],
        span: int,
    ) -> None:
        """Summarises the input of one forward, to be committed when a gradient of it comes.

        Args:
            layer: The layer.
            group: Its parameter group.
            step: Steps it has taken.
            inputs: What it has in common with other layers.
            place: Rank of this process among those that train together, and how many they are.
            x: The input.
            outputs: The outputs with a gradient to come, of several the first that has come counts.
            span: Steps that the next update of `P` stands for; where it rests, at 0, only factors
                are kept.
        """
        if not summarisable(x, outputs):
            return
        weight = layer.weight
        if weight.grad is None and self.calls and not (in_backward() or is_dtensor(weight)):
            self.clear()  # the gradient was dropped, and so was the step
        given, x = x, local(x) if is_dtensor(x) else x.detach()
        some = inputs.take(layer, x)
        if some is not x and not some.numel():
            return
        rows, seen, counted = None, 0, 0
        # the spectral product is of the momentum, that of many processes of their mean gradient
        of_one = group["form"] != "spectral" and place[1] == 1 and not is_dtensor(weight)
        if some is x and of_one and layer.factors_pay(x, group["dtype"]):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            seen = version_of(rows)
        part = None
        if span:
            index, rank = None if some is x else inputs.index, rank_of(group, span, layer.fan_in)
            part = self._show(layer, group, step, inputs, place, given, some, index, rank)
        elif rows is None:
            return

        def commit(slot: int, accumulator: Any, gradients: tuple[Tensor | None, ...]) -> None:
            nonlocal counted
            gradient = gradients[slot]
            if gradient is None or counted == self.generation:
                return
            if not (is_dtensor(weight) or gradient_comes(weight, accumulator)):
                return  # of the input alone
            counted, factors = self.generation, None
            if rows is not None and weight.grad is None and gradient.dtype == rows.dtype:
                factors = Factors(rows, gradient.reshape(len(rows), -1), seen)
            self.commit(part, factors)

        for output in outputs:  # what `output.register_hook` does, at half its cost
            node, slot = origin(output)
            node.register_prehook(partial(commit, slot, accumulator_near(node, weight)))


def summarisable(x: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether an input is dense and has elements, and outputs are differentiated by no transform.

    What a transform such as `vmap` passes through the layers means nothing after it has returned.
    """
    if not outputs or x.layout != torch.strided or not x.numel() or is_transformed(x):
        return False
    return not any(map(is_transformed, outputs))
