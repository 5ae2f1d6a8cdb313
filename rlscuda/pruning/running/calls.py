"""Running a model without a trace in it: its inputs, and copies that may be run and cut."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import BatchNorm, tree_leaves, tree_map, unwrapped
from rlscuda.pruning.running.hooks import copy_with_hooks

ExampleInputs = Tensor | tuple | list | Mapping[str, Any]


def leaves(value: Any) -> Iterator[Any]:
    """What a value is nested of, also in dataclasses and in subclasses of mappings and sequences.

    Pytrees, which torch goes by, know neither unless they are registered.
    """
    for leaf in tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            inside: Iterable[Any] = [getattr(leaf, f.name) for f in dataclasses.fields(leaf)]
        elif isinstance(leaf, Mapping):
            inside = leaf.values()
        elif isinstance(leaf, (list, tuple)):
            inside = leaf
        else:
            yield leaf
            continue
        for part in inside:
            yield from leaves(part)


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, whatever it is nested in."""
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]


def map_tensors(change: Any, example_inputs: ExampleInputs) -> Any:
    """The same inputs with every tensor changed."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, example_inputs)


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name that it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def isolated_copy(model: nn.Module, tensors: Mapping[Tensor, Tensor] | None = None) -> nn.Module:
    """A deep copy of `model` that has nothing in common with it.

    Hooks of forwards are part of what the model computes: they stay, and what they hold is copied
    with it, see `copy_with_hooks`; those of optimizers and trackers of this package do not.

    Args:
        model: The model.
        tensors: What the copy is to hold in place of a parameter or buffer; others are cloned.

    Raises:
        ValueError: A hook holds something of the model that cannot be copied.
    """
    return copy_with_hooks(model, {id(old): new for old, new in (tensors or {}).items()})


def train_but_norms(copy: nn.Module) -> nn.Module:
    """Puts a copy into training mode, but for batch norms, which refuse a batch of one value."""
    copy.train()
    for module in copy.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return copy


@contextmanager
def rng_kept(model: nn.Module) -> Iterator[None]:
    """Leaves the random state of the CPU, and of the GPUs that hold `model`, as it was."""
    tensors = (*model.parameters(), *model.buffers())
    gpus = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        yield


@contextmanager
def running(problem: str) -> Iterator[None]:
    """Raises ValueError for whatever is raised in the block where a model is run or traced.

    A model's code raises anything at all.

    Args:
        problem: What it means; the error is put behind it.
    """
    try:
        yield
    except (ValueError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{problem}: {type(error).__name__}: {error}; the layers around what it is about may "
            "be named in ignored"
        ) from error


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Calls a model with a tensor, a sequence of arguments, or a mapping of named ones."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one forward.

    Attributes:
        args: Positional.
        kwargs: By name.
        batch: Length of dimension 0 of the first tensor among them, 1 if that is a scalar.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int

    def __call__(self, model: nn.Module) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    def batched(self, value: Any) -> bool:
        """Whether an argument is a tensor with the batch as its dimension 0."""
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.batch

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        return output_tensors((self.args, self.kwargs))

    def to(self, device: str | torch.device) -> Call:
        """The same call on another device."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Call(tree_map(move, self.args), tree_map(move, self.kwargs), self.batch)

    def resized(self, batch: int) -> Call:
        """The same call with samples repeated or left out to make a batch of this size."""

        def resize(value: Any) -> Any:
            if not self.batched(value):
                return value
            return value[torch.arange(batch, device=value.device) % self.batch]

        return Call(tree_map(resize, self.args), tree_map(resize, self.kwargs), batch)


