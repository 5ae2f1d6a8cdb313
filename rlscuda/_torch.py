"""Every private name of torch that is used, in one place.

Checked with torch 2.10 to 2.13. Nothing else in the package spells one, so
that what a new version moves is mended here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map"]

BatchNorm: Any = nn.modules.batchnorm._BatchNorm
Convolution: Any = nn.modules.conv._ConvNd
InstanceNorm: Any = nn.modules.instancenorm._InstanceNorm
Operator = torch._ops.OpOverload

# unlike torch.compiler.disable, it leaves the import of dynamo to use
outside_dynamo = torch._disable_dynamo
is_transformed = torch._C._functorch.is_functorch_wrapped_tensor  # by vmap, grad and the like
foreach_copy_ = torch._foreach_copy_
foreach_add_ = torch._foreach_add_
unflattened = torch._C._nn.unflatten_dense_tensors

# x W^T + b by oneDNN whatever torch.mm calls; what torch's own compiler makes of a linear layer
onednn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

cpu_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cudnn_rnn = torch.ops.aten._cudnn_rnn

_Accumulator: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]

_PLAIN = (Tensor, nn.Parameter)

FORWARD_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs")
CALL_HOOKS = {  # of a call of a module, and their flags: where the hooks are that they are of
    "_forward_hooks": "_forward_hooks",
    "_forward_hooks_with_kwargs": "_forward_hooks",
    "_forward_hooks_always_called": "_forward_hooks",
    "_forward_pre_hooks": "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs": "_forward_pre_hooks",
}
HOOKS = (
    *CALL_HOOKS, "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def unwrapped(model: Any) -> Any:
    """What `torch.compile` wraps; anything else as it is."""
    return getattr(model, "_orig_mod", model)


def compiler_is_loaded() -> bool:
    """Whether anything can have been compiled in this process."""
    return "torch._dynamo" in sys.modules


def compiler_listens() -> bool:
    """Whether functions that this thread calls are compiled: it runs what a compiled one left."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a module of it in place, was given to the compiler."""
    return hasattr(model, "_orig_mod") or any(
        module._compiled_call_impl is not None for module in model.modules()
    )


def call_instead(module: nn.Module, call: Any) -> None:
    """Makes calls of a module calls of something else, hooks apart; None undoes it.

    It is where torch keeps what it compiled of a module, which no copy and no pickle takes along.
    """
    module._compiled_call_impl = call


def called_as_itself(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The output of a module whose calls go elsewhere."""
    return module._call_impl(*args, **kwargs)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The live registry of a module's parameters, those of its children apart."""
    return module._parameters


def is_module(something: Any) -> bool:
    """Whether an object is a module by its own class: `isinstance` would wake a proxy."""
    return issubclass(type(something), nn.Module)


def held_parameters(module: nn.Module) -> list[Any]:
    """The parameters of a module itself, also of one whose constructor has not run to its end."""
    return list((vars(module).get("_parameters") or {}).values())


def submodules(module: nn.Module) -> list[nn.Module]:
    """The modules directly in one, likewise."""
    return list(filter(is_module, (vars(module).get("_modules") or {}).values()))


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The live registry of a module's buffers."""
    return module._buffers


def is_masked(module: nn.Module, name: str = "weight") -> bool:
    """Whether torch.nn.utils.prune has put a mask on a parameter of a module."""
    return f"{name}_orig" in own_parameters(module) and f"{name}_mask" in own_buffers(module)


def plain_or_masked(module: nn.Module, name: str) -> nn.Parameter | None:
    """A module's parameter of a name, whether torch.nn.utils.prune has masked it or not."""
    return own_parameters(module).get(f"{name}_orig" if is_masked(module, name) else name)


def pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The live registry of a module's forward pre-hooks."""
    return module._forward_pre_hooks


def has_own_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module computes something else than a class that it is derived from."""
    names, kind = ("forward", "_conv_forward"), type(module)
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in names)


def masked_name(hook: Any) -> str:
    """The parameter that a hook of `torch.nn.utils.prune` masks."""
    return hook._tensor_name


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written."""
    return tensor._version


def in_backward() -> bool:
    """Whether the autograd engine runs on this thread (a checkpointed segment is recomputed)."""
    return torch._C._current_graph_task_id() != -1


def accumulator_near(node: Any, leaf: Tensor) -> Any:
    """The node that accumulates the gradient of a parameter that a node has just multiplied by.

    None where it is not next to it, as that of a weight that is computed; to ask torch for it costs
    ten times as much.
    """
    for one, _ in node.next_functions:
        if type(one) is _Accumulator:
            if one.variable is leaf:
                return one
        elif one is not None and len(one.next_functions) == 1:  # the weight's transpose
            other = one.next_functions[0][0]
            if type(other) is _Accumulator and other.variable is leaf:
                return other
    return None


def origin(output: Tensor) -> tuple[Any, int]:
    """The node of the graph that has computed an output, views of it apart, and which of its is it.

    A pass that computes the gradients of weights alone, as those of pipelines, begins there.
    """
    node: Any = output.grad_fn
    slot = output.output_nr
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node, slot = node.next_functions[0]
    return node, slot


def gradient_comes(leaf: Tensor, accumulator: Any = None) -> bool:
    """Whether the backward pass that runs on this thread computes the gradient of a parameter.

    True where torch does not tell: in a compiled backward pass, and in `autograd.grad` of it.

    Args:
        leaf: The parameter.
        accumulator: Its node, where it is known.
    """
    if not leaf.requires_grad:
        return True
    node: Any = accumulator or torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return True


def active_ddp() -> Any:
    """The DistributedDataParallel module in whose forward this is, or None."""
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


def joins(ddp: Any) -> bool:
    """Whether a DistributedDataParallel module is in a `Join` context."""
    return ddp._join_config.enable


def dtensor() -> Any:
    """The class of distributed tensors, or None before anything can be one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is distributed; it is asked many times a step."""
    if type(tensor) in _PLAIN:
        return False
    kind = dtensor()
    return kind is not None and isinstance(tensor, kind)


def is_wrapper(tensor: Any) -> bool:
    """Whether a tensor stands for others, as a quantised or a distributed one."""
    return is_traceable_wrapper_subclass(tensor)


def flattened(mesh: Any) -> Any:
    """The process group of all dimensions of a device mesh."""
    return mesh._flatten().get_group()


def share_hooks(new: Tensor, old: Tensor) -> None:
    """Gives a parameter the hooks of another: the very dicts, so that their handles still work."""
    new._backward_hooks = old._backward_hooks
    new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks


def storage_key(tensor: Tensor) -> int:
    """What tensors that share a storage have in common."""
    return tensor.untyped_storage()._cdata


def writes(operator: Operator) -> bool:
    """Whether an operator writes into one of its arguments."""
    return operator._schema.is_mutable


def has_one_width(attention: nn.MultiheadAttention) -> bool:
    """Whether queries, keys and values come from inputs of one width, by one matrix."""
    return attention._qkv_same_embed_dim


def arguments_of(operator: Operator) -> Any:
    """The arguments in an operator's schema."""
    return operator._schema.arguments
