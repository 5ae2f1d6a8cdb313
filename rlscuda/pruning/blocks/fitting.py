r"""The linear map that stands in best for a branch, in closed form from one pass over a loader.

Of the branch's output F [rows, c] and what its exit is given without it, x, as im2col rows with a
one at their end [rows, n + 1],

.. math:: T = E[F \tilde x^T] \, P, \quad P = E[\tilde x \tilde x^T]^{-1}

is the least-squares map; the share of the variance of F that it explains is
:math:`R^2 = 1 - tr Cov(F - T \tilde x) / tr Cov(F)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.closed_form.formulas import damped_inverse
from rlscuda.optim.layers import Layer
from rlscuda.pruning.blocks.finding import Block
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.blocks.stand_ins import Mapped
from rlscuda.pruning.running.calls import feed, isolated_copy, output_tensors, rng_kept
from rlscuda.reference import patch_rows

_ROWS_BYTES = 32 << 20  # of im2col rows in memory at a time


@dataclass(frozen=True)
class Fit:
    """A map for a block.

    Attributes:
        stand_in: What to put in the place of the block's exit.
        explained: Share of the variance of the branch's output that it explains, at most 1.
    """

    stand_in: Mapped
    explained: float


def kernels_of(block: Block) -> tuple[int, ...]:
    """The maps that fit a block, by the sides of their kernels; 0 is a Linear.

    Their input must be shaped like their output but for channels and a common stride.
    """
    if len(block.enters) != len(block.shape) or block.channel == -1:
        fits = len(block.enters) == len(block.shape) and block.enters[:-1] == block.shape[:-1]
        return (0,) if fits else ()
    return (1, 3) if len(block.shape) == 4 and _stride(block) else ()


def _stride(block: Block) -> int:
    """The stride of both sides of an image, or 0 where there is no common one."""
    sides = list(zip(block.enters[2:], block.shape[2:]))
    strides = {math.ceil(old / new) for old, new in sides if new}
    if len(strides) != 1 or any(-(-old // min(strides)) != new for old, new in sides):
        return 0
    return strides.pop()


@torch.no_grad()
def fit(model: nn.Module, block: Block, loader: Iterable, damping: float) -> dict[int, Fit]:
    """The best maps for a block, by the sides of their kernels: see `kernels_of`.

    Args:
        model: The model, with the block; it is only read.
        block: Of this model.
        loader: Batches as `feed` takes them.
        damping: Relative to the mean of the autocorrelation's diagonal, see `damped_inverse`.

    Raises:
        ValueError: The loader is empty, or the branch saw or gave what is not finite.
    """
    kernels = kernels_of(block)
    if not kernels:
        return {}
    like = next(model.get_submodule(block.exit).parameters())
    moments = _Moments(block, max(kernels), like)
    whole = isolated_copy(model).eval()
    without = with_stand_ins(model, block.stand_ins)
    seen: dict[str, Tensor] = {}

    def given(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["x"] = output_tensors((args, kwargs))[0]

    def made(module: nn.Module, args: Any, output: Any) -> None:
        seen["F"] = output_tensors(output)[0]

    with rng_kept(model), ExitStack() as hooks:
        before = without.get_submodule(block.exit).register_forward_pre_hook
        hooks.callback(before(given, with_kwargs=True).remove)
        hooks.callback(whole.get_submodule(block.exit).register_forward_hook(made).remove)
        for batch in loader:
            feed(whole, batch)
            feed(without, batch)
            moments.add(seen["x"], seen["F"])
    return {kernel: moments.solved(kernel, damping) for kernel in kernels}


def _map(block: Block, kernel: int, like: Tensor) -> Mapped:
    inputs, width = block.enters[block.channel], block.shape[block.channel]
    outputs, stride = block.stand_ins[block.exit].outputs, _stride(block) if kernel else 1
    with torch.random.fork_rng(devices=[]):  # whose first weights nobody sees
        stand_in = Mapped(outputs, kernel, inputs, width, stride)
    return stand_in.to(like.device, like.dtype)


class _Moments:
    """Sums over the rows of the largest map: of x x^T, F x^T and F^2, in float64."""

    def __init__(self, block: Block, kernel: int, like: Tensor):
        self.block, self.kernel, self.like = block, kernel, like
        self.layer = Layer(block.name, _map(block, kernel, like).map, 0, bias=True)
        n, width = self.layer.fan_in, self.layer.outputs
        options: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
        self.xx, self.Fx = torch.zeros(n, n, **options), torch.zeros(width, n, **options)
        self.FF = torch.zeros(width, **options)
        self.rows = 0

    def add(self, x: Tensor, F: Tensor) -> None:
        """Takes in what the exit is given without the branch, and what the branch puts out."""
        images = self.layer.images(x)
        channel = self.block.channel
        targets = F.movedim(channel, -1).reshape(len(images), -1, F.shape[channel])
        step = max(1, _ROWS_BYTES // (self.layer.fan_in * targets.shape[1] * 8))
        for some, wanted in zip(images.split(step), targets.split(step)):
            rows = patch_rows(some, *self.layer.geometry, ones=True)[0]  # type: ignore[misc]
            wanted = wanted.flatten(0, 1).double()
            self.xx.addmm_(rows.mT, rows)
            self.Fx.addmm_(wanted.mT, rows)
            self.FF += wanted.square().sum(0)
            self.rows += len(rows)

    def solved(self, kernel: int, damping: float) -> Fit:
        """The map of least squares; one of a smaller kernel sees the middle of each patch."""
        if not self.rows:
            raise ValueError("loader must give at least one batch, got none")
        area = max(1, self.kernel) ** 2
        columns = torch.arange(self.layer.columns, device=self.like.device)
        if kernel < self.kernel:
            columns = columns[area // 2 :: area]
        columns = torch.cat([columns, columns.new_tensor([self.layer.columns])])  # and the ones
        xx = self.xx[columns][:, columns] / self.rows
        Fx, FF = self.Fx[:, columns] / self.rows, self.FF / self.rows
        if not bool(torch.isfinite(xx).all() and torch.isfinite(Fx).all()):
            raise ValueError(f"the branch of {self.block.name!r} saw or gave NaN or infinity")
        T = Fx @ damped_inverse(xx, damping)
        left = FF - 2 * (T * Fx).sum(1) + ((T @ xx) * T).sum(1)
        variance = float((FF - Fx[:, -1].square()).sum())
        stand_in = _map(self.block, kernel, self.like)
        layer: Any = stand_in.map
        layer.weight.copy_(T[:, :-1].reshape(layer.weight.shape))
        layer.bias.copy_(T[:, -1])
        return Fit(stand_in, 1 - float(left.sum()) / variance if variance > 0 else 1.0)
