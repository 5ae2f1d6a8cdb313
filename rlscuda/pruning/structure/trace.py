"""Which channels of a model live and die together: its couplings, each of them tried.

They come from a graph that takes what it does not know for an operation on each channel by itself.
So they are tried: with random weights, a model in which the removed channels are zero wherever they
are met must put out what the pruned model does. Statistics over channels, as those of a layer norm,
see the difference rightly, and are left out of the comparison. What is computed for training alone,
as by an auxiliary head, is tried too: it must run and put out the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rlscuda._torch import own_buffers, unwrapped
from rlscuda.optim.discovery import modules_named
from rlscuda.pruning.couplings import Coupling, Member, Structure
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    all_tensors,
    call,
    isolated_copy,
    map_tensors,
    output_tensors,
    rng_kept,
    train_but_norms,
)
from rlscuda.pruning.structure.units import Side, Unit, units_of
from rlscuda.pruning.surgery.plan import Surgery, plan

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_MIXED = (
    "without its channels the model computes something else than with their weights at zero: an "
    "operation between channels that torch-pruning does not see (a shuffle, a reshape, a softmax "
    "or mean over them), or a weight used outside of its module"
)

_PUT_OUT = "the model puts out its channels in training mode"


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    ignored: Iterable[str | nn.Module] = (),
    include_inputs: bool = False,
) -> Structure:
    """Finds the couplings of a model; the model itself is neither run nor changed.

    Args:
        model: The model.
        example_inputs: What it can be called with: a tensor, a tuple of arguments, or a mapping of
            named ones.
        ignored: Modules, names or shell patterns of names; what they and all inside them produce
            keeps its channels.
        include_inputs: Whether the channels (dimension 1) of raw inputs may be removed too. The
            pruned model then takes inputs without them.

    Returns:
        The structure. What the model puts out is never part of a coupling.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: The model cannot be copied, run on the example inputs, or traced; `ignored`
            names what the model does not have.
    """
    model = unwrapped(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("prune the module inside DistributedDataParallel, and wrap it again")
    kept = {m for _, inside in modules_named(ignored, "ignored", model) for m in inside}
    kept_names = {name for name, module in model.named_modules() if module in kept}
    traced = units_of(model, example_inputs)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    couplings: list[Coupling] = []
    made = [unit for unit in traced.units if any(kind != "in" for _, kind in unit.channels)]
    refused = _unfollowed(traced.units) if include_inputs else {}
    for name, same in _named(_alike(made, order), order):
        coupling, reason = _coupling(name, same, order), same[0].reason
        produced = {m.name for m in coupling.members if m.kind in ("out", "both")}
        if produced & kept_names:
            continue
        touches_input = any(member.kind == "input" for member in coupling.members)
        if touches_input and not include_inputs:
            if not any(member.kind == "out" for member in coupling.members):
                continue
            reason = reason or "it is added to or joined with the model's input: include_inputs"
        if reason:
            refused[coupling.name] = reason
        else:
            couplings.append(coupling)
    shapes = {name: tuple(tensor.shape) for name, tensor in all_tensors(model).items()}
    found = Structure(model, couplings, refused, traced.output_shapes, traced.input_widths, shapes)
    wrong = unsound(found, example_inputs)
    sound = [coupling for coupling in couplings if coupling.name not in wrong]
    return replace(found, couplings=sound, refused={**refused, **wrong})


def _unfollowed(units: list[Unit]) -> dict[str, str]:
    """The layers that take what nothing seems to make, and why that cannot be a coupling."""
    reason = "only float inputs of 2, 4 or 5 dimensions can be followed"
    return {
        f"input of {name!r}": reason
        for unit in units
        for name, _ in unit.channels
        if all(kind == "in" for _, kind in unit.channels)
    }


def _alike(units: list[Unit], order: dict[str, int]) -> list[list[Unit]]:
    """Units that have the same members, in the order of the modules that produce them."""
    alike: dict[tuple, list[Unit]] = {}
    for unit in units:
        sides = sorted((side, len(found)) for side, found in unit.channels.items())
        alike.setdefault((tuple(sides), unit.reason), []).append(unit)
    for same in alike.values():
        same.sort(key=lambda unit: min(unit.channels[_leader(unit, order)]))
    return sorted(
        alike.values(),
        key=lambda same: (
            _place(_leader(same[0], order), order),
            min(same[0].channels[_leader(same[0], order)]),
        ),
    )


def _leader(unit: Unit, order: dict[str, int]) -> Side:
    """The side that names the coupling: the first to produce it, else the first to meet it."""
    sides = _in_order(unit, order)
    produced = [side for side in sides if side[1] == "out"]
    return (produced or sides)[0]  # a raw input is the first of all


def _in_order(unit: Unit, order: dict[str, int]) -> list[Side]:
    return sorted(unit.channels, key=lambda side: _place(side, order))


def _place(side: Side, order: dict[str, int]) -> tuple[int, Side]:
    """Sorts raw inputs first, then the model's modules in their order, then bare parameters."""
    return (-1 if side[1] == "input" else order.get(side[0], len(order)), side)


