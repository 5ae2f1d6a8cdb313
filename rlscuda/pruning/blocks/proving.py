"""The proof that a branch is what its stand-ins leave out: two copies that put out the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.pruning.blocks.dataflow import record
from rlscuda.pruning.blocks.stand_ins import StandIn
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    call,
    isolated_copy,
    leaves,
    map_tensors,
    output_tensors,
    rng_kept,
    train_but_norms,
)

_TOLERANCE = 1e-5  # of the largest output, for kernels may differ with the memory's layout


def with_stand_ins(model: nn.Module, stand_ins: Mapping[str, StandIn]) -> nn.Module:
    """A copy in eval mode with some modules replaced."""
    copy = isolated_copy(model).eval()
    for name, stand_in in stand_ins.items():
        parent, _, own = name.rpartition(".")
        setattr(copy.get_submodule(parent), own, isolated_copy(stand_in).eval())
    return copy


@torch.no_grad()
def prove(
    model: nn.Module,
    operation: int,
    operand: int,
    example_inputs: ExampleInputs,
    stand_ins: Mapping[str, StandIn],
    exit_name: str,
    zero: bool = True,
) -> tuple[int, ...]:
    """The shape of what the exit is given where stand-ins are in a branch's place.

    The example inputs are tried, and noise of their shapes; in training mode the model has to run.

    Args:
        model: The model; copies of it run.
        operation: Number of the sum among the operators of a forward.
        operand: Of the branch in it.
        example_inputs: What it can be called with.
        stand_ins: By the name of what they replace.
        exit_name: The last of these.
        zero: Whether the model has to put out what it does with zeros in the branch's place.

    Raises:
        ValueError: It does not, or fails.
    """
    seen: list[tuple[int, ...]] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(tuple(output_tensors((args, kwargs))[0].shape))

    without = with_stand_ins(model, stand_ins)
    without.get_submodule(exit_name).register_forward_pre_hook(see, with_kwargs=True)
    with rng_kept(model):
        trials = (example_inputs, map_tensors(_noise, example_inputs))
        for inputs in trials if zero else trials[:1]:
            wanted: Any = None
            try:
                if zero:
                    flow = record(isolated_copy(model).eval(), inputs, (operation, operand))
                    wanted = flow.runs[0].output
            except Exception as error:
                if inputs is example_inputs:
                    raise ValueError(f"the model fails with zeros in its place: {error}") from error
                continue  # what is no noise to it: numbers that are rounded to indices
            try:
                got = call(without, inputs)
            except Exception as error:
                if seen and not zero:
                    return seen[0]
                what = f"{type(error).__name__}: {error}"
                raise ValueError(f"the model fails without it: {what}") from error
            if zero and _lengths(got) != _lengths(wanted):
                raise ValueError("it fills the cache by which the model counts its tokens")
            if zero:
                _compare(output_tensors(got), output_tensors(wanted))
        if zero:
            _train(model, without, example_inputs)
    return seen[0]


def _lengths(output: Any) -> list[int]:
    """What caches of transformers among the outputs count; they ask one layer for it."""
    counts = [getattr(leaf, "get_seq_length", None) for leaf in leaves(output)]
    return [int(count()) for count in counts if callable(count)]


def _noise(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor


def _train(model: nn.Module, without: nn.Module, example_inputs: ExampleInputs) -> None:
    """Raises ValueError where a model trains on the example inputs, but not without a branch."""

    def trains(copy: nn.Module) -> None:
        with torch.enable_grad():
            outputs = output_tensors(call(train_but_norms(copy), example_inputs))
            sums = [output.float().sum() for output in outputs if output.requires_grad]
            if sums:
                torch.stack(sums).sum().backward()

    try:
        trains(without)
    except Exception as error:
        try:
            trains(isolated_copy(model))
        except Exception:
            return  # the whole model wants something else there
        raise ValueError(f"the model does not train without it: {error}") from error


def _compare(got: list[Tensor], wanted: list[Tensor]) -> None:
    if [t.shape for t in got] != [t.shape for t in wanted]:
        raise ValueError("the model puts out other shapes without it")
    for one, other in zip(got, wanted):
        finite = other[other.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        apart = (one.double() - other.double()).abs()
        apart[(one == other) | (one.isnan() & other.isnan())] = 0  # infinite ones among them
        if not bool((apart <= _TOLERANCE * max(1.0, largest)).all()):
            raise ValueError(
                "what is left of it does not put out zeros: the model without it and with zeros in "
                f"its place differ by {float(apart.max()):.2g}"
            )
