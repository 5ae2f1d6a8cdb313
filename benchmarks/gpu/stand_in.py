"""A pytest plugin that lets the CPU stand in for a GPU, as far as Python can tell the two apart.

Tensors made on or moved to "cuda" say that they are there, and compute on the CPU. As on a GPU they
do not mix with tensors of the CPU, are no NumPy arrays, and where `set_sync_debug_mode` forbids it
nothing reads their values. Streams do nothing; graphs run what they capture once, and nothing when
they are replayed. What is left to a device are its kernels, its arithmetic, and real graphs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ATEN = torch.ops.aten
READS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.equal.default}
MAY_MIX = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}  # indices may be a CPU's
PLAIN_TO = torch.Tensor.to
_state: dict[str, Any] = {"default": CPU, "sync": "default"}


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU; `inner` is the CPU's."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGPU:
        """Of the same shape and strides."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype
        )
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    def get_device(self) -> int:
        """The first."""
        return 0

    def numpy(self, *args: Any, **kwargs: Any) -> None:
        """What a GPU cannot give."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        """By way of the CPU."""
        return moved(self, CPU).tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Where the mode is off, as inside of another mode."""
        return compute(func, args, kwargs or {})

    def __repr__(self):
        return f"OnGPU({self.inner!r})"


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operator on the CPU; what it returns is on the GPU if an argument is."""
    given = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    wrapped = [x for x in given if isinstance(x, OnGPU)]
    if not wrapped:
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    if len(wrapped) < len(given) and name not in MAY_MIX:
        other = next((x for x in given if not isinstance(x, OnGPU) and x.dim()), None)
        if other is not None:
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got one of "
                               f"the CPU of shape {list(other.shape)}")  # fmt: skip
    if _state["sync"] == "error" and func in READS:
        raise RuntimeError(f"called a synchronizing CUDA operation: {func}")
    known = {id(x.inner): x for x in wrapped}
    args, kwargs = tree_map_only(OnGPU, lambda x: x.inner, (args, kwargs))
    made = func(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnGPU(x), made)


class Dispatch(TorchDispatchMode):
    """Wraps and unwraps below autograd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs one operator."""
        return compute(func, args, kwargs or {})


class Move(torch.autograd.Function):
    """A copy between the devices, whose gradient is copied back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """The copy."""
        if _state["sync"] == "error" and isinstance(x, OnGPU):
            raise RuntimeError("called a synchronizing CUDA operation: a copy to the CPU")
        return x.inner.clone() if isinstance(x, OnGPU) else OnGPU(x.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """The copy back."""
        return Move.apply(gradient)


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, itself if it is there."""
    return x if isinstance(x, OnGPU) == (device.type == "cuda") else Move.apply(x)


def device_of(value: Any) -> torch.device | None:
    """What names a device, or None."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda"):
        return torch.device(value)
    return None


def makes(maker: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function such as `torch.zeros`, for both devices."""

    @functools.wraps(maker)
    def make(*args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any):
        if isinstance(next(iter(args), None), OnGPU) and device is None:
            device = GPU
        device = device_of(device) or (_state["default"] if device is None else device)
        if getattr(device, "type", device) not in ("cpu", "cuda"):
            return maker(*args, device=device, requires_grad=requires_grad, **kwargs)
        made = maker(*args, **kwargs)
        made = moved(made, device) if isinstance(made, torch.Tensor) else made
        return made.requires_grad_() if requires_grad else made

    return make


def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to` a device, a dtype or another tensor."""
    like = [y for y in (*args, kwargs.pop("other", None)) if isinstance(y, torch.Tensor)]
    given = [device_of(y) for y in (*args, kwargs.pop("device", None))]
    devices = [d for d in given if d] + [y.device for y in like]
    dtypes = [y for y in (*args, kwargs.pop("dtype", None)) if isinstance(y, torch.dtype)]
    dtypes += [y.dtype for y in like]
    copy = kwargs.pop("copy", False) or args[2:3] == (True,)
    kwargs.pop("non_blocking", None)
    made = moved(x, devices[0]) if devices and devices[0].type in ("cpu", "cuda") else x
    if devices and devices[0].type == "meta":
        kwargs["device"] = "meta"
    made = PLAIN_TO(made, dtypes[0] if dtypes else made.dtype, **kwargs)
    return made.clone() if copy and made is x else made


class Nothing:
    """A stream, an event or a graph that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


STAND_INS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *args: "the CPU, standing in",
    "get_device_capability": lambda *args: (9, 0),
    "get_device_properties": lambda *args: SimpleNamespace(
        total_memory=141 << 30, major=9, minor=0
    ),
    "is_current_stream_capturing": lambda: False,
    "mem_get_info": lambda *args: (0, 0),
    "synchronize": lambda *args: None,
    "current_stream": lambda *args: Nothing(),
    "set_sync_debug_mode": lambda mode: _state.update(sync=mode),
    "Stream": Nothing,
    "Event": Nothing,
    "CUDAGraph": Nothing,
    "stream": _context,
    "graph": _context,
    "device": _context,
}


def install() -> None:
    """Puts the stand-ins in place, for the rest of the process."""
    for name, stand_in in STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    for maker in _device_constructors():
        if getattr(torch, maker.__name__, None) is maker:
            setattr(torch, maker.__name__, makes(maker))
    torch.Tensor.to = to
    torch.Tensor.cuda = lambda x, *args, **kwargs: moved(x, GPU)
    torch.Tensor.cpu = lambda x, *args, **kwargs: moved(x, CPU)
    torch.set_default_device = lambda device: _state.update(default=torch.device(device))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Dispatch().__enter__()


def pytest_load_initial_conftests():  # the first of which may set the default device
    install()


def pytest_configure(config):
    """Shortens benchmarks, which run here to be tried, not timed."""
    from benchmarks.common import harness

    harness.ceilings = functools.partial(lambda measure, device: measure("cpu"), harness.ceilings)


def pytest_collection_modifyitems(items):
    """Shrinks their minibatches."""
    for item in items:
        if hasattr(item.module, "BATCH"):
            item.module.BATCH = 2
