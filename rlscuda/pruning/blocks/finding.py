"""Residual branches of any model: sums whose one operand is a shortcut of the other.

A branch is what dies when its operand of the sum is cut. It is a residual one where the sum's other
operand is the value that the branch starts from (or a projection of it, of fewer weights).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from rlscuda.pruning.blocks.dataflow import Flow, Run, record
from rlscuda.pruning.blocks.proving import prove
from rlscuda.pruning.blocks.stand_ins import Absent, Passed, StandIn
from rlscuda.pruning.running.calls import ExampleInputs, isolated_copy, rng_kept

_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")
_OF_IMAGES = ("convolution", "batch_norm", "instance_norm", "group_norm")  # in operators' names
_TURNS = ("aten.permute.default", "aten.transpose.int")


@dataclass(eq=False)
class Block:
    """A residual branch that can be removed.

    Attributes:
        name: What holds all of its modules, or that of its last module where this holds more.
        modules: Qualified names of its modules, the outermost ones, in the order in which they run.
        exit: That of them whose output the rest of the model sees.
        stand_ins: What takes the place of each where the branch is gone.
        parameters: Elements of its parameters.
        channel: Dimension of its channels, 1 for images, else -1.
        shape: Shape of what `exit` puts out for the example inputs.
        enters: Shape of what `exit` is given once the others pass their inputs on.
    """

    name: str
    modules: list[str]
    exit: str
    stand_ins: dict[str, StandIn]
    parameters: int
    channel: int
    shape: tuple[int, ...]
    enters: tuple[int, ...]

    def touches(self, other: Block) -> bool:
        """Whether it lies in another, or around it."""
        return any(
            one == two or one.startswith(f"{two}.") or two.startswith(f"{one}.")
            for one in self.modules
            for two in other.modules
        )


@dataclass(frozen=True, eq=False)
class Blocks:
    """What was found of a model.

    Attributes:
        found: Branches, each proven removable, in the order of their sums.
        refused: Name of a branch that is not -> why.
    """

    found: list[Block]
    refused: dict[str, str]

    def block(self, name: str) -> Block:
        """The block of that name.

        Raises:
            KeyError: There is none; the message says why if it was refused.
        """
        for block in self.found:
            if block.name == name:
                return block
        reason = self.refused.get(name)
        raise KeyError(f"no block {name!r}" + (f": {reason}" if reason else ""))


@dataclass(eq=False)
class _Branch:
    """A branch as the dataflow has it: where it is summed, its operand, what dies with it."""

    sum: int
    operand: int
    region: set[int]
    runs: list[Run] = field(default_factory=list)


def find_blocks(model: nn.Module, example_inputs: ExampleInputs) -> Blocks:
    """Every residual branch x + F(x) of a model that can be removed, and why others cannot.

    The model runs on the example inputs, in eval mode. Its branches are read off the operators that
    ran, so they need not be modules of their own: convolutions and norms that a block's forward
    calls one after the other are a branch, too. Each is proven on a copy: with it removed the model
    puts out what it puts out with zeros in its place.

    Args:
        model: The model; it is only read.
        example_inputs: What it can be called with: a tensor, a tuple of arguments, or a mapping of
            named ones.

    Raises:
        ValueError: The model cannot be copied, or fails on the example inputs.
    """
    try:
        copy = isolated_copy(model).eval()
        with rng_kept(model):
            flow = record(copy, example_inputs)
    except Exception as error:
        raise ValueError(f"the model cannot be followed on the example inputs: {error}") from error
    modules = dict(copy.named_modules())
    branches = [b for number in range(len(flow.operations)) for b in _branch(flow, number)]
    found: list[Block] = []
    refused: dict[str, str] = {}
    for branch in branches:
        branch.runs = _outermost(flow, branch)
    names = _names([branch.runs for branch in branches])
    for name, branch in zip(names, branches):
        try:
            found.append(_block(name, branch, flow, model, modules, example_inputs))
        except ValueError as error:
            refused[name] = str(error)
    return Blocks(found, refused)


def _branch(flow: Flow, number: int) -> list[_Branch]:
    """The residual branch that an operation sums up with its shortcut, if it does."""
    operation = flow.operations[number]
    if operation.name not in _SUMS or len(operation.inputs) != 2:
        return []
    shapes = {tuple(flow.tensors[value].shape) for value in operation.inputs}
    if len(shapes) > 1 or not flow.tensors[operation.inputs[0]].is_floating_point():
        return []
    if number not in flow.alive:
        return []
    regions = [flow.alive - flow.live((number, place)) for place in (0, 1)]
    for place, region in enumerate(regions):
        other = regions[1 - place]
        weights, others = _weights(flow, region), _weights(flow, other)
        starts = _enters(flow, other) if other else {operation.inputs[1 - place]}
        is_shortcut = others <= 1 and len(starts) == 1 and starts <= _enters(flow, region)
        if is_shortcut and weights > others:
            return [_Branch(number, place, region)]
    return []


def _weights(flow: Flow, region: set[int]) -> int:
    """Operations of a region that multiply by a weight."""
    return sum(
        any(v in flow.parameters and flow.tensors[v].dim() > 1 for v in flow.operations[o].inputs)
        for o in region
    )


def _enters(flow: Flow, region: set[int]) -> set[int]:
    """Values that a region is given that depend on what the model was given."""
    made = {value for number in region for value in flow.operations[number].outputs}
    taken = {value for number in region for value in flow.operations[number].inputs}
    return {v for v in taken - made if v in flow.data and flow.tensors[v].is_floating_point()}


def _outermost(flow: Flow, branch: _Branch) -> list[Run]:
    """The runs of modules that lie in a branch as a whole, none within another."""
    chosen: list[Run] = []
    for run in flow.runs:
        inside = flow.alive.intersection(range(run.start, run.stop))
        if inside and inside <= branch.region and not (chosen and run.stop <= chosen[-1].stop):
            chosen.append(run)
    return chosen


def _names(runs: list[list[Run]]) -> list[str]:
    """A name for each branch: what its modules have in common, or else that of the last one."""
    prefixes = []
    for own in runs:
        parts = [run.name.split(".") for run in own]
        common = parts[0][:-1] if parts else []
        for other in parts:
            common = [a for a, b in zip(common, other) if a == b]
        prefixes.append(".".join(common))
    lasts = [own[-1].name if own else "" for own in runs]
    names = prefixes
    while True:  # one branch of another's last module may get the name that both have in common
        unclear = {name for name in names if not name or names.count(name) > 1}
        better = [last if name in unclear else name for name, last in zip(names, lasts)]
        if better == names:
            return names
        names = better


def _block(
    name: str,
    branch: _Branch,
    flow: Flow,
    model: nn.Module,
    modules: dict[str, nn.Module],
    example_inputs: ExampleInputs,
) -> Block:
    """The block of a branch.

    Raises:
        ValueError: It cannot be removed.
    """
    runs = [run for run in branch.runs if _is_own(run, branch, flow)]
    weighted = [run for run in runs if any(True for _ in modules[run.name].parameters())]
    if not weighted:
        raise ValueError("no module of its own holds its weights")
    last = weighted[-1]
    if any(run.name == last.name for run in runs if run is not last):
        raise ValueError(f"{last.name!r} runs more than once in it")
    inside = {o for run in runs for o in range(run.start, run.stop)}
    writes = any(flow.operations[o].writes for o in branch.region - inside)
    before, after = runs[: runs.index(last)], runs[runs.index(last) + 1 :]
    stand_ins: dict[str, StandIn] = {}
    for run in before + after:
        stand_ins[run.name] = Passed(_outputs(run), copies=writes and run.name == runs[0].name)
    shape = _first_output(last).shape
    channel = _channel(flow, last)
    own = {p for run in runs for p in modules[run.name].parameters()}
    block = Block(
        name=name,
        modules=list(dict.fromkeys(run.name for run in runs)),
        exit=last.name,
        stand_ins=stand_ins,
        parameters=sum(p.numel() for p in own),
        channel=channel,
        shape=tuple(shape),
        enters=(),
    )
    proof = (model, branch.sum, branch.operand, example_inputs)
    try:
        stand_ins[last.name] = Absent(_outputs(last))
        block.enters = prove(*proof, block.stand_ins, block.exit)
    except ValueError:
        stand_ins[last.name] = Passed(_outputs(last))
        enters = prove(*proof, block.stand_ins, block.exit, zero=False)
        stand_ins[last.name] = _zeros(enters, tuple(shape), channel, _outputs(last))
        block.enters = prove(*proof, block.stand_ins, block.exit)
    return block


def _is_own(run: Run, branch: _Branch, flow: Flow) -> bool:
    """Whether a module runs nowhere but in the branch."""
    return all(
        flow.alive.intersection(range(other.start, other.stop)) <= branch.region
        for other in flow.runs
        if other.name == run.name
    )


def _channel(flow: Flow, run: Run) -> int:
    """Dimension of the channels of what a module puts out: 1 of images, -1 of tokens.

    It is that of its last operator with a weight, turned as often as the output is after that.
    """
    turned = False
    for operation in reversed(flow.operations[run.start : run.stop]):
        if operation.name in _TURNS:
            turned = not turned
        scales = operation.name.startswith("aten.mul")
        if not scales and any(value in flow.parameters for value in operation.inputs):
            of_images = any(kind in operation.name for kind in _OF_IMAGES)
            return 1 if of_images != turned else -1
    return -1


def _first_output(run: Run) -> Tensor:
    first = run.output[0] if isinstance(run.output, (tuple, list)) and run.output else run.output
    if not isinstance(first, Tensor):
        raise ValueError(f"{run.name!r} must put out a tensor or a tuple that begins with one, got "
                         f"{type(run.output).__name__}")  # fmt: skip
    return first


def _outputs(run: Run) -> int:
    """See `StandIn`."""
    _first_output(run)
    return 0 if isinstance(run.output, Tensor) else len(run.output)


def _zeros(enters: tuple[int, ...], shape: tuple[int, ...], channel: int, outputs: int) -> Absent:
    """Zeros of the branch's shape, for what its exit is given.

    Raises:
        ValueError: The shapes have no rule in common.
    """
    if len(enters) != len(shape):
        raise ValueError(f"what its last module puts out, {list(shape)}, is not shaped like what "
                         f"it would be given, {list(enters)}")  # fmt: skip
    dim = channel % len(shape)
    strides = [
        1 if place == dim else max(1, math.ceil(old / new))
        for place, (old, new) in enumerate(zip(enters, shape))
    ]
    width = 0 if shape[dim] == enters[dim] else shape[dim]
    return Absent(outputs, True, dim, width, tuple(strides[1:]))
