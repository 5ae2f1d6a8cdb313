"""The smallest sets of channels that can be removed: components of torch-pruning's graph.

Every channel of every side of a module is a point; an edge of the dependency graph, a group of a
grouped layer and a shared parameter each join points; what hangs together is a unit.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import Convolution, channel_index, gradient_shape, own_parameters
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    call,
    isolated_copy,
    leaves,
    map_tensors,
    rng_kept,
)

Side = tuple[str, str]  # name of a module, parameter or input, and `in`, `out`, `both` or `input`
Point = tuple[int, int]  # place of a port, channel

_TRANSPARENT = (Tensor, Number, str, bytes, type(None), torch.dtype, torch.device)  # hide no tensor
_TRANSPOSES = ("PermuteBackward", "TransposeBackward")
_MOVES = ("CloneBackward", *_TRANSPOSES)


@dataclass(eq=False)
class Unit:
    """Channels that can only be removed together.

    Attributes:
        channels: Channels of each side that they meet, ascending.
        reason: Why they cannot be removed; '' where they can.
    """

    channels: dict[Side, list[int]] = field(default_factory=dict)
    reason: str = ""


class _Partition:
    """Disjoint sets of points."""

    def __init__(self):
        self._parent: dict[Point, Point] = {}

    def find(self, point: Point) -> Point:
        """The representative of the point's set, which begins with the point alone."""
        parent = self._parent
        root = parent.setdefault(point, point)
        while root != parent[root]:
            root = parent[root]
        while point != root:
            parent[point], point = root, parent[point]
        return root

    def join(self, first: Point, second: Point) -> None:
        """Makes one set of two."""
        self._parent[self.find(second)] = self.find(first)

    def sets(self) -> list[list[Point]]:
        """All sets."""
        found: dict[Point, list[Point]] = {}
        for point in self._parent:
            found.setdefault(self.find(point), []).append(point)
        return list(found.values())


@dataclass(eq=False)
class Traced:
    """What tracing a model shows.

    Attributes:
        units: Every unit whose channels do not reach the model's outputs.
        output_shapes: Shape of each output.
        input_widths: Channels of each raw input that could be followed, by its number.
    """

    units: list[Unit]
    output_shapes: list[tuple[int, ...]]
    input_widths: dict[str, int]


def units_of(model: nn.Module, example_inputs: ExampleInputs) -> Traced:
    """Every unit of a model whose channels do not reach its outputs.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: The model cannot be copied, run on the example inputs, or traced.
    """
    with rng_kept(model), torch.enable_grad():
        graph = _Graph(model, example_inputs)
    return Traced(graph.units(), graph.output_shapes, graph.input_widths)


