r"""Layers as a calibration sees them: rows of their input, and the weight that multiplies these.

Whatever the kind of a layer, its output is :math:`Y = X W^T` of im2col rows X [N, n] for each
group; `Layer` says so of Linears and convolutions, and here are those that no rule trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rlscuda.closed_form.few_rows import FewRows
from rlscuda.optim.kinds.modules import SPREADING
from rlscuda.optim.kinds.padded import is_padded_convolution, pads_itself
from rlscuda.optim.layers import Layer
from rlscuda.pruning.matrices.proven import NotProven, convolution_of, smallest_image


class SpreadLayer(Layer):
    r"""A transposed convolution: a plain one of its spread input, with the kernel turned round.

    With stride s, dilation d, padding p and kernel size k, along one dimension,

    .. math:: y_o[j] = \sum_{c, t} W_{c, o, t} x_c[i] \quad \text{over } i s + t d - p = j

    Spread x by s - 1 zeros between its values, :math:`z_c[i s] = x_c[i]`, and turn the taps round,
    :math:`t' = k - 1 - t`; then

    .. math:: y_o[j] = \sum_{c, t'} W_{c, o, k-1-t'} z_c[j + t' d - (d (k - 1) - p)]

    a convolution of stride 1 with :math:`d (k - 1) - p` zeros before (fewer than none cut the
    input) and the output padding's more after. So each output position is one row of n = C k
    values, among them the zeros of taps that do not meet it, and the mean of their outer products
    is the exact second moment: the mean squared output is :math:`tr(W R W^T)`. Taps that never meet
    (of different remainders by s) have zeros there.

    The weight is [C, c / groups, *kernel]: its inputs come first, as those of `transposed` ones.
    """

    def __post_init__(self):
        m = self.module
        self.weight, self.bias_parameter = m.weight, m.bias
        self.transposed, self.pads = True, False
        self.columns = self.weight.numel() // max(1, self.outputs)
        self.depth = (1, 1, 1, (0, 0))
        self._set_more(m.output_padding)

    def _set_more(self, output_padding: Sequence[int]) -> None:
        m, axes = self.module, []
        for k, d, p, more in zip(m.kernel_size, m.dilation, m.padding, output_padding):
            before = d * (k - 1) - p
            axes.append((k, 1, d, (before, before + more)))
        self.set_axes(axes, 0)

    def set_output(self, x: Tensor, size: Sequence[int] | None) -> None:
        """Takes the size of the output of a call with the input `x`, None for that of the module's.

        Args:
            x: [N, C, *sizes] or [C, *sizes].
            size: As the module's forward takes it.
        """
        m, count = self.module, self.weight.dim() - 2
        if size is None:
            self._set_more(m.output_padding)
            return
        axes = zip(x.shape[-count:], m.stride, m.padding, m.dilation, m.kernel_size)
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in axes]
        self._set_more([wanted - one for wanted, one in zip(size[-count:], least)])

    @property
    def outputs(self) -> int:
        """c: rows of the weight as a matrix."""
        return self.module.out_channels

    def as_rows(self, like_weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as [c, columns]."""
        turned = like_weight.flip(self._dimensions).unflatten(0, (self.groups, -1))
        return turned.transpose(1, 2).flatten(0, 1).flatten(1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """What `as_rows` gives, in the weight's shape again."""
        inputs, outputs, *kernel = self.weight.shape
        parts = rows.reshape(self.groups, outputs, inputs // self.groups, *kernel)
        return parts.transpose(1, 2).flatten(0, 1).flip(self._dimensions)

    @property
    def _dimensions(self) -> list[int]:
        """Those of the kernel in the weight."""
        return list(range(2, self.weight.dim()))

    def images(self, x: Tensor) -> Tensor:
        """The layer's input, spread, as [N, C, H, W]."""
        x = x if x.dim() == self.weight.dim() else x.unsqueeze(0)
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.module.stride)]
        spread = x.new_zeros(*x.shape[:2], *sizes)
        places: Any = (..., *(slice(None, None, s) for s in self.module.stride))
        spread[places] = x
        return super().images(spread)


class ProvenLayer(Layer):
    """A Conv2d with a forward of its own that is seen to be a convolution of its padded input.

    Its weight is what that convolution takes, as a weight-standardised one: a function of the
    parameter. It ranks the inputs; a new one could not be written back, unless it is the parameter
    itself.

    Raises:
        NotProven: It is none.
    """

    def __post_init__(self):
        super().__post_init__()
        x = smallest_image(self.module)
        found = [convolution_of(self.module, x, training) for training in (True, False)]
        (_, weight, own), (_, other, _) = found
        if not torch.equal(weight, other):
            raise NotProven("the weight of its convolution is another in training mode")
        if not own:
            self.weight = cast(Any, weight)

    def _padded(self, x: Tensor) -> Tensor:
        padded, weight, _ = convolution_of(self.module, x)
        if not torch.equal(weight, self.weight):
            raise NotProven("the weight of its convolution is another for other inputs")
        return padded


def layer_of(module: Any, name: str = "", index: int = 0, bias: bool = False) -> Layer:
    """A consumer, see `is_consumer`, as its matrix sees it.

    Raises:
        NotProven: It has a forward of its own that is no convolution of a padded input.
    """
    kind: type[Layer] = Layer
    if isinstance(module, SPREADING):
        kind = SpreadLayer
    elif pads_itself(module) and not is_padded_convolution(module):
        kind = ProvenLayer
    return kind(name, module, index, bias)


def layer_weight(module: Any, P: Tensor | FewRows) -> Tensor:
    """The weight as [groups, c / groups, n] float64, with the bias' column where `P` has it."""
    layer = layer_of(module)
    weight = layer.as_rows(layer.weight.detach().double())
    if P.shape[-1] > layer.columns:
        assert module.bias is not None
        weight = torch.cat([weight, module.bias.detach().double()[:, None]], 1)
    return weight.unflatten(0, (P.shape[0], -1)).to(P.device)


def layer_values(module: Any, weight: Tensor) -> dict[str, Tensor]:
    """New values of a layer's weight and, where it has a column, its bias, in their full shapes.

    Args:
        module: See `layer_of`.
        weight: As `layer_weight` gives it.

    Raises:
        NotProven: The weight is made of the parameter in a forward of the module's own.
    """
    layer = layer_of(module)
    if layer.weight is not module.weight:
        raise NotProven(f"{type(module).__name__} makes its weight of the parameter")
    rows = weight.flatten(0, 1)
    values = {"weight": layer.from_rows(rows[:, : layer.columns]).to(module.weight)}
    if rows.shape[1] > layer.columns:
        values["bias"] = rows[:, layer.columns].to(module.bias)
    return values
