"""What a model is called with: example inputs, and the batches of a loader."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rlscuda.pruning.running.copies import output_tensors, rng_kept


def optional(name: str, extra: str) -> ModuleType:
    """Imports a package that only an extra brings.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise  # the package is there, one of its own dependencies is not
        raise ImportError(
            f"this needs the package {name}, which is not installed: pip install 'rlscuda[{extra}]'"
        ) from None


@dataclass(frozen=True)
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
    """Calls a model with one batch of a loader.

    Args:
        model: The model; the batch is moved to the device of its first parameter.
        batch: A tensor; a tuple or list whose first item is the input; or a mapping, of which the
            model's forward gets the items it names.

    Raises:
        TypeError: The batch is none of these.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        parameters = _parameters(model)
        every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = {k: v for k, v in batch.items() if every or k in parameters}
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in named.items()})
    x = _first(batch)
    if not isinstance(x, Tensor):
        raise TypeError(
            "loader must give tensors, tuples that begin with one, or dicts, got "
            f"{type(batch).__name__}" + (f" of {type(x).__name__}" if x is not batch else "")
        )
    return model(x.to(device))


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Those of a model's forward, also of a compiled one."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


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
        self._input = next(iter(_parameters(model)))

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
