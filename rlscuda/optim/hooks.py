"""Forward hooks on other people's modules: gone in every copy and pickle, and with their owner."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rlscuda._torch import FORWARD_HOOKS, compiler_is_loaded, is_compiled, outside_dynamo
from rlscuda.optim.kinds.recurrent import RECURRENT, input_of, tensors_of
from rlscuda.optim.layers import Layer

# What a hook is in a copy that cannot lack it: it takes any arguments, does nothing, and can be
# unpickled where this package is not installed.
_INERT = contextlib.nullcontext().__exit__


class PrivateEntries(OrderedDict):
    """The dictionary of a module's hooks; its copies and pickles are plain and lack `private`."""

    def __init__(self) -> None:
        super().__init__()
        self.private: set[int] = set()

    def _public(self) -> OrderedDict:
        return OrderedDict((key, self[key]) for key in self if key not in self.private)

    def __deepcopy__(self, memo: dict) -> OrderedDict:
        return copy.deepcopy(self._public(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._public().__reduce_ex__(protocol)


class ForwardHook:
    """Forward hook of one layer: passes on what may be differentiated.

    A compiled forward breaks its graph there, in training mode only, so that a model in eval mode
    compiles and exports as a whole.

    Args:
        layer: The layer whose input to observe.
        observe: Bound method (layer, input, outputs with a gradient to come) of the owner.
    """

    __name__ = __qualname__ = "rlscuda_forward_hook"  # tools that list hooks ask for it

    def __init__(self, layer: Layer, observe: Callable):
        self._layer = weakref.ref(layer)
        self._observe = weakref.WeakMethod(observe)

    def __call__(self, module, args, *kwargs_and_output):
        """Takes the arguments of a hook with or without `with_kwargs`: others re-register it."""
        if not torch.compiler.is_compiling():
            self._pass_on(module, args, *kwargs_and_output)
        elif module.training and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            self._break_graph(module, args, *kwargs_and_output)

    @outside_dynamo
    def _break_graph(self, module, args, *kwargs_and_output):
        self._pass_on(module, args, *kwargs_and_output)

    def _pass_on(self, module, args, *kwargs_and_output):
        layer, observe = self._layer(), self._observe()
        if layer is None or observe is None or layer.module is not module:
            return
        *kwargs, output = kwargs_and_output
        named = kwargs[0] if kwargs else {}
        if isinstance(module, nn.MultiheadAttention):
            x, *others = (*args, *(named[k] for k in ("query", "key", "value")[len(args) :]))[:3]
            layer.crossed = any(other is not x for other in others)
            output = output[0]
        outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        if not outputs or torch.jit.is_tracing() or layer.crossed:
            return
        if isinstance(module, RECURRENT):
            x = input_of(module, layer.names[0], args, named, output)
        elif not isinstance(module, nn.MultiheadAttention):
            x = args[0] if args else next(iter(named.values()))
        observe(layer, x, outputs)

    def __deepcopy__(self, memo):
        return _INERT

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")


def attach(owner: Any, layers: Iterable[Layer], observe: Callable) -> Callable[[], Any]:
    """Puts a `ForwardHook` before all others on each layer's module, for as long as `owner` lives.

    Those of one module are called in the order of its layers.

    Returns:
        What takes them off again.
    """
    ordered = sorted(layers, key=lambda layer: layer.index, reverse=True)
    handles = [(weakref.ref(layer.module), _register(layer, observe)) for layer in ordered]
    finalizer = weakref.finalize(owner, _remove, handles)
    finalizer.atexit = False
    return finalizer


def _register(layer: Layer, observe: Callable) -> RemovableHandle:
    module = layer.module
    for name in FORWARD_HOOKS:
        if not getattr(module, name):  # the handles of hooks that are there refer to their dict
            setattr(module, name, PrivateEntries())
    handle = module.register_forward_hook(
        ForwardHook(layer, observe), prepend=True, with_kwargs=True
    )
    for hooks in (getattr(module, name) for name in FORWARD_HOOKS):
        if isinstance(hooks, PrivateEntries):
            hooks.private.add(handle.id)
    return handle


def _remove(handles: list[tuple[weakref.ref, RemovableHandle]]) -> None:
    for reference, handle in handles:
        handle.remove()
        module = reference()
        for name in FORWARD_HOOKS if module is not None else ():
            hooks = getattr(module, name)
            if isinstance(hooks, PrivateEntries) and not hooks:
                setattr(module, name, OrderedDict())


def forget_compiled(model: nn.Module) -> None:
    """Drops what may have been compiled of a compiled model before it had hooks.

    It would never call them. The compiler keeps the code of all models together, so that of others
    goes too; a model that is not compiled costs nothing.
    """
    if is_compiled(model) and compiler_is_loaded():
        torch.compiler.reset()
