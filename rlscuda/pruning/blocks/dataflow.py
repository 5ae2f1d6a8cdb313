"""The dataflow of one forward: operators, the values they pass on, the modules they ran in.

It is recorded below Python, so that it holds for whatever code a model is written in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import TorchDispatchMode, arguments_of, storage_key
from rlscuda.pruning.running.calls import ExampleInputs, call, output_tensors


@dataclass(frozen=True)
class Operation:
    """One operator that ran.

    Attributes:
        name: Of the operator, as `aten.add.Tensor`.
        inputs: Numbers of the values it took.
        outputs: Numbers of those it gave; what it wrote to counts as new.
        writes: Whether it wrote to one of its inputs.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    writes: bool


@dataclass(eq=False)
class Run:
    """One call of a module.

    Attributes:
        name: Qualified name of the module.
        start: Number of the first operation inside.
        stop: That after the last one.
        output: What it returned.
    """

    name: str
    start: int
    stop: int = -1
    output: Any = None


@dataclass(eq=False)
class Flow:
    """One forward.

    Attributes:
        operations: In the order in which they ran.
        runs: Of modules, in the order of their starts, the model's own first.
        tensors: By value, as they were when it was given; later writes show.
        parameters: Values that are parameters.
        given: Values that the model was given.
        results: Values of the model's output.
    """

    operations: list[Operation] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    parameters: set[int] = field(default_factory=set)
    given: set[int] = field(default_factory=set)
    results: tuple[int, ...] = ()

    def live(self, cut: tuple[int, int] | None = None) -> set[int]:
        """Operations that the results need, but for a cut.

        Args:
            cut: Number of an operation, and the place of an input that it is to do without.
        """
        needed, found = set(self.results), set()
        for number in range(len(self.operations) - 1, -1, -1):
            operation = self.operations[number]
            if needed.isdisjoint(operation.outputs):
                continue
            found.add(number)
            lacks = cut[1] if cut and cut[0] == number else -1
            needed.update(v for place, v in enumerate(operation.inputs) if place != lacks)
        return found

    @cached_property
    def alive(self) -> set[int]:
        """Operations that the results need."""
        return self.live()

    @cached_property
    def data(self) -> set[int]:
        """Values that depend on what the model was given."""
        found = set(self.given)
        for operation in self.operations:
            if not found.isdisjoint(operation.inputs):
                found.update(operation.outputs)
        return found


@torch.no_grad()
def record(
    model: nn.Module, example_inputs: ExampleInputs, cut: tuple[int, int] | None = None
) -> Flow:
    """The dataflow of a forward; the model is to be a copy without hooks of others.

    Args:
        model: The model.
        example_inputs: What it can be called with.
        cut: Number of an operation, and the place of an input that is to be zeros.

    Raises:
        Exception: Whatever the model raises on the example inputs.
    """
    recorder = _Recorder(model, example_inputs, cut)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            enter = recorder.enter(name)
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(recorder.leave).remove)
        with recorder:
            output = call(model, example_inputs)
    flow = recorder.flow
    flow.results = tuple(recorder.number(tensor) for tensor in output_tensors(output))
    return flow


class _Recorder(TorchDispatchMode):
    """Numbers values as operators give them.

    A tensor's number is that of the value that it holds now; all tensors are kept, so that no
    other takes one's place in memory.
    """

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs, cut: tuple[int, int] | None
    ):
        super().__init__()
        self.flow, self._cut = Flow(), cut or (-1, 0)
        self._numbers: dict[int, int] = {}
        self._sharing: dict[int, list[Tensor]] = {}
        self._open: list[Run] = []
        self.flow.parameters = {self.number(parameter) for parameter in model.parameters()}
        self.flow.given = {self.number(tensor) for tensor in output_tensors(example_inputs)}

    def number(self, tensor: Tensor, anew: bool = False) -> int:
        """Of the value that a tensor holds."""
        if anew or id(tensor) not in self._numbers:
            if id(tensor) not in self._numbers and tensor.layout == torch.strided:
                self._sharing.setdefault(storage_key(tensor), []).append(tensor)
            self._numbers[id(tensor)] = len(self.flow.tensors)
            self.flow.tensors.append(tensor)
        return self._numbers[id(tensor)]

    def enter(self, name: str) -> Callable:
        """A pre-hook of the module of that name."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            run = Run(name, len(self.flow.operations))
            self.flow.runs.append(run)
            self._open.append(run)

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook of every module."""
        run = self._open.pop()
        run.stop, run.output = len(self.flow.operations), output

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        taken = tuple(map(self.number, output_tensors((args, kwargs))))
        if len(self.flow.operations) == self._cut[0]:  # in place, for it may be written there
            args[self._cut[1]].zero_()
        result = func(*args, **kwargs)
        written = _written(func, args, kwargs)
        aliases = [t for w in written for t in self._sharing.get(storage_key(w), [w])]
        given = [t for t in output_tensors(result) if all(t is not a for a in aliases)]
        outputs = [self.number(tensor, anew=True) for tensor in (*aliases, *given)]
        self.flow.operations.append(Operation(str(func), taken, tuple(outputs), bool(written)))
        return result


def _written(func: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to."""
    arguments = arguments_of(func)
    pairs = [*zip(arguments, args), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    return [
        tensor
        for argument, value in pairs
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in output_tensors(value)
    ]
