"""Hooks and functions that belong to a model, made anew for a copy of it.

`copy.deepcopy` shares functions. One that holds a list, a module or a tensor of the model, as a
hook that keeps features for a skip connection, would go on with the model's own in the copy. Here
such a function gets cells, defaults and attributes of its own, with what the copy has in them.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from rlscuda._torch import CALL_HOOKS, HOOKS
from rlscuda.optim.hooks import ForwardHook, Private

_OTHERS = (nn.Module, Optimizer, DataLoader, Dataset)  # never copied, where no part of the model
_CONSTANT = (int, float, str, bytes, type, type(None))


def copy_with_hooks(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a model, with the hooks that decide what it computes.

    Hooks of forwards stay, but for those of this package; of other hooks those of torch do. What
    the code of the modules' classes names itself, as a list beside the class, is shared.

    Args:
        model: The model.
        memo: What the copy is to hold, by id of what the model does; see `copy.deepcopy`.

    Raises:
        ValueError: A hook holds something of the model that cannot be copied.
    """
    hooks: list[tuple[str, dict, dict]] = []  # of a module by name: those to keep, and the copy's
    functions: list[FunctionType] = []
    for name, module in model.named_modules():
        own = vars(module)
        for kind in HOOKS:
            if own.get(kind):
                memo[id(own[kind])] = OrderedDict()
                hooks.append((name, _kept(own, kind), memo[id(own[kind])]))
        functions += [f for f in own.values() if isinstance(f, FunctionType) and _holds(f)]
    if functions or any(_holds(hook) for _, kept, _ in hooks for hook in kept.values()):
        for value in _named_in_code(model):
            memo.setdefault(id(value), value)
    shells = [_shell(function, memo) for function in functions]
    with _Detaching():
        made = copy.deepcopy(model, memo)
    for function, shell in zip(functions, shells):
        _fill(shell, function, memo)
    for name, kept, new in hooks:
        for key, hook in kept.items():
            try:
                new[key] = _follow(hook, memo)
            except Exception as error:
                raise ValueError(
                    f"the hook {getattr(hook, '__qualname__', type(hook).__name__)} of "
                    f"{repr(name) if name else 'the model'} cannot be copied with the model: "
                    f"{error}; take it off for the pruning"
                ) from error
    return made


def _kept(own: dict[str, Any], kind: str) -> dict[int, Any]:
    """The hooks of a kind, or their flags, that a copy of a module has too."""
    if kind not in CALL_HOOKS:
        return {key: hook for key, hook in own[kind].items() if _belongs_to_torch(hook)}
    hooks = own[CALL_HOOKS[kind]]
    private = Private.of(hooks)
    ours = {key for key, hook in hooks.items() if isinstance(hook, ForwardHook)}
    ours |= private.keys if private else set()
    return {key: value for key, value in own[kind].items() if key in hooks.keys() - ours}


def _belongs_to_torch(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


class _Detaching(TorchFunctionMode):
    """Copies tensors that were computed and kept somewhere, too, which deepcopy refuses."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return function(*args, **(kwargs or {}))


def _holds(hook: Any) -> bool:
    """Whether a function has something that a copy of it must have a copy of."""
    if isinstance(hook, FunctionType):
        return bool(hook.__closure__ or hook.__defaults__ or hook.__kwdefaults__ or vars(hook))
    return not isinstance(hook, bool)


def _named_in_code(model: nn.Module) -> Iterator[Any]:
    """What the methods of the modules' classes name in closures and globals, tensors apart."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    for kind in kinds:
        for function in vars(kind).values():
            if isinstance(function, FunctionType) and not kind.__module__.startswith("torch."):
                named = function.__globals__
                values = [named[name] for name in _names(function.__code__) if name in named]
                for value in (*values, *(c.cell_contents for c in _filled(function))):
                    if not isinstance(value, (nn.Module, Tensor)):
                        yield value


def _names(code: CodeType) -> Iterator[str]:
    """The names that code looks up, also in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _filled(function: FunctionType) -> Iterator[CellType]:
    for cell in function.__closure__ or ():
        try:
            cell.cell_contents  # noqa: B018  which raises where there are none yet
        except ValueError:
            continue
        yield cell


def _shell(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with empty cells, which is what it is in the copy."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    shell = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    shell.__qualname__ = function.__qualname__
    memo[id(function)] = shell
    return shell


def _fill(shell: FunctionType, function: FunctionType, memo: dict[int, Any]) -> None:
    """Gives a shell what the function holds, as the copy has it."""
    own = {id(cell): new for cell, new in zip(function.__closure__ or (), shell.__closure__ or ())}
    for cell in _filled(function):
        own[id(cell)].cell_contents = _follow(cell.cell_contents, memo)
    if function.__defaults__:
        shell.__defaults__ = tuple(_follow(value, memo) for value in function.__defaults__)
    if function.__kwdefaults__:
        shell.__kwdefaults__ = {k: _follow(v, memo) for k, v in function.__kwdefaults__.items()}
    vars(shell).update({key: _follow(value, memo) for key, value in vars(function).items()})


def _follow(value: Any, memo: dict[int, Any]) -> Any:
    """What a hook holds, as the copy of the model has it."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, FunctionType):
        if _holds(value):
            shell = _shell(value, memo)
            _fill(shell, value, memo)
            return shell
        return value
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _follow(value.__self__, memo))
    if type(value) is partial:
        given = {key: _follow(one, memo) for key, one in value.keywords.items()}
        return partial(_follow(value.func, memo), *(_follow(v, memo) for v in value.args), **given)
    if isinstance(value, weakref.ref):
        target = value()
        return weakref.ref(memo[id(target)]) if id(target) in memo else value
    if isinstance(value, (*_OTHERS, *_CONSTANT)):
        return value
    trial = dict(memo)
    try:
        with _Detaching():
            made = copy.deepcopy(value, trial)
    except Exception:
        held = vars(value).values() if hasattr(value, "__dict__") else ()
        if any(id(one) in memo for one in held if isinstance(one, (nn.Module, Tensor))):
            raise
        return value  # a file or a lock, of somebody who only looks on
    memo.update(trial)
    memo.setdefault(id(memo), []).append(trial)  # whose id is in it, and has to stay its own
    return made
