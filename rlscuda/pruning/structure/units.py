"""The smallest sets of channels that can be removed, from the labels that a forward has joined."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import BatchNorm, Convolution, InstanceNorm, own_buffers, own_parameters
from rlscuda.optim.kinds.modules import is_transposed
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    call,
    isolated_copy,
    leaves,
    map_tensors,
    output_tensors,
    rng_kept,
)
from rlscuda.pruning.structure.follower import Follower, Product, Scales, Site, Table
from rlscuda.pruning.structure.rules.labels import Labels

Side = tuple[str, str]  # name of a module, parameter or input, and `in`, `out`, `both` or `input`
Axis = tuple[str, int]  # name of a parameter or buffer, and a dimension of it

_TRANSPARENT = (Tensor, Number, str, bytes, type(None), torch.dtype, torch.device)  # hide no tensor
_VECTORS = (BatchNorm, InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
_RECURRENT_INPUTS = (("weight_ih_l0", 1), ("weight_ih_l0_reverse", 1))
_MASKED = "the {} of {!r} is not a plain parameter (parametrised or masked)"


@dataclass(eq=False)
class Unit:
    """Channels that can only be removed together.

    Attributes:
        channels: Channels of each side that they meet, ascending.
        places: Where they lie in each parameter and buffer, ascending.
        label: Which tells it from others.
        reason: Why they cannot be removed; '' where they can.
    """

    label: int
    channels: dict[Side, list[int]] = field(default_factory=dict)
    places: dict[Axis, list[int]] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Followed:
    """What following a forward shows.

    Attributes:
        labels: All labels, before tables tie any.
        tensors: Labels along each labelled dimension of a parameter or buffer.
        sides: The side of each, and its channels by place; for inputs, that of the input.
        tables: Arrays that must stay arrays.
        sites: Where sizes are given.
        products: Inner products of activations.
        put_out: Labels that reach the model's outputs.
        output_shapes: Shape of each output.
        input_widths: Channels of each raw input that could be followed, by its number.
        elsewhere: Modules whose tensors are also used in the forward of another.
        ties: Labels that go together, pair by pair, for what the forward makes of their number.
    """

    labels: Labels
    tensors: dict[Axis, Tensor]
    sides: list[tuple[Side, Tensor, Tensor]]
    tables: list[Table]
    sites: list[Site]
    products: list[Product]
    put_out: set[int]
    output_shapes: list[tuple[int, ...]]
    input_widths: dict[str, int]
    elsewhere: frozenset[str]
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def units(self, axes: Mapping[int, int]) -> tuple[list[Unit], Labels]:
        """Every unit whose channels do not reach an output, and the labels that say so.

        Args:
            axes: Number of a table -> the axis along which it is to shrink; the last by default.
        """
        labels = self.labels.copy()
        for pair in self.ties:
            labels.join_all(*pair)
        for number, table in enumerate(self.tables):
            tie(labels, table, axes.get(number))
        labels.resolve()
        out = {labels.find(label) for label in self.put_out}
        units: dict[int, Unit] = {}

        def unit(label: int) -> Unit | None:
            root = labels.find(label)
            if root in out:
                return None
            return units.setdefault(root, Unit(root, reason=labels.fixed(root)))

        for axis, own in self.tensors.items():
            for place, label in enumerate(own.tolist()):
                if (found := unit(label)) is not None:
                    found.places.setdefault(axis, []).append(place)
        for side, own, channels in self.sides:
            for label, channel in zip(own.tolist(), channels.tolist()):
                if (found := unit(label)) is not None:
                    found.channels.setdefault(side, []).append(channel)
        for found in units.values():
            found.channels = {s: sorted(set(c)) for s, c in found.channels.items()}
        return [found for found in units.values() if found.channels], labels


def tie(labels: Labels, table: Table, axis: int | None) -> None:
    """Joins what goes together when a table shrinks along one of its axes alone."""
    chosen = table.axis if table.axis is not None else axis
    chosen = table.labels.dim() - 1 if chosen is None else chosen
    rows = table.labels.movedim(chosen, -1).flatten(0, -2)
    labels.join_all(rows[:1].expand_as(rows), rows)


def follow(model: nn.Module, example_inputs: ExampleInputs) -> Followed:
    """Follows the channels of a model through one forward of a copy of it.

    Raises:
        ValueError: The model cannot be copied or run on the example inputs.
    """
    try:
        copy = isolated_copy(model).eval()
    except Exception as error:
        raise ValueError(f"the model cannot be deep-copied: {error}") from error
    follower = Follower(copy)

    def noted(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in output_tensors(output):
            follower.site(tensor)

    for module in copy.modules():  # whose width is an attribute alone
        if len(list(module.modules())) == 1 and not list(module.parameters()):
            module.register_forward_hook(noted)
    tensors, sides = _labelled(copy, follower)
    widths: dict[str, int] = {}
    numbers = itertools.count()

    def taken(tensor: Tensor) -> Tensor:
        """An input, whose dimension 1 has labels where that can be of channels."""
        own, name = tensor.detach().clone(), str(next(numbers))
        if own.is_floating_point() and own.dim() in (2, 4, 5):
            widths[name] = own.shape[1]
            label = follower.labels.new(own.shape[1])
            follower.give(own, [label.view(1, -1, *[1] * (own.dim() - 2))])
            channels = torch.arange(own.shape[1], device="cpu")
            sides.append((name, (name, "input"), label, channels))
        return own

    inputs = map_tensors(taken, example_inputs)
    try:
        with rng_kept(model), torch.no_grad(), _plain_operations(), Scales(follower), follower:
            output = call(copy, inputs)
    except Exception as error:
        raise ValueError(f"the model cannot be traced on the example inputs: {error}") from error
    outputs = _checked_outputs(output)
    for name, module in copy.named_modules():
        _tie_module(follower.labels, name, module, tensors)
        if obstacle := _obstacle(module, name):
            for (tensor, _), labels in tensors.items():
                if tensor.startswith(f"{name}." if name else ""):
                    follower.labels.fix(labels, obstacle)
    put_out = {
        label
        for output in outputs
        for plane in follower.planes(output)
        for label in torch.unique(plane).tolist()
    }
    met = {name for name, tensor in _all(copy) if id(tensor) in follower.met}
    return Followed(
        follower.labels,
        {axis: labels for axis, labels in tensors.items() if axis[0] in met},
        [
            (side, own, channels)
            for name, side, own, channels in sides
            if name in met or side[1] == "input"
        ],
        _distinct(follower.tables),
        follower.sites,
        follower.products,
        put_out,
        [tuple(output.shape) for output in outputs],
        widths,
        frozenset(follower.elsewhere),
    )


def _distinct(tables: list[Table]) -> list[Table]:
    """Tables without repetitions, as of a layer that is called twice."""
    seen: dict[Any, Table] = {}
    for table in tables:
        seen.setdefault((tuple(table.labels.shape), table.axis,
                         tuple(table.labels.flatten().tolist())), table)  # fmt: skip
    return list(seen.values())


@contextmanager
def _plain_operations() -> Iterator[None]:
    """Without fused forms of whole layers, which would hide what they do."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which torch gives when it reads its own flags
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _all(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for own in (own_parameters(module), own_buffers(module)):
            for name, tensor in own.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _labelled(
    model: nn.Module, follower: Follower
) -> tuple[dict[Axis, Tensor], list[tuple[str, Side, Tensor, Tensor]]]:
    """Gives every axis of every parameter and buffer its labels, and says what side it is of."""
    tensors: dict[Axis, Tensor] = {}
    sides: list[tuple[str, Side, Tensor, Tensor]] = []
    known: dict[int, list[Tensor | None]] = {}
    attention = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
    }
    for prefix, module in model.named_modules():
        for own in (own_parameters(module), own_buffers(module)):
            for name, tensor in own.items():
                if tensor is None or tensor.numel() <= 1:
                    continue
                full = f"{prefix}.{name}" if prefix else name
                if id(tensor) not in known:
                    known[id(tensor)] = _give_labels(follower, module, tensor)
                for axis, labels in enumerate(known[id(tensor)]):
                    if labels is None:
                        continue
                    tensors[full, axis] = labels
                    if id(module) in attention and not isinstance(module, nn.MultiheadAttention):
                        continue
                    side = _side(module, prefix, full, name, tensor, axis)
                    for kind, channels in side:
                        sides.append((full, kind, *_spread(labels, channels)))
    return tensors, sides