class _Graph:
    """torch-pruning's dependency graph of a copy of a model, every parameter of it trainable."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs):
        import torch_pruning as tp

        self._kinds = tp.ops.OPTYPE
        self._index = channel_index(tp)
        try:
            self.copy = isolated_copy(model).eval()
        except Exception as error:
            raise ValueError(f"the model cannot be deep-copied: {error}") from error
        for parameter in self.copy.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        self._leaves: list[Tensor] = []
        inputs = map_tensors(self._leaf, example_inputs)
        numbered = enumerate(self._leaves)
        self._inputs = {id(t): str(i) for i, t in numbered if isinstance(t, nn.Parameter)}
        sources = [leaf for leaf in self._leaves if id(leaf) in self._inputs]
        self.input_widths = {self._inputs[id(leaf)]: leaf.shape[1] for leaf in sources}
        self.output_shapes: list[tuple[int, ...]] = []
        self._names: dict[int, str] = {}
        for name, module in self.copy.named_modules():
            self._names.setdefault(id(module), name)
        for name, parameter in self.copy.named_parameters():
            self._names.setdefault(id(parameter), name)
        self.dg = tp.DependencyGraph()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.dg.build_dependency(
                    self.copy,
                    inputs,
                    forward_fn=self._forward,
                    unwrapped_parameters=[(leaf, 1) for leaf in sources],
                    verbose=False,
                )
        except Exception as error:
            raise ValueError(
                f"the model cannot be traced on the example inputs: {error}"
            ) from error

    def _leaf(self, tensor: Tensor) -> Tensor:
        """An input as a parameter, which torch-pruning follows; of three dimensions it cannot."""
        leaf = tensor.detach()
        if tensor.is_floating_point() and tensor.dim() in (2, 4, 5):
            leaf = nn.Parameter(leaf.clone())
        self._leaves.append(leaf)
        return leaf

    def _forward(self, model: nn.Module, inputs: Any) -> list[Tensor]:
        """The outputs, each through one more operation: torch-pruning then sees it as an output."""
        # copies, since a model may change its input in place
        output = call(model, map_tensors(torch.clone, inputs))
        outputs = _checked_outputs(output)
        self.output_shapes = [tuple(tensor.shape) for tensor in outputs]
        return [tensor * 1 for tensor in outputs if tensor.requires_grad]

    def units(self) -> list[Unit]:
        """Every unit whose channels do not reach an output."""
        ports = self._ports()
        points = _Partition()
        for first, second in itertools.chain(_edges(ports), _ties(ports)):
            points.join(first, second)
        units = []
        for members in points.sets():
            met = [(ports[port], channel) for port, channel in members]
            if not any(port.node.type == self._kinds.OUTPUT for port, _ in met):
                unit = _unit(met)
                if unit.channels:
                    units.append(unit)
        return units

    def _ports(self) -> list[_Port]:
        """Every side of every module, parameter, input and operation, and what hangs on it."""
        places: dict[tuple[int, str], int] = {}
        ports: list[_Port] = []
        edges: list[tuple[int, Any]] = []
        for node in self.dg.module2node.values():
            for side in {self._side(node, f) for f in self._functions(node)}:
                places[id(node), side] = len(ports)
                ports.append(self._port(node, side))
            for edge in node.dependencies:
                edges.append((places[id(node), self._side(node, edge.trigger)], edge))
        for place, edge in edges:
            target = places[id(edge.target), self._side(edge.target, edge.handler)]
            ports[place].edges.append((target, self._mappings(edge)))
        return ports

    def _functions(self, node: Any) -> tuple[Any, Any]:
        pruner = self.dg.get_pruner_of_module(node.module)
        return pruner.prune_in_channels, pruner.prune_out_channels

    def _side(self, node: Any, function: Any) -> str:
        take, give = self._functions(node)
        if take == give:
            return "both"
        return "out" if function == give else "in"

    def _port(self, node: Any, side: str) -> _Port:
        if id(node.module) in self._inputs:
            name, kind = self._inputs[id(node.module)], "input"
        elif id(node.module) in self._names:
            name, kind = self._names[id(node.module)], side
        else:
            return _Port(node, None, 0)
        size = self.dg.get_in_channels(node) if side == "in" else self.dg.get_out_channels(node)
        if size is None:  # a PReLU with one parameter
            return _Port(node, None, 0)
        return _Port(node, (name, kind), size)

    def _mappings(self, edge: Any) -> list[Callable[[int], list[int]]]:
        """The changes of a channel's number on the way along an edge."""
        mappings = [self._mapping(m) for m in edge.index_mapping if m is not None]
        backwards = edge.target in edge.source.inputs
        node = edge.source if backwards else edge.target
        if not mappings or node.type != self._kinds.RESHAPE:
            return mappings
        features = _transposed_features(node.grad_fn)
        if features is None:
            return mappings
        channels = {feature: [channel] for channel, row in features.items() for feature in row}
        return [lambda number: (channels if backwards else features).get(number, [])]

    def _mapping(self, mapping: Any) -> Callable[[int], list[int]]:
        def mapped(channel: int) -> list[int]:
            return [index.idx for index in mapping([self._index(idx=channel, root_idx=channel)])]

        return mapped


def _transposed_features(flatten: Any) -> dict[int, list[int]] | None:
    """The features of each channel of what is transposed and then flattened; else None.

    torch-pruning takes the channels for the slowest index, which then they are not. The backward
    functions move a gradient back to where it came from, and so the numbers of the features, too.
    """
    shape, moves, function = gradient_shape(flatten), [flatten], flatten.next_functions[0][0]
    while function is not None and function.name().startswith(_MOVES):
        moves.append(function)
        function = function.next_functions[0][0]
    if len(shape) != 2 or not any(move.name().startswith(_TRANSPOSES) for move in moves):
        return None
    features = torch.arange(shape[1], device="cpu").expand(shape)
    for move in moves:
        features = move(features)
    return dict(enumerate(features[0].flatten(1).tolist()))


