"""Exact inverse autocorrelation matrices from a calibration loader, and how far others are off.

They are float64 [groups, n, n] by layer name, n = columns of the layer's im2col rows in the order
of `F.unfold`, + 1 where the layer has a bias of its own: a last column of ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlscuda._torch import (
    compiler_is_loaded,
    has_own_forward,
    is_masked,
    own_parameters,
    plain_or_masked,
    unwrapped,
)
from rlscuda.closed_form.few_rows import FewRows
from rlscuda.closed_form.formulas import damped_inverse, downdate
from rlscuda.optim.discovery import Match, discover, modules_named
from rlscuda.optim.kinds.modules import COVERED, SPREADING, is_consumer
from rlscuda.optim.kinds.padded import pads_itself
from rlscuda.optim.layers import Layer
from rlscuda.pruning.matrices.layers import SpreadLayer, layer_of
from rlscuda.pruning.matrices.proven import NotProven
from rlscuda.pruning.options import check_number
from rlscuda.pruning.running.calls import feed, inference
from rlscuda.pruning.running.measure import _plain_attention
from rlscuda.reference import patch_rows

Matrices = dict[str, Tensor]
Known = Mapping[str, Tensor | FewRows]  # what ranks, and compensates

_UNFOLD_BYTES = 64 << 20  # of im2col rows in memory at a time
_WIDE = 4096  # columns from which on rows may be kept in place of their autocorrelation
_LEAST_DAMPING = 1e-8  # by which few rows have an inverse


def calibrate(
    model: nn.Module,
    loader: Iterable,
    layers: Iterable[str | nn.Module] | None = None,
    damping: float = 1e-3,
    max_batches: int | None = None,
) -> Matrices:
    """The inverse of the exact autocorrelation of each layer's input over a loader.

    The model runs in eval mode without gradients, as it was written where it is compiled, and
    without the fused operators of transformer layers; its training flags and the random state are
    put back, also after an error. All rows weigh the same.

    Args:
        model: The model; batches are moved to the device of its first parameter.
        loader: Batches: a tensor; a tuple or list whose first item is the input; or a mapping, of
            which the model's forward gets the items it names.
        layers: Names (shell patterns) or modules to which this is limited; by default every Linear
            and convolution, with a mask or without: also a transposed one, see `SpreadLayer`, the
            Conv1D of transformers, and a Conv2d with a forward of its own that each input shows to
            be a convolution of its padded self, see `ProvenLayer`.
        damping: Relative to the mean of the autocorrelation's diagonal, see `damped_inverse`.
        max_batches: How many batches to take; all by default.

    Returns:
        float64 [groups, n, n] for each layer that saw input, on its device. A layer of `layers`
        by name or module that saw none is an error, others are left out.

    Raises:
        TypeError: A batch is none of the above.
        ValueError: `damping` is negative, `max_batches` is no positive integer, the loader is
            empty, a layer cannot be covered or saw non-finite input, or none saw input.
    """
    check_number("damping", damping, 0)
    if max_batches is not None:
        check_number("max_batches", max_batches, 1, whole=True)
    sums = accumulated(model, loader, pruning_layers(model, layers, others=True), max_batches)
    unseen = {name: one.refusal for name, one in sums.items() if not one.rows}
    if layers is not None and unseen:
        raise ValueError(f"layers {list(unseen)} saw no input in eval mode{_why(unseen)}")
    if len(unseen) == len(sums):
        raise ValueError(f"none of the layers {list(unseen)} saw input in eval mode{_why(unseen)}")
    return cast(Matrices, inverses(sums, damping))


def _why(reasons: Mapping[str, str]) -> str:
    return "".join(f"; {name!r}: {reason}" for name, reason in reasons.items() if reason)


def accumulated(
    model: nn.Module,
    loader: Iterable,
    layers: Iterable[Layer],
    max_batches: int | None = None,
    few: bool = False,
) -> dict[str, Autocorrelation]:
    """The autocorrelations of layers' inputs over a loader, by name, see `calibrate`.

    Args:
        model: The model.
        loader: Batches.
        layers: The layers.
        max_batches: How many batches to take; all by default.
        few: Whether few rows of wide layers stay as they are.

    Raises:
        TypeError: A batch is none that `feed` takes.
        ValueError: The loader is empty.
    """
    sums = {layer.name: Autocorrelation(layer, few) for layer in layers}
    found, batches = [one.layer for one in sums.values()], 0
    seeing = observing(found, lambda layer, x: sums[layer.name].add(x))
    with inference(model), _plain_attention(), seeing:
        for batch in islice(loader, max_batches):
            feed(model, batch)
            batches += 1
    if not batches:
        raise ValueError("loader must give at least one batch, got none")
    return sums


def inverses(sums: dict[str, Autocorrelation], damping: float) -> dict[str, Any]:
    """The damped inverses of those that have rows; `sums` is empty then.

    One at a time, so that no more than one autocorrelation and its inverse are there together.
    """
    found = {}
    for name in list(sums):
        if (one := sums.pop(name)).rows:
            found[name] = one.inverse(damping)
    return found


def disagreement(own: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    r"""How far matrices are from exact ones, whatever their common factor: 0 is proportional.

    :math:`\sqrt{2 \ln(a / g)}` with a and g the arithmetic and geometric mean of the eigenvalues of
    :math:`exact^{-1} own`: for small values the standard deviation, over all directions of the
    input alike, of the logarithm of what one says of a direction's power over what the other says.
    It does not change under an invertible change of the layer's inputs. .1 is 10 percent a
    direction. Of several groups, the root mean square.

    Args:
        own: Matrices [groups, n, n] by layer name.
        exact: Those to compare with, of the same shapes, or with a last column more: of a bias that
            is not in the first ones.

    Returns:
        One number for each layer that is in both.

    Raises:
        ValueError: No layer is in both, shapes differ, or a matrix is not positive definite.
    """
    common = [name for name in own if name in exact]
    if not common:
        raise ValueError(f"no layer is in both: {sorted(own)} and {sorted(exact)}")
    result = {}
    for name in common:
        first, second = own[name].double(), exact[name].double().to(own[name].device)
        if second.shape[-1] == first.shape[-1] + 1:
            bias = torch.tensor([first.shape[-1]], device=second.device)
            second = torch.stack([downdate(part, bias) for part in second])
        if first.shape != second.shape:
            raise ValueError(
                f"matrices of {name!r} must have one shape, got {list(first.shape)} and "
                f"{list(second.shape)}"
            )
        (root, bad), (exact_root, exact_bad) = map(torch.linalg.cholesky_ex, (first, second))
        if bad.any() or exact_bad.any():
            raise ValueError(f"matrices of {name!r} must be positive definite")
        half = torch.linalg.solve_triangular(exact_root, root, upper=False)
        arithmetic = half.square().sum((-2, -1)) / first.shape[-1]
        logarithms = half.diagonal(dim1=-2, dim2=-1).log()
        gap = arithmetic.log() - 2 * logarithms.mean(-1)
        result[name] = math.sqrt(2 * max(0.0, float(gap.mean())))
    return result


def pruning_layers(
    model: nn.Module, layers: Iterable[str | nn.Module] | None, others: bool = False
) -> list[Layer]:
    """The Linears and convolutions of a model, each bias in its matrix that is of its layer alone.

    Args:
        model: The model.
        layers: Names (shell patterns) or modules to which this is limited.
        others: Whether those are among them that no RLS rule trains, see `layer_of`.

    Raises:
        TypeError: `model` is no module, or `layers` holds what is neither a name nor a module.
        ValueError: The model has no such layer, or one of `layers` cannot be covered.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    model = unwrapped(model)
    chosen = None if layers is None else modules_named(layers, "layers", model)
    found: dict[nn.Module, Layer] = {}
    reasons: dict[nn.Module, str] = {}
    for index, match in enumerate(discover(model, None, None)):
        known = is_consumer(match.module) if others else isinstance(match.module, COVERED)
        if not known and not match.reason:
            match.layer, match.reason = None, f"{type(match.module).__name__} cannot be pruned"
        if match.layer is not None:
            match.layer.bias = match.bias_fits
        layer = match.layer or _uncovered_layer(match, index, model, others)
        if layer is None:
            reasons.setdefault(match.module, match.reason)
        else:
            found[match.module] = layer
    for item, inside in chosen or ():
        if inside.isdisjoint(found):
            why = next((reasons[m] for m in reasons if m in inside), "it has no parameters")
            raise ValueError(f"layers names {item!r}, which can have no matrix: {why}")
    if not found:
        raise ValueError(
            "model must have a Linear or convolution layer of its own weight, got none"
        )
    wanted = set(found) if chosen is None else {m for _, inside in chosen for m in inside}
    return [layer for module, layer in found.items() if module in wanted]