def call_of(example_inputs: Any) -> Call:
    """How example inputs are passed to a model.

    Args:
        example_inputs: A tensor, a tuple or list of positional arguments, or a mapping of named
            ones.

    Raises:
        TypeError: There is no tensor among them.
        ValueError: Their batch is empty.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        args = (example_inputs,)
    tensors = output_tensors((args, kwargs))
    if not tensors:
        raise TypeError(
            "example_inputs must be a tensor, or a tuple, list or mapping with a tensor among its "
            f"values, got {type(example_inputs).__name__}"
        )
    batch = tensors[0].shape[0] if tensors[0].dim() else 1
    if batch == 0:
        raise ValueError(f"example_inputs must not be empty, got {list(tensors[0].shape)}")
    return Call(args, kwargs, batch)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's flag and the RNG are as before."""
    flags = {module: module.training for module in model.modules()}
    try:
        with rng_kept(model), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def feed(model: nn.Module, batch: Any) -> Any:
    """Calls a model with one batch of a loader, see `inputs_of`.

    Raises:
        TypeError: The batch is none that can be fed, or lacks an argument that the model needs.
    """
    inputs = inputs_of(model, batch)
    try:
        return call(model, inputs)
    except TypeError as error:
        named = inputs if isinstance(inputs, Mapping) else {}
        try:
            inspect.signature(unwrapped(model).forward).bind(*([] if named else [inputs]), **named)
        except TypeError as reason:
            raise _unfit(model, batch, f"; {reason}") from error
        raise


def twice(loader: Iterable | None) -> Iterator[tuple[Any, Any]]:
    """Each batch as two models take it that take the same; of no loader, none.

    A loader is begun where the first is asked for, and so draws of the random state there.
    """
    for batch in () if loader is None else loader:
        yield batch, batch


def inputs_of(model: nn.Module, batch: Any) -> Tensor | dict[str, Any]:
    """What a model takes of one batch of a loader, as `call` passes it on.

    Args:
        model: The model; the batch is moved to the device of its first parameter, if it has any.
        batch: A tensor; a tuple or list whose first item is the input; or a mapping, of which the
            model's forward gets the items it names.

    Raises:
        TypeError: The batch is none of these.
    """
    first = next(model.parameters(), None)
    device = None if first is None else first.device  # which leaves a tensor where it is
    if isinstance(batch, Mapping):
        parameters = _forward_parameters(model)
        every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = {k: v for k, v in batch.items() if every or k in parameters}
        if not named:
            raise _unfit(model, batch)
        return map_tensors(lambda tensor: tensor.to(device=device), named)
    x = _first(batch)
    if not isinstance(x, Tensor):
        raise _unfit(model, batch)
    return x.to(device=device)


def _unfit(model: nn.Module, batch: Any, reason: str = "") -> TypeError:
    """What to raise of a batch that a model cannot be fed."""
    if isinstance(batch, Mapping):
        got = f"a mapping of {', '.join(map(repr, batch))}"
    elif isinstance(batch, (tuple, list)):
        got = f"a {type(batch).__name__} of {', '.join(type(one).__name__ for one in batch[:4])}"
    else:
        got = type(batch).__name__
    return TypeError(
        "loader must give tensors, tuples or lists that begin with one, or mappings that hold the "
        f"arguments of the model's forward by name ({', '.join(_forward_parameters(model))}); got "
        f"{got}{reason}"
    )


def _forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Those of a model's forward, also of a compiled one."""
    return inspect.signature(unwrapped(model).forward).parameters


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


class SlicedBatches:
    """The batches of a loader, without the channels of inputs that a pruned model takes no more.

    Args:
        loader: Batches as `feed` takes them.
        slice_inputs: Makes of example inputs those of the pruned model.
        model: The model, whole or pruned.
        example_inputs: What the whole model can be called with.
    """

    def __init__(
        self,
        loader: Iterable,
        slice_inputs: Callable[[Any], Any],
        model: nn.Module,
        example_inputs: Any,
    ):
        self._loader, self._slice = loader, slice_inputs
        call = call_of(example_inputs)
        positional = inspect.signature(model.forward).bind_partial(*call.args).arguments
        self._example = call.kwargs or positional  # in the order in which inputs are numbered
        self._input = next(iter(_forward_parameters(model)))

    def __iter__(self) -> Iterator[Any]:
        return map(self.slice, self._loader)

    def slice(self, batch: Any) -> Any:
        """One batch without those channels."""
        if isinstance(batch, Mapping):
            return {**batch, **self._sliced(batch)}
        x = _first(batch)
        return self._sliced({self._input: x}).get(self._input, x)

    def _sliced(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the named arguments that the example has, as the pruned model takes them."""
        whole = {name: named.get(name, value) for name, value in self._example.items()}
        return {name: value for name, value in self._slice(whole).items() if name in named}
