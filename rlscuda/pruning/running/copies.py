"""Copies of a model that may be run and cut without a trace in the model itself."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

ExampleInputs = Tensor | tuple | list | Mapping[str, Any]

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def isolated_copy(model: nn.Module, tensors: Mapping[Tensor, Tensor] | None = None) -> nn.Module:
    """A deep copy of `model` without the hooks that others have put on it.

    Masks and weight norms are hooks too, and part of what the model computes: they stay.

    Args:
        model: The model.
        tensors: What the copy is to hold in place of a parameter or buffer; others are cloned.
    """
    memo: dict[int, Any] = {id(old): new for old, new in (tensors or {}).items()}
    for module in model.modules():
        for name in _HOOKS:
            hooks = module.__dict__.get(name)
            if hooks:
                kept = [(k, v) for k, v in hooks.items() if _belongs_to_torch(v)]
                memo[id(hooks)] = OrderedDict((k, copy.deepcopy(v)) for k, v in kept)
        for value in module.__dict__.values():  # computed and left there: deepcopy would refuse it
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)


def _belongs_to_torch(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


def train_but_norms(copy: nn.Module) -> nn.Module:
    """Puts a copy into training mode, but for batch norms, which refuse a batch of one value."""
    copy.train()
    for module in copy.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return copy


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Calls a model with a tensor, a sequence of arguments, or a mapping of named ones."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name that it has."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


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


@contextmanager
def rng_kept(model: nn.Module) -> Iterator[None]:
    """Leaves the random state of the CPU, and of the GPUs that hold `model`, as it was."""
    tensors = (*model.parameters(), *model.buffers())
    gpus = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        yield