def _named(alike: list[list[Unit]], order: dict[str, int]) -> Iterator[tuple[str, list[Unit]]]:
    """Gives each list of units a name of its own."""
    seen: dict[str, int] = {}
    for same in alike:
        name, kind = _leader(same[0], order)
        name = f"input {name}" if kind == "input" else name
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", same


def _coupling(name: str, same: list[Unit], order: dict[str, int]) -> Coupling:
    sides = _in_order(same[0], order)
    members = [
        Member(*side, torch.tensor([unit.channels[side] for unit in same], device="cpu"))
        for side in sides
    ]
    return Coupling(name, len(same), members)


def unsound(structure: Structure, example_inputs: ExampleInputs) -> dict[str, str]:
    """Name of each coupling that cannot be pruned as torch-pruning has it -> why."""
    names = [coupling.name for coupling in structure.couplings if coupling.units > 1]
    found: dict[str, str] = {}
    with rng_kept(structure.model), torch.no_grad():
        probe = _Probe(structure, example_inputs)
        while more := probe.search([name for name in names if name not in found]):
            found.update(more)
    return found


class WithoutStatistics(TorchFunctionMode):
    """Norms over channels become their affine part, and attention forgets its width's scale."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _AFFINE:
            function(*args, **kwargs)  # which raises where it does not take that many channels
            return _AFFINE[function](*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            kwargs["scale"] = 1.0
        return function(*args, **kwargs)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    input = input if weight is None else input * weight
    return input if bias is None else input + bias


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    return input if weight is None else input * weight


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    """Divides by the length over each group, which sees who is in it, but no zeros."""
    groups = input.unflatten(1, (num_groups, -1))
    length = (groups.square().sum(2, keepdim=True) + eps).sqrt()
    size = [1, -1, *[1] * (input.dim() - 2)]
    shaped = [None if tensor is None else tensor.view(size) for tensor in (weight, bias)]
    return _layer_norm((groups / length).flatten(1, 2), None, *shaped)


_AFFINE: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
}


def _shapes(outputs: list[Tensor]) -> list[torch.Size]:
    return [output.shape for output in outputs]


class _Probe:
    """Tries the couplings of a model on one set of random weights."""

    def __init__(self, structure: Structure, example_inputs: ExampleInputs):
        self._structure = structure
        self._inputs = example_inputs
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._before = all_tensors(structure.model)
        for self._dtype in _TOLERANCE:  # a model may insist on one of its own
            self._values = self._random_values()
            try:
                whole = self._copy({}, None)
                self._run(whole, None)
            except Exception as error:
                failure = error
                continue
            self._training_shapes = self._shapes_in_training(whole)
            return
        raise ValueError(f"the model runs neither in float64 nor in float32: {failure}")

    def _shapes_in_training(self, whole: nn.Module) -> list[torch.Size] | None:
        """Shapes that the whole model puts out in training mode, None where it fails there."""
        try:
            return _shapes(self._run(train_but_norms(whole), None))
        except Exception:  # it may want targets, for instance
            return None

    def search(self, names: list[str]) -> dict[str, str]:
        """The couplings among `names` that fail on their own, or else some that fail together."""
        reason = self._reason(names)
        if reason is None:
            return {}
        if len(names) == 1:
            return {names[0]: reason}
        first, second = names[: len(names) // 2], names[len(names) // 2 :]
        alone = self.search(first) | self.search(second)
        return alone or dict.fromkeys(second, f"it fails together with others: {reason}")

    def _reason(self, names: list[str]) -> str | None:
        """Why these couplings cannot lose one unit each, or up to half; None where they can."""
        halves = {name: self._structure.coupling(name).units // 2 for name in names}
        # of several numbers, so that two that must lose as many as each other are found out
        several = {name: half - i % half for i, (name, half) in enumerate(halves.items())}
        for amounts in (dict.fromkeys(names, 1), several):
            removed = {
                name: self._some(self._structure.coupling(name).units, amount)
                for name, amount in amounts.items()
            }
            try:
                surgery = plan(self._structure, removed)
            except Exception as error:
                return f"torch-pruning cannot cut it: {error}"
            masked, cut = {}, {}
            for name, kept in surgery.tensors.items():
                tensor = self._before[name]
                masked[tensor] = kept.mask(self._values[tensor])
                cut[tensor] = kept.take(self._values[tensor])
            try:
                copy = self._copy(cut, surgery)
                pruned = self._run(copy, surgery)
            except Exception as error:
                return f"the pruned model fails: {error}"
            if not self._agree(self._run(self._copy(masked, None), None), pruned):
                return _MIXED
            if reason := self._failure_in_training(copy, surgery):
                return reason
        return None

    def _failure_in_training(self, copy: nn.Module, surgery: Surgery) -> str | None:
        """What is wrong with a pruned copy in training mode, where the whole model runs there."""
        if self._training_shapes is None:
            return None
        try:
            shapes = _shapes(self._run(train_but_norms(copy), surgery))
        except Exception as error:
            return f"the pruned model fails in training mode: {error}"
        return None if shapes == self._training_shapes else _PUT_OUT

    def _some(self, count: int, amount: int) -> list[int]:
        shuffled = torch.randperm(count, generator=self._generator, device="cpu")
        return shuffled[:amount].tolist()

    def _copy(self, tensors: dict[Tensor, Tensor], surgery: Surgery | None) -> nn.Module:
        """A copy in eval mode that holds `tensors`, and random values elsewhere."""
        values = {
            old: nn.Parameter(value, value.is_floating_point())
            if isinstance(old, nn.Parameter)
            else value.clone()
            for old, value in {**self._values, **tensors}.items()
        }
        copy = isolated_copy(self._structure.model, values).eval()
        if surgery is not None:
            surgery.set_attributes(copy)
        return copy

    def _run(self, copy: nn.Module, surgery: Surgery | None) -> list[Tensor]:
        """The outputs of a copy."""
        inputs = self._inputs if surgery is None else surgery.slice_inputs(self._inputs)
        with WithoutStatistics():
            return output_tensors(call(copy, map_tensors(self._convert, inputs)))

    def _agree(self, whole: list[Tensor], pruned: list[Tensor]) -> bool:
        for expected, actual in zip(whole, pruned):
            if expected.shape != actual.shape:
                return False
            if expected.is_floating_point():
                finite = expected[expected.isfinite()]
                scale = finite.abs().max().item() if finite.numel() else 0.0
                close = torch.isclose(actual, expected, 0.0, _TOLERANCE[self._dtype] * scale,
                                      equal_nan=True)  # fmt: skip
                if not bool(close.all()):
                    return False
        return len(whole) == len(pruned)

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._dtype) if tensor.is_floating_point() else tensor

    def _random_values(self) -> dict[Tensor, Tensor]:
        """A value for every tensor, so that no channel is dead and no block switched off."""
        values: dict[Tensor, Tensor] = {}
        for tensor in self._before.values():
            values[tensor] = self._convert(tensor)
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
                values[tensor] = self._random_like(tensor) / math.sqrt(fan_in)
        for module in self._structure.model.modules():
            variance, mean = (own_buffers(module).get(f"running_{n}") for n in ("var", "mean"))
            if variance is not None and mean is not None:
                values[mean] = 0.3 * self._random_like(variance)
                values[variance] = 0.5 + self._random_like(variance).abs()
            if isinstance(module, nn.MultiheadAttention):  # no query: the width's scale is nothing
                for parameter in (module.in_proj_weight, module.in_proj_bias):
                    if parameter is not None:
                        values[parameter][: module.embed_dim] = 0
                if module.q_proj_weight is not None:
                    values[module.q_proj_weight].zero_()
        return values

    def _random_like(self, like: Tensor) -> Tensor:
        """Random values of mean 0 and variance 1."""
        values = torch.empty(like.shape, dtype=self._dtype, device="cpu")
        values.uniform_(-math.sqrt(3), math.sqrt(3), generator=self._generator)
        return values.to(like.device)