def _uncovered_layer(match: Match, index: int, model: nn.Module, others: bool) -> Layer | None:
    """The layer of a module that has a mask or, of others, that no RLS rule trains; else None."""
    module: Any = match.module
    masked = type(module) in COVERED and is_masked(module)
    if not masked and not (others and _is_other(module)):
        return None
    bias = plain_or_masked(module, "bias")
    holders = [m for m in model.modules() if any(p is bias for p in own_parameters(m).values())]
    try:
        return layer_of(module, match.name, index, bias is not None and holders == [module])
    except NotProven as error:
        match.reason = _own_forward(module, error)
        return None


def _own_forward(module: nn.Module, error: NotProven) -> str:
    return f"{type(module).__name__} has a forward of its own, and {error}"


def _is_other(module: nn.Module) -> bool:
    """Whether a module is a transposed convolution, or a Conv2d with a forward of its own."""
    weight = plain_or_masked(module, "weight")
    if weight is None or not weight.numel() or not weight.is_floating_point():
        return False
    plain = any(isinstance(module, k) and not has_own_forward(module, k) for k in SPREADING)
    return plain or pads_itself(module)


def row_parts(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """The im2col rows of one input of a layer, a few images' at a time: float64 [groups, N, n].

    Raises:
        NotProven: The layer is none for this input.
    """
    if not isinstance(x, Tensor):
        raise NotProven(f"its input is a {type(x).__name__}")
    images = layer.images(x.detach())
    size = layer.groups * layer.fan_in * layer.positions(images) * 8
    for part in images.split(max(1, _UNFOLD_BYTES // size)):
        part = part.to(layer.weight.device, torch.float64)
        yield patch_rows(part, *layer.geometry, ones=layer.bias)  # type: ignore[misc]


class Autocorrelation:
    """The sum of x x^T over the im2col rows of one layer, or these rows as long as they are few.

    Attributes:
        layer: The layer.
        rows: How many rows it has seen, of each group.
        refusal: Why it is not what `layer` says, or ''; it has no rows then.
    """

    def __init__(self, layer: Layer, few: bool = False):
        """Keeps the rows of a wide layer themselves where there are `few`."""
        self.layer, self.rows, self.refusal = layer, 0, ""
        self._few: list[Tensor] | None = [] if few and layer.fan_in >= _WIDE else None
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Takes in one input of the layer."""
        if self.refusal or (isinstance(x, Tensor) and not x.numel()):
            return
        try:
            for rows in row_parts(self.layer, x):
                self._take(rows)
        except NotProven as error:
            self.rows, self.refusal = 0, _own_forward(self.layer.module, error)

    def _take(self, rows: Tensor) -> None:
        self.rows += rows.shape[1]
        if self._few is None:
            self._accumulate(rows)
            return
        self._few.append(rows)
        if 2 * self.rows > self.layer.fan_in:
            self._make_dense()

    def _accumulate(self, rows: Tensor) -> None:
        if self._sum is None:
            self._sum = rows.new_zeros(len(rows), rows.shape[2], rows.shape[2])
        self._sum.baddbmm_(rows.mT, rows)

    def _make_dense(self) -> None:
        """Sums the rows that were few."""
        few, self._few = self._few or [], None
        while few:
            self._accumulate(few.pop(0))

    def inverse(self, damping: float) -> Tensor | FewRows:
        """The damped inverse of the mean; what it was made of is gone then."""
        if self._few is not None and damping >= _LEAST_DAMPING:
            rows = torch.cat(self._few, 1).div_(self.rows**0.5)
            mean = rows.square().sum((1, 2)) / rows.shape[2]
            self._check(mean)
            return FewRows(rows, damping * mean.where(mean > 0, 1.0))
        self._make_dense()
        assert self._sum is not None
        self._sum /= self.rows
        self._check(self._sum)
        for group in self._sum:
            group.copy_(damped_inverse(group, damping))
        return self._sum

    def _check(self, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            raise ValueError(f"layer {self.layer.name!r} saw NaN or infinite input")


@contextmanager
def observing(layers: Iterable[Layer], see: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Shows `see` every input of the layers, also where the model is compiled."""

    def hook(layer: Layer) -> Callable:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x, *rest = args or (kwargs.get("input", next(iter(kwargs.values()), None)),)
            if isinstance(layer, SpreadLayer):
                layer.set_output(x, kwargs.get("output_size", *rest))
            see(layer, x)

        return before

    handles = [
        layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers
    ]
    try:
        # what is compiled runs as it was written: it would not call hooks put on it later
        eager = compiler_is_loaded()
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()