def _give_labels(follower: Follower, module: nn.Module, tensor: Tensor) -> list[Tensor | None]:
    taps = 2 if isinstance(module, Convolution) else tensor.dim()
    found: list[Tensor | None] = []
    planes = []
    for axis, size in enumerate(tensor.shape):
        if size > 1 and axis < taps:
            labels = follower.labels.new(size)
            shape = [size if a == axis else 1 for a in range(tensor.dim())]
            planes.append(labels.view(shape))
            found.append(labels)
        else:
            found.append(None)
    follower.give(tensor, planes)
    return found


def _spread(labels: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """A label for each channel; several channels may have one."""
    if channels.dim() == 1:
        return labels, channels
    return labels[:, None].expand(channels.shape).flatten(), channels.flatten()


def _side(
    module: nn.Module, prefix: str, full: str, name: str, tensor: Tensor, axis: int
) -> list[tuple[Side, Tensor]]:
    """The sides that a dimension of a tensor is of, and the channels there of each place."""
    places = torch.arange(tensor.shape[axis], device="cpu")
    if isinstance(module, nn.Linear) or is_transposed(module) or isinstance(module, Convolution):
        turned = is_transposed(module) or bool(getattr(module, "transposed", False))
        if name == "bias":
            kind = "both" if _depthwise(module) else "out"
            return [((prefix, kind), places)]
        if name != "weight" or axis > 1:
            return []
        if _depthwise(module):
            return [((prefix, "both"), places)]
        groups = getattr(module, "groups", 1)
        if (axis == 1) == turned:
            per = tensor.shape[1 - axis]
            if groups > 1 and per == 1 and not turned:  # several outputs of one input
                each = tensor.shape[0] // groups  # groups go, and no columns of others
                return [((prefix, "out"), places), ((prefix, "both"), places // each)]
            return [((prefix, "out"), places)]
        if groups > 1 and not turned:  # where a group has one input, that has no label
            size = tensor.shape[1]
            starts = size * torch.arange(groups, device="cpu")
            return [((prefix, "in"), places[:, None] + starts)]
        return [((prefix, "in"), places)]
    if isinstance(module, nn.MultiheadAttention):
        if (name, axis) in (("in_proj_weight", 1), ("q_proj_weight", 1)):
            return [((prefix, "both"), places)]
        return []
    if isinstance(module, nn.Embedding):
        return [((prefix, "both"), places)] if axis == 1 else []
    if isinstance(module, nn.RNNBase):
        return [((prefix, "in"), places)] if (name, axis) in _RECURRENT_INPUTS else []
    if isinstance(module, _VECTORS):
        return [((prefix, "both"), places)] if axis == tensor.dim() - 1 else []
    if not isinstance(tensor, nn.Parameter):
        return []
    last = max(dim for dim, size in enumerate(tensor.shape) if size > 1)
    return [((full, "both" if axis == last else f"dimension {axis}"), places)]


def _depthwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == module.in_channels == module.out_channels


def _obstacle(module: nn.Module, name: str) -> str:
    """Why a module cannot be cut, or ''."""
    for own in ("weight", "bias"):
        held = own in own_parameters(module) or own in own_buffers(module)
        if not held and isinstance(getattr(module, own, None), Tensor):
            return _MASKED.format(own, name)
    return ""


def _tie_module(labels: Labels, name: str, module: nn.Module, tensors: dict[Axis, Tensor]) -> None:
    """What a module of torch demands of its widths beyond what its operations show."""

    def own(part: str, axis: int) -> Tensor | None:
        return tensors.get((f"{name}.{part}" if name else part, axis))

    if isinstance(module, nn.MultiheadAttention):
        rows = own("in_proj_weight", 0)
        if rows is not None:
            width, parts = own("in_proj_weight", 1), list(rows.chunk(3))
        else:
            width = own("q_proj_weight", 1)
            parts = [t for part in "qkv" if (t := own(f"{part}_proj_weight", 0)) is not None]
        if width is not None:
            for found in parts:
                labels.join_all(width, found)
    elif isinstance(module, nn.RNNBase):
        kind = type(module).__name__
        for part, parameter in own_parameters(module).items():
            for axis in range(parameter.dim() if parameter is not None else 0):
                states = own(part, axis)
                if states is not None and (part, axis) not in _RECURRENT_INPUTS:
                    labels.fix(states, f"the width of {kind} {name!r} stays")


def _checked_outputs(output: Any) -> list[Tensor]:
    """The tensors that a model puts out.

    Raises:
        ValueError: There may be some where they cannot be looked for, or none is of numbers.
    """
    found = list(leaves(output))
    opaque = {type(leaf).__name__ for leaf in found if not isinstance(leaf, _TRANSPARENT)}
    opaque = {name for name in opaque if not re.search("Cache$", name)}
    if opaque:
        raise ValueError("the model must put out tensors in tuples, lists, mappings or dataclasses,"
                         f" got {', '.join(sorted(opaque))}")  # fmt: skip
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
    if not any(tensor.is_floating_point() for tensor in tensors):
        raise ValueError("the model must put out a floating-point tensor, got "
                         f"{[str(tensor.dtype) for tensor in tensors]}")  # fmt: skip
    return tensors
