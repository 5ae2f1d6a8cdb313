"""Neural network relief: each unit keeps the connections that carry most of its signal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda._torch import own_parameters, unwrapped
from rlscuda.closed_form.formulas import output_energy
from rlscuda.closed_form.single_weights import refit
from rlscuda.optim.layers import Layer
from rlscuda.pruning.masks.activity import NORMS, Activity, strongest
from rlscuda.pruning.masks.addends import Additions
from rlscuda.pruning.masks.layers import MaskLayer, mask_layer, undo_of, write_mask
from rlscuda.pruning.masks.units import drop_unread, structure_of
from rlscuda.pruning.masks.weights import LayerMask, MaskReport
from rlscuda.pruning.matrices.calibration import observing, pruning_layers
from rlscuda.pruning.options import check_number, checked_optimizers
from rlscuda.pruning.running.calls import call, call_of, inference, inputs_of


@dataclass(frozen=True)
class ReliefMask(LayerMask):
    """What one layer lost; `cost` and `loss` are NaN where it was not refitted.

    Attributes:
        name: Qualified name.
        mask: True where a weight was kept; the shape of the weight.
        cost: See `LayerMask`.
        loss: See `LayerMask`.
        bias: True where a bias was kept [c]; None where the layer has none of its own.
        signal: Share of the signal of the units that remain which their connections carry still.
    """

    bias: Tensor | None = None
    signal: float = 1.0

    @property
    def connections(self) -> tuple[int, int]:
        """Weights and biases kept, and all there are."""
        parts = [self.mask] if self.bias is None else [self.mask, self.bias]
        return sum(int(part.sum()) for part in parts), sum(part.numel() for part in parts)


class ReliefReport(MaskReport[ReliefMask]):
    """The masks of every layer; prints as a table."""

    @property
    def left(self) -> float:
        """Share of the weights and biases of all layers that are kept."""
        kept, everything = (sum(part) for part in zip(*(row.connections for row in self)))
        return kept / everything

    def __str__(self):
        width = max(len("layer"), *(len(row.name) for row in self))
        lines = [f"{'layer':<{width}}{'connections':>13}{'left':>10}{'share':>8}{'signal':>9}"]
        for row in self:
            kept, every = row.connections
            lines.append(f"{row.name:<{width}}{every:>13}{kept:>10}{kept / every:>8.1%}"
                         f"{row.signal:>9.1%}")  # fmt: skip
        return "\n".join(lines)


@torch.no_grad()
def prune_relief(
    model: nn.Module,
    loader: Iterable,
    *,
    alpha: float = 0.95,
    alpha_conv: float | None = None,
    layers: Iterable[str | nn.Module] | None = None,
    matrices: Mapping[str, Tensor] | None = None,
    optimizers: Optimizer | Iterable[Optimizer] | None = None,
    norm: str = "sum",
    backward: bool = True,
    as_published: bool = False,
) -> ReliefReport:
    r"""One round of relief: masks all but the strongest connections of each unit.

    The signal of a connection is the mean of :math:`|w_j h_j|` over the samples, of a bias its
    size; a convolution's connections are its kernels, one input channel of one filter each. Every
    unit keeps the fewest connections that carry at least `alpha` of its signal, so that in the mean
    over samples and positions its pre-activation changes by at most :math:`1 - \alpha` of it, until
    weights are refitted. All layers are judged by one pass over the samples, of the network as it
    was, in eval mode.

    Then

    - where outputs of convolutions are added to others, as at the end of a residual block, a
      channel whose norm is less than (1 - alpha) / alpha of what it is added to goes: the filter
      that makes it, and weight and bias of a batch norm between are set to 0 (those have no mask);
    - from the last layer to the first, units of which no connection is read any more, dead ones
      among them, lose all that makes them.

    The masks are those of `torch.nn.utils.prune`, on weights and, where some go, on biases: the
    parameters stay the same objects and their optimizers go on. As a ranking, signal is weaker than
    saliency (`prune_weights`) or even size; with `matrices` much of that is made good.

    Everything is solved before the first layer is changed; an error leaves all as it was.

    Args:
        model: The model.
        loader: Batches as `calibrate` takes them; the paper takes 1,000 training images.
        alpha: Share of the signal that each unit keeps, in (0, 1).
        alpha_conv: The same of convolutions; `alpha` by default.
        layers: Names (shell patterns) or modules to prune; all Linears and convolutions that
            `calibrate` can cover by default. Those left out read all that they are given.
        matrices: Inverse autocorrelation matrices of these layers, as `prune_weights` takes them.
            What is left of each unit, a bias inside its matrix included, is then the least-squares
            fit of the unit's output as it was.
        optimizers: All whose moments of what goes are set to zero.
        norm: How a convolution's positions are averaged: their mean (``sum``, as for the paper's
            LeNets) or root mean square of the mean over samples (``position``, as for its VGG and
            ResNets), which needs images of one size.
        backward: Whether the pass from the last layer to the first is made; it traces the model.
        as_published: Whether at least one connection of a unit goes in every round, and with it
            those that are as strong, as in the authors' code; the bound does not hold then.

    Returns:
        What each layer lost.

    Raises:
        ValueError: An option is out of its range; the loader is empty; a layer of `layers` saw no
            input, or one saw input that is not finite; a layer or matrix that `prune_weights` would
            refuse; the model cannot be traced.
        TypeError: A batch, the model, a layer or an optimizer is of another type.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        ... )
        >>> report = prune_relief(model, [torch.randn(100, 4)], alpha=0.9)
        >>> report.left < 1 and all(row.signal >= 0.9 for row in report)
        True

    Source: Dekhovich et al. 2024 (arXiv 2109.10795).
    """
    alpha_conv = alpha if alpha_conv is None else alpha_conv
    for name, value in (("alpha", alpha), ("alpha_conv", alpha_conv)):
        check_number(name, value)
        if not 0 < value < 1:
            raise ValueError(f"{name} must be above 0 and below 1, got {value}")
    if norm not in NORMS:
        raise ValueError(f"norm must be {' | '.join(NORMS)}, got {norm!r}")
    found = pruning_layers(model, layers)
    model = unwrapped(model)
    followers = checked_optimizers(optimizers, model)
    chosen = {one.name: mask_layer(model, one.name, matrices, one.bias) for one in found}
    seen = _Seen(model, found, norm)
    example = seen.run(loader)
    if layers is not None and (unseen := [n for n, a in seen.activities.items() if not a.seen]):
        raise ValueError(f"layers {unseen} saw no input in eval mode")
    keep: dict[str, Tensor] = {}
    signals: dict[str, Tensor] = {}
    for name, activity in seen.activities.items():
        if activity.seen:
            layer = chosen[name]
            share = alpha if layer.weight.dim() == 2 else alpha_conv
            signals[name] = activity.signals(layer.rows())
            kept = strongest(signals[name], share, as_published)
            keep[name] = _columns(layer, kept) & layer.kept()
    norms = _drop_negligible(seen.additions, alpha_conv, keep)
    if backward:
        drop_unread(structure_of(model, example), keep)
    results = [_solve(chosen[name], keep[name], signals[name]) for name in keep]
    undo: list[Callable[[], None]] = []
    try:
        for result in results:
            moments = [m for one in followers for m in result.layer.moments(one)]
            undo.append(undo_of(result.layer, moments))
            write_mask(result.layer, result.keep, result.rows, moments, permanent=False)
        for name, channels in norms.items():
            _silence(model.get_submodule(name), channels, followers, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return ReliefReport(result.report() for result in results)


class _Seen:
    """What the layers of a model, and the additions in it, see of a loader."""

    def __init__(self, model: nn.Module, layers: list[Layer], norm: str):
        self.model, self.layers = model, layers
        self.activities = {layer.name: Activity(layer, norm) for layer in layers}
        self.additions = Additions(model)

    def run(self, loader: Iterable) -> Any:
        """Feeds the batches to the model, and gives two samples of the first as example inputs.

        Raises:
            ValueError: There is no batch, or no layer saw input.
        """
        example = None
        with ExitStack() as stack:
            stack.enter_context(inference(self.model))
            stack.enter_context(
                observing(self.layers, lambda layer, x: self.activities[layer.name].add(x))
            )
            stack.enter_context(self.additions.watching())
            for batch in loader:
                inputs = inputs_of(self.model, batch)
                if example is None:
                    some = call_of(inputs).resized(2)
                    example = some.kwargs or some.args
                call(self.model, inputs)
                self.additions.end()
        if example is None:
            raise ValueError("loader must give at least one batch, got none")
        if not any(activity.seen for activity in self.activities.values()):
            raise ValueError(f"none of the layers {list(self.activities)} saw input in eval mode")
        return example


@dataclass(frozen=True)
class _Result:
    """What is to become of a layer: what stays and the weights [c, k], and what that costs."""

    layer: MaskLayer
    keep: Tensor
    rows: Tensor
    signal: float
    cost: float = float("nan")
    loss: float = float("nan")

    def report(self) -> ReliefMask:
        n = self.layer.columns
        mask = self.keep[:, :n].view(self.layer.weight.shape)
        bias = None if self.layer.bias is None else self.keep[:, n]
        return ReliefMask(self.layer.name, mask, self.cost, self.loss, bias, self.signal)


def _columns(layer: MaskLayer, kept: Tensor) -> Tensor:
    """Connections [c, C / groups (+ 1)] as the columns [c, k] of their taps."""
    channels = layer.weight.shape[1]
    taps = kept[:, :channels].repeat_interleave(layer.columns // channels, 1)
    return torch.cat([taps, kept[:, channels:]], 1)


def _drop_negligible(
    additions: Additions, alpha: float, keep: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """Drops filters whose channels do not matter where they are added.

    Returns:
        The channels of batch norms that go with them.
    """
    norms: dict[str, list[int]] = {}
    for side, channels in additions.negligible(alpha):
        if side.convolution in keep:
            keep[side.convolution][channels] = False
            if side.norm is not None:
                norms.setdefault(side.norm, []).extend(channels)
    return norms


def _solve(layer: MaskLayer, keep: Tensor, signals: Tensor) -> _Result:
    """The weights of one layer and the signal that they carry; nothing is changed yet."""
    rows, n, channels = layer.rows(), layer.columns, layer.weight.shape[1]
    kernels = keep[:, :n].unflatten(1, (channels, -1)).any(2)
    carries = torch.cat([kernels, keep[:, n:]], 1)
    total = float(signals[carries.any(1)].sum())
    carried = float(signals[carries].sum())
    result = _Result(layer, keep, rows * keep, carried / total if total else 1.0)
    if layer.P is None:
        return result
    G, width = len(layer.P), layer.P.shape[-1]
    inside, kept = rows[:, :width], keep[:, :width]
    inputs = torch.arange(n, device=rows.device)
    try:
        parts = [refit(*part) for part in zip(layer.P, inside.chunk(G), kept.chunk(G))]
        energy = sum(output_energy(P, w, inputs) for P, w in zip(layer.P, inside.chunk(G)))
    except ValueError as error:
        raise ValueError(f"{layer.name!r}: {error}") from None
    fitted, costs = (torch.cat(part) for part in zip(*parts))
    cost = float(costs.sum())
    return replace(
        result,
        rows=torch.cat([fitted, result.rows[:, width:]], 1),
        cost=cost,
        loss=cost / energy if energy else 0.0,
    )


def _silence(
    norm: nn.Module,
    channels: list[int],
    optimizers: Iterable[Optimizer],
    undo: list[Callable[[], None]],
) -> None:
    """Sets weight and bias of a norm's channels, and their moments, to zero."""
    for parameter in own_parameters(norm).values():
        if parameter is None:
            continue
        state = [v for one in optimizers for v in one.state.get(parameter, {}).values()]
        moments = [v for v in state if isinstance(v, Tensor) and v.shape == parameter.shape]
        for tensor in (parameter, *moments):
            undo.append(_restoring(tensor))
            tensor[channels] = 0


def _restoring(tensor: Tensor) -> Callable[[], None]:
    value = tensor.detach().clone()

    @torch.no_grad()
    def undo() -> None:
        tensor.copy_(value)

    return undo
