"""What a model costs: parameters, FLOPs, peak memory and latency, and what pruning gained."""

from __future__ import annotations

import math
import statistics
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rlscuda._torch import (
    TorchDispatchMode,
    cpu_flash_attention,
    cudnn_rnn,
    storage_key,
    tree_leaves,
)
from rlscuda.pruning.running.calls import Call, call_of, inference


@dataclass(frozen=True)
class Measurement:
    """What one inference forward of a model costs.

    Attributes:
        parameters: Elements of all parameters, shared ones once.
        flops: Floating-point operations of the matrix products, convolutions and attention of one
            forward of the whole batch; a multiply-add counts as 2, elementwise work as 0.
        peak_memory_bytes: See `measure`.
        latency_seconds: Median time of one forward of the whole batch.
        batch_size: Samples of that forward.
        device: Where it ran.
    """

    parameters: int
    flops: int
    peak_memory_bytes: int
    latency_seconds: float
    batch_size: int
    device: str


_ROWS = {  # attribute: (label, unit, divisor of its prefixes)
    "parameters": ("parameters", "", 1000),
    "flops": ("FLOPs", "", 1000),
    "peak_memory_bytes": ("peak memory", "B", 1024),
    "latency_seconds": ("latency", "s", 1000),
}


@dataclass(frozen=True)
class Gains:
    """Two measurements; prints as a table.

    Attributes:
        before: Of the whole model.
        after: Of the pruned one.
    """

    before: Measurement
    after: Measurement

    @property
    def ratios(self) -> dict[str, float]:
        """How many times smaller or faster, before / after, by quantity."""
        pairs = {name: (getattr(self.before, name), getattr(self.after, name)) for name in _ROWS}
        return {
            name: before / after if after else (float("inf") if before else 1.0)
            for name, (before, after) in pairs.items()
        }

    def __str__(self):
        lines = [f"{f'batch of {self.before.batch_size}, {self.before.device}':<22}"
                 f"{'before':>12}{'after':>12}{'ratio':>10}"]  # fmt: skip
        for name, ratio in self.ratios.items():
            label, unit, step = _ROWS[name]
            values = (scaled(getattr(m, name), unit, step) for m in (self.before, self.after))
            before, after = values
            lines.append(f"{label:<22}{before:>12}{after:>12}{ratio:>9.2f}x")
        return "\n".join(lines)


def scaled(value: float, unit: str, step: int) -> str:
    """A number with three digits and a prefix: 1.23 M, 1.23 MiB, 1.23 ms."""
    if not value:
        return f"0 {unit}".strip()
    prefixes = ["µ", "m", "", "k", "M", "G", "T"]
    shown, place = float(value), 2
    while shown >= step and place < len(prefixes) - 1:
        shown, place = shown / step, place + 1
    while shown < 1 and place > 0:
        shown, place = shown * step, place - 1
    prefix = prefixes[place]
    if step == 1024 and prefix:
        prefix = prefix.upper() + "i"
    digits = max(0, 2 - len(str(int(shown))) + 1)
    return f"{shown:.{digits}f} {prefix}{unit}".strip()


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live, and the most that ever lived at once."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()
        self._finalizers: list[weakref.finalize] = []
        self._kept = list(known)
        self._add(self._kept)

    def _add(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            key = storage_key(tensor)
            if key not in self._seen:
                self._seen.add(key)
                self.live += storage.nbytes()
                end = weakref.finalize(storage, self._end, key, storage.nbytes())
                end.atexit = False
                self._finalizers.append(end)
        self.peak = max(self.peak, self.live)

    def _end(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._add(tree_leaves(result))
        return result

    def __exit__(self, *exception):
        for end in self._finalizers:
            end.detach()
        return super().__exit__(*exception)


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, example_inputs: Any) -> int:
    """FLOPs of one forward of the example inputs, see `Measurement`; the model is left as it was.

    Raises:
        TypeError: `example_inputs` holds no tensor.
    """
    return _flops(model, call_of(example_inputs))


def _flops(model: nn.Module, call: Call) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with inference(model), _plain_attention(), counter:
        call(model)
    return counter.get_total_flops()


def _rnn_flops(x: torch.Size, weights: Iterable[torch.Size], *_: Any, **__: Any) -> int:
    """Of x [length, batch, features] and its weights [gates, features], among them biases."""
    matrices = [math.prod(shape) for shape in weights if len(shape) == 2]
    return 2 * math.prod(x[:-1]) * sum(matrices)


_UNCOUNTED = {  # by torch
    cpu_flash_attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten.mkldnn_rnn_layer: lambda x, *weights, **_: _rnn_flops(x, weights[:2]),
    cudnn_rnn: _rnn_flops,
}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused operators of transformer layers, whose products no counter sees."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _peak_memory(model: nn.Module, call: Call) -> int:
    own = [*model.parameters(), *model.buffers(), *call.tensors()]
    devices = {tensor.device for tensor in own}
    if all(device.type != "cuda" for device in devices):
        with _LiveBytes(own) as counter:
            call(model)
        return counter.peak
    storages = {storage_key(t): t.untyped_storage().nbytes() for t in own}
    peak = sum(storages.values())
    for device in (d for d in devices if d.type == "cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak -= torch.cuda.memory_allocated(device)
    call(model)
    return peak + sum(torch.cuda.max_memory_allocated(d) for d in devices if d.type == "cuda")


def _latency(model: nn.Module, call: Call, repeats: int) -> float:
    from torch.utils.benchmark import Timer  # imports setuptools

    timer = Timer("call(model)", globals={"call": call, "model": model},
                  num_threads=torch.get_num_threads())  # fmt: skip
    return statistics.median(timer.timeit(1).mean for _ in range(repeats))


def measure(
    model: nn.Module, example_inputs: Any, *, batch_size: int | None = None, repeats: int = 20
) -> Measurement:
    """What one inference forward costs: eval mode, no gradients, the model's device and dtype.

    The peak memory counts the parameters, buffers and inputs, and of everything that the forward
    makes the most that lives at any one time. On the CPU these are the storages that operators
    return, counted as they come and go; what an operator allocates inside itself (an im2col
    buffer, a library's workspace) is not seen. On CUDA it is the allocator's own maximum over what
    was allocated before, which sees such buffers and resets the device's peak statistics.

    Args:
        model: The model; its modes and the random generators are as before afterwards.
        example_inputs: A tensor, a tuple or list of positional arguments, or a dict of named ones;
            dimension 0 is the batch.
        batch_size: Samples of the forward, made by repeating those of the example; those of the
            example by default.
        repeats: Forwards timed; each is preceded by two that are not.

    Raises:
        TypeError: `example_inputs` holds no tensor, or `model` is no module.
        ValueError: `batch_size` or `repeats` is not positive.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    call = call_of(example_inputs)
    call = call.resized(batch_size or call.batch)  # copies, so that no larger storage is counted
    flops = _flops(model, call)
    with inference(model):
        peak = _peak_memory(model, call)
        latency = _latency(model, call, repeats)
    device = next((str(p.device) for p in model.parameters()), "cpu")
    return Measurement(count_parameters(model), flops, peak, latency, call.batch, device)


def compare(before: Measurement, after: Measurement) -> Gains:
    """What was gained from one measurement to another.

    Args:
        before: Of the whole model.
        after: Of the pruned one, of as many samples on the same device.

    Raises:
        ValueError: They are of different batch sizes or devices.
    """
    for name in ("batch_size", "device"):
        first, second = getattr(before, name), getattr(after, name)
        if first != second:
            raise ValueError(f"both must have the same {name}, got {first} and {second}")
    return Gains(before, after)
