"""Forward hooks on other people's modules: gone in every copy and pickle, and with their owner."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from rlscuda._torch import (
    FORWARD_HOOKS,
    compiler_is_loaded,
    compiler_listens,
    is_compiled,
    outside_dynamo,
)
from rlscuda.optim.kinds.recurrent import RECURRENT, input_of, tensors_of
from rlscuda.optim.layers import Layer

# What a hook is in a copy that cannot lack it: it takes any arguments, does nothing, and can be
# unpickled where this package is not installed.
_INERT = contextlib.nullcontext().__exit__


class Private:
    """Which hooks of a module are private: copies and pickles of their dictionary lack them.

    The dictionary stays what it is, since handles refer to it and the compiler takes no other kind:
    how it is copied are attributes of its own.

    Args:
        hooks: The dictionary.
    """

    def __init__(self, hooks: OrderedDict):
        self.keys: set[int] = set()
        self._hooks = weakref.ref(hooks)
        self._attributes = {
            "private": self, "__deepcopy__": self._copy, "__reduce_ex__": self._reduce
        }  # fmt: skip
        vars(hooks).update(self._attributes)

    @staticmethod
    def of(hooks: Any) -> Private | None:
        """That of a dictionary."""
        return getattr(hooks, "private", None)

    def forget(self, key: int) -> None:
        """Forgets a hook, and with the last one leaves the dictionary as it was."""
        self.keys.discard(key)
        hooks = self._hooks()
        for name in self._attributes if hooks is not None and not self.keys else ():
            vars(hooks).pop(name, None)

    def _public(self) -> OrderedDict:
        hooks: OrderedDict = self._hooks() or OrderedDict()
        return OrderedDict((key, hooks[key]) for key in hooks if key not in self.keys)

    def _copy(self, memo: dict) -> OrderedDict:
        return copy.deepcopy(self._public(), memo)

    def _reduce(self, protocol: Any) -> Any:
        return self._public().__reduce_ex__(protocol)


class ForwardHook:
    """Forward hook of one module: passes on what may be differentiated of each of its layers.

    A compiled forward breaks its graph there, in training mode only, so that a model in eval mode
    compiles and exports as a whole.

    Args:
        layers: Those of one module, whose inputs to observe.
        observe: Bound method (layer, input, outputs with a gradient to come) of the owner; where
            there are none, as in the first run of a checkpointed segment, it hears of one layer.
        rests: Bound method of the owner: whether it need not hear of anything for now; or a
            function of it.
    """

    __name__ = __qualname__ = "rlscuda_forward_hook"  # tools that list hooks ask for it

    def __init__(self, layers: Sequence[Layer], observe: Any, rests: Any):
        module = layers[0].module
        self._recurrent = isinstance(module, RECURRENT)
        self._attends = isinstance(module, nn.MultiheadAttention)
        self._layers = [weakref.ref(layer) for layer in layers]
        self._owner = weakref.ref(observe.__self__)
        self._observe, self._rests = observe.__func__, getattr(rests, "__func__", rests)

    def __call__(self, module, args, *kwargs_and_output):
        """Takes the arguments of a hook with or without `with_kwargs`: others re-register it."""
        if not torch.compiler.is_compiling():
            # the compiler leaves some modules to Python, as recurrent ones, but not what they call
            pass_on = self._break_graph if compiler_listens() else self._pass_on
            pass_on(module, args, *kwargs_and_output)
        elif module.training and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            self._break_graph(module, args, *kwargs_and_output)

    @outside_dynamo
    def _break_graph(self, module, args, *kwargs_and_output):
        self._pass_on(module, args, *kwargs_and_output)

    def _pass_on(self, module, args, *kwargs_and_output):
        owner = self._owner()
        if owner is None or self._rests(owner):
            return
        layers = [own for layer in self._layers if (own := layer()) and own.module is module]
        if not layers:
            return
        *kwargs, output = kwargs_and_output
        named = kwargs[0] if kwargs else {}
        if self._attends:
            x, *others = (*args, *(named[k] for k in ("query", "key", "value")[len(args) :]))[:3]
            layers[0].crossed = any(other is not x for other in others)
            output = output[0]
        else:
            x = args[0] if args else next(iter(named.values()))
        outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        if torch.jit.is_tracing() or layers[0].crossed:
            return
        for layer in layers if outputs else layers[:1]:
            if self._recurrent and outputs:
                x = input_of(module, layer.names[0], args, named, output)
            self._observe(owner, layer, x, outputs)

    def __deepcopy__(self, memo):
        return _INERT

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")


def _never(owner: Any) -> bool:
    return False


def attach(
    owner: Any, layers: Iterable[Layer], observe: Callable, rests: Callable = _never
) -> Callable[[], Any]:
    """Puts a `ForwardHook` before all others on the layers' modules, for as long as `owner` lives.

    Returns:
        What takes them off again.
    """
    of_module: dict[nn.Module, list[Layer]] = {}
    for layer in sorted(layers, key=lambda layer: layer.index):
        of_module.setdefault(layer.module, []).append(layer)
    handles = [(weakref.ref(m), _register(m, own, observe, rests)) for m, own in of_module.items()]
    finalizer = weakref.finalize(owner, _remove, handles)
    finalizer.atexit = False
    return finalizer


def _register(
    module: nn.Module, layers: list[Layer], observe: Callable, rests: Callable
) -> RemovableHandle:
    hook = ForwardHook(layers, observe, rests)
    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
    for hooks in (getattr(module, name) for name in FORWARD_HOOKS):
        if isinstance(hooks, OrderedDict):
            (Private.of(hooks) or Private(hooks)).keys.add(handle.id)
    return handle


def _remove(handles: list[tuple[weakref.ref, RemovableHandle]]) -> None:
    for reference, handle in handles:
        handle.remove()
        module = reference()
        for name in FORWARD_HOOKS if module is not None else ():
            if private := Private.of(getattr(module, name)):
                private.forget(handle.id)


def forget_compiled(*models: nn.Module) -> None:
    """Drops what may have been compiled of a compiled model before it had hooks.

    It would never call them. The compiler keeps the code of all models together, so that of others
    goes too; a model that is not compiled costs nothing.

    Args:
        models: The model, and others that it is a part of.
    """
    if compiler_is_loaded() and any(map(is_compiled, models)):
        torch.compiler.reset()