def _checked_outputs(output: Any) -> list[Tensor]:
    """The tensors that a model puts out.

    Raises:
        ValueError: There may be some where they cannot be looked for, or no gradient reaches any.
    """
    found = list(leaves(output))
    opaque = {type(leaf).__name__ for leaf in found if not isinstance(leaf, _TRANSPARENT)}
    if opaque:
        raise ValueError("the model must put out tensors in tuples, lists, mappings or dataclasses,"
                         f" got {', '.join(sorted(opaque))}")  # fmt: skip
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
    if not any(tensor.requires_grad for tensor in tensors):
        raise ValueError("the model must put out a tensor that a gradient reaches, which the "
                         f"couplings are found by, got {len(tensors)} without")  # fmt: skip
    return tensors


@dataclass(eq=False)
class _Port:
    """One side of a node of the graph.

    Attributes:
        node: The node.
        side: Name and kind, as members of a unit have them; None for an operation.
        size: Channels; 0 for an operation, which has what reaches it.
        edges: Each port that an edge leads to, with the changes of the channel's number on the way.
    """

    node: Any
    side: Side | None
    size: int
    edges: list[tuple[int, list[Callable[[int], list[int]]]]] = field(default_factory=list)


def _edges(ports: list[_Port]) -> Iterator[tuple[Point, Point]]:
    """Pairs of points that an edge joins, starting from the channels of every module."""
    waiting = [(place, i) for place, port in enumerate(ports) for i in range(port.size)]
    seen = set(waiting)
    # a slice or a roll can send channels round a cycle to ever higher numbers
    bound = 2 * max((port.size for port in ports), default=0)
    yield from zip(waiting, waiting)
    while waiting:
        place, channel = point = waiting.pop()
        for target, mappings in ports[place].edges:
            channels = [channel]
            for mapping in mappings:
                channels = [new for old in channels for new in mapping(old)]
            for found in channels:
                other = (target, found)
                yield point, other
                if other not in seen:
                    seen.add(other)
                    if 0 <= found < (ports[target].size or bound):
                        waiting.append(other)


def _ties(ports: list[_Port]) -> Iterator[tuple[Point, Point]]:
    """Pairs of points joined by the groups of a layer, or by a parameter of two layers."""
    holders: dict[tuple[int, int], int] = {}
    for place, port in enumerate(ports):
        if port.side is None:
            continue
        groups = _groups(port.node.module)
        for i in range(port.size) if groups > 1 else ():
            yield (place, i % (port.size // groups)), (place, i)
        for parameter, axis in _axes(port.node.module, port.side[1], port.node.pruning_dim):
            first = holders.setdefault((id(parameter), axis), place)
            for i in range(port.size) if first != place else ():
                yield (first, i), (place, i)


def _unit(met: list[tuple[_Port, int]]) -> Unit:
    """The unit of some points."""
    unit = Unit()
    for port, channel in met:
        if port.side is None:
            continue
        unit.channels.setdefault(port.side, []).append(channel)
        name = port.side[0]
        unit.reason = unit.reason or _obstacle(port.node.module, name)
        if not 0 <= channel < port.size:
            unit.reason = f"torch-pruning finds more than the {port.size} channels of {name!r}"
    for found in unit.channels.values():
        found.sort()
    return unit


def _groups(module: Any) -> int:
    """Groups whose channels have to stay as many as those of each other."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads
    if isinstance(module, Convolution) and module.groups != module.out_channels:
        return module.groups
    return 1  # of a depthwise convolution each group goes on its own


def _axes(module: Any, side: str, axis: int) -> list[tuple[Tensor, int]]:
    """The parameters that a side of a module cuts, where two modules may share them, and where."""
    if isinstance(module, nn.Parameter):
        return [(module, axis % module.dim())]
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, nn.Embedding):
        return [(module.weight, 1)]
    if isinstance(module, (nn.Linear, Convolution)):
        if getattr(module, "transposed", False):
            side = {"in": "out", "out": "in"}[side]
        if side == "in":
            return [(module.weight, 1)] if getattr(module, "groups", 1) == 1 else []
    elif not isinstance(weight, Tensor) or weight.dim() != 1:
        return []
    return [(p, 0) for p in (weight, bias) if isinstance(p, nn.Parameter)]


def _obstacle(module: Any, name: str) -> str:
    """Why a module cannot be cut, or ''."""
    if isinstance(module, Convolution) and module.groups > 1:
        if module.groups == module.out_channels != module.in_channels:
            return f"{name!r} has several input channels and one output channel a group"
        if module.transposed:
            return f"{name!r} is a transposed convolution with groups"
    for own in ("weight", "bias") if isinstance(module, nn.Module) else ():
        if own not in own_parameters(module) and isinstance(getattr(module, own, None), Tensor):
            return f"the {own} of {name!r} is not a plain parameter (parametrised or masked)"
    return ""
