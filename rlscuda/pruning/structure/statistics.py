"""A forward whose statistics over channels do not see that channels are gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WithoutStatistics(TorchFunctionMode):
    """Norms over channels become their affine part, and attention forgets its width's scale.

    Means and variances of a forward that are written by hand are those that it would find if the
    channels that are gone were there, and zero.

    Args:
        whole: Shapes of what means and variances are taken of in the whole model, in order, as
            `shapes` of an earlier run has them; None where this is that run.
    """

    def __init__(self, whole: Sequence[torch.Size] | None = None):
        super().__init__()
        self.shapes: list[torch.Size] = []
        self._whole = whole

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _AFFINE:
            function(*args, **kwargs)  # which raises where it does not take that many channels
            return _AFFINE[function](*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            kwargs["scale"] = 1.0
        if function in _MEANS or function in _VARIANCES:
            return self._statistic(function, args, kwargs)
        return function(*args, **kwargs)

    def _statistic(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        found, shape = function(*args, **kwargs), args[0].shape
        place = len(self.shapes)
        self.shapes.append(shape)
        whole = shape if self._whole is None or place >= len(self._whole) else self._whole[place]
        if whole == shape or len(whole) != len(shape):
            return found
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
        kept = math.prod(shape[dim] / whole[dim] for dim in dims)
        if function in _MEANS:
            return found * kept
        count = math.prod(whole[dim] for dim in dims)
        x, keepdim = args[0], bool(kwargs.get("keepdim", False))
        mean = x.mean(tuple(dims), keepdim) * kept
        square = x.square().mean(tuple(dims), keepdim) * kept
        unbiased = kwargs.get("unbiased", kwargs.get("correction", 1))
        variance = (square - mean.square()) * count / (count - int(unbiased))
        spread = variance.sqrt() if function in _DEVIATIONS else variance
        return (spread, mean) if isinstance(found, tuple) else spread


_MEANS = (torch.mean, Tensor.mean)
_DEVIATIONS = (torch.std, Tensor.std, torch.std_mean)
_VARIANCES = (torch.var, Tensor.var, torch.var_mean, *_DEVIATIONS)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    input = input if weight is None else input * weight
    return input if bias is None else input + bias


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    return input if weight is None else input * weight


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    """Divides by the length over each group, which sees who is in it, but no zeros."""
    groups = input.unflatten(1, (num_groups, -1))
    length = (groups.square().sum(2, keepdim=True) + eps).sqrt()
    size = [1, -1, *[1] * (input.dim() - 2)]
    shaped = [None if tensor is None else tensor.view(size) for tensor in (weight, bias)]
    return _layer_norm((groups / length).flatten(1, 2), None, *shaped)


def _batch_norm(input, mean=None, var=None, weight=None, bias=None, training=False, *_, **__):
    """Of a weight that is standardised over what it takes; plain ones keep their statistics."""
    if not training or mean is not None:
        return F.batch_norm(input, mean, var, weight, bias, training, *_, **__)
    size = [1, -1, *[1] * (input.dim() - 2)]
    shaped = [None if tensor is None else tensor.view(size) for tensor in (weight, bias)]
    return _layer_norm(input, None, *shaped)


_AFFINE: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}
