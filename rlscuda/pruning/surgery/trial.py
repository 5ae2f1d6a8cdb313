"""What a pruned copy has to do before the model itself is cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from rlscuda.pruning.running.calls import (
    ExampleInputs,
    call,
    feed,
    inputs_of,
    isolated_copy,
    output_tensors,
    rng_kept,
    train_but_norms,
)
from rlscuda.pruning.running.watching import branched, sized_by_values, unreached
from rlscuda.pruning.surgery.plan import Surgery


def prove(
    model: nn.Module,
    surgery: Surgery,
    pruned: nn.Module,
    example_inputs: ExampleInputs,
    batches: Iterable[tuple[Any, Any]] = (),
) -> None:
    """Runs a pruned copy on the example inputs and on batches, and once more in training mode.

    Args:
        model: The model before the cut; copies of it are run.
        surgery: What was removed.
        pruned: The copy in eval mode, which is left in training mode.
        example_inputs: What the whole model can be called with.
        batches: Each as the whole model and as the pruned one takes it, see `feed`.

    Raises:
        TypeError: A batch is none that `feed` takes.
        ValueError: It fails, on a batch or in training mode where the whole model does not, or
            puts out other shapes on the example inputs.
    """
    inputs = surgery.slice_inputs(example_inputs)
    try:
        with rng_kept(model):
            output = call(pruned, inputs)
    except Exception as error:
        raise ValueError(
            f"the pruned model fails on the example inputs: {error}; is a number of channels "
            "written into its forward? What produces them can be named in ignored"
        ) from error
    shapes = [tuple(tensor.shape) for tensor in output_tensors(output)]
    if shapes != surgery.output_shapes and not _only_as_many(
        shapes, model, surgery, example_inputs
    ):
        raise ValueError(f"the pruned model must put out {surgery.output_shapes} on the example "
                         f"inputs, got {shapes}")  # fmt: skip
    with rng_kept(model):
        for batch in batches:
            _try_on_batch(model, pruned, batch, example_inputs)
        _try_in_training(model, pruned, inputs, example_inputs)


def _only_as_many(
    shapes: list[tuple[int, ...]], model: nn.Module, surgery: Surgery, example_inputs: ExampleInputs
) -> bool:
    """Whether outputs differ in their first size alone, and values decide about sizes.

    As of a detector, which puts out as many boxes as it finds.
    """
    whole = surgery.output_shapes
    others = [[(len(shape), *shape[1:]) for shape in found] for found in (shapes, whole)]
    return others[0] == others[1] and sized_by_values(isolated_copy(model), example_inputs)


def _try_on_batch(
    model: nn.Module, pruned: nn.Module, batches: tuple[Any, Any], example_inputs: ExampleInputs
) -> None:
    whole, sliced = batches
    inputs = inputs_of(pruned, sliced)
    try:
        call(pruned, inputs)
    except Exception as error:
        feed(isolated_copy(model).eval(), whole)  # whose own error is another
        raise branched(error, unreached(isolated_copy(model), example_inputs)) from error


def _try_in_training(
    model: nn.Module, pruned: nn.Module, inputs: Any, example_inputs: ExampleInputs
) -> None:
    try:
        call(train_but_norms(pruned), inputs)
    except Exception as error:
        try:
            call(train_but_norms(isolated_copy(model)), example_inputs)
        except Exception:
            return  # the whole model wants something else there
        raise ValueError(
            f"the pruned model fails in training mode on the example inputs: {error}; what "
            "produces the channels can be named in ignored"
        ) from error
