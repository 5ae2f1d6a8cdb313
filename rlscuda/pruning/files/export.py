"""A model as a `torch.export` program or as ONNX, checked against the model before it is a file."""

from __future__ import annotations

import inspect
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import prune

from rlscuda._torch import masked_name, pre_hooks, tree_map, unwrapped
from rlscuda.files.atomic import write_atomically
from rlscuda.optional import optional
from rlscuda.pruning.running.calls import Call, call_of, inference, isolated_copy, output_tensors

TOLERANCE = 1e-5  # of an exported output, as a share of the largest one or of 1


def _inference_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, masks made permanent; an optimizer's hooks are not in it."""
    whole = isolated_copy(unwrapped(model)).eval()
    for module in whole.modules():
        for hook in list(pre_hooks(module).values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, masked_name(hook))
    return whole


def _program(model: nn.Module, call: Call) -> ExportedProgram:
    """The exported program, of any batch size."""
    batch = Dim("batch")
    arguments = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    shapes = tree_map(lambda value: {0: batch} if call.batched(value) else None, dict(arguments))
    call = call.resized(max(2, call.batch))  # a batch of 1 would be taken for a constant
    with torch.no_grad():
        return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes)


def _check(model: nn.Module, run: Callable[[Call], list[Tensor]], call: Call, kind: str) -> None:
    """Compares what was written with the model, at the example's batch size and another.

    Raises:
        RuntimeError: They differ.
    """
    for batch in (call.batch, call.batch + 1):
        inputs = call.resized(batch)
        with inference(model):
            expected = output_tensors(inputs(model))
        found = run(inputs)
        if [t.shape for t in found] != [t.shape for t in expected]:
            raise RuntimeError(
                f"the {kind} must give outputs {[list(t.shape) for t in expected]} at batch size "
                f"{batch}, got {[list(t.shape) for t in found]}; nothing was written"
            )
        for i, (value, reference) in enumerate(zip(found, expected)):
            if not reference.numel():
                continue
            reference = reference.double()
            error = (value.to(reference.device).double() - reference).abs().max().item()
            limit = TOLERANCE * max(1.0, reference.abs().max().item())
            if not error <= limit:
                raise RuntimeError(
                    f"output {i} of the {kind} must be the model's within {limit:.1e} at batch "
                    f"size {batch}, got {error:.1e}; nothing was written"
                )


def export_program(model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]) -> None:
    """Writes the model in eval mode as a `torch.export` program (.pt2) for any batch size.

    The program is loaded again from the bytes to be written and must give the model's outputs on
    the example, and on one sample more, within 1e-5.

    Args:
        model: The model; it stays as it is. Masks are made permanent in the program.
        example_inputs: A tensor, a tuple or list of positional arguments, or a dict of named ones;
            dimension 0 of each tensor as long as the first one is the batch.
        path: The file; it is replaced in one step, or stays as it was.

    Raises:
        TypeError: `example_inputs` holds no tensor.
        RuntimeError: The program's outputs differ. `torch.export` raises its own errors where it
            cannot trace the model.
    """
    call, whole = call_of(example_inputs), _inference_copy(model)
    stream = io.BytesIO()
    torch.export.save(_program(whole, call), stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()

    def run(inputs: Call) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(inputs(loaded))

    _check(whole, run, call, "exported program")
    write_atomically(Path(path), lambda file: file.write(stream.getbuffer()))


@contextmanager
def _in_onnxruntime() -> Iterator[None]:
    """Raises RuntimeError for whatever onnxruntime raises, whose errors have no type in common."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"onnxruntime cannot run the ONNX model: {error}; nothing was written"
        ) from error


def _name_batch(graph: Any) -> None:
    """Gives the one symbol among the shapes of the inputs, the batch's, a name to read."""
    values = (*graph.input, *graph.output, *graph.value_info)
    sizes = [size for value in values for size in value.type.tensor_type.shape.dim]
    for symbol in {s.dim_param for v in graph.input for s in v.type.tensor_type.shape.dim}:
        for size in sizes if symbol else ():
            if size.dim_param:  # as 2*s17 of what joins two batches
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", size.dim_param)


def export_onnx(model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]) -> None:
    """Writes the model in eval mode as ONNX for any batch size, as `export_program` does.

    The dimension of the batch is named `batch`. The check runs in onnxruntime on the CPU. The model
    must fit into one file of 2 GB.

    Args:
        model: The model; it stays as it is. Masks are made permanent in the file.
        example_inputs: As for `export_program`.
        path: The file; it is replaced in one step, or stays as it was.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        TypeError: `example_inputs` holds no tensor.
        RuntimeError: The outputs differ, an operator has no ONNX form, or onnxruntime cannot run
            the model, as in bfloat16.
    """
    for package in ("onnx", "onnxscript"):
        optional(package, "export")
    onnxruntime = optional("onnxruntime", "export")
    call, whole = call_of(example_inputs).to("cpu"), _inference_copy(model).cpu()
    converted = torch.onnx.export(_program(whole, call), dynamo=True, verbose=False)
    assert converted is not None  # it was given no file
    proto = converted.model_proto
    _name_batch(proto.graph)
    data = proto.SerializeToString()
    with _in_onnxruntime():
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(inputs: Call) -> list[Tensor]:
        names = [value.name for value in session.get_inputs()]
        with _in_onnxruntime():
            feed = {name: tensor.numpy() for name, tensor in zip(names, inputs.tensors())}
            return [torch.from_numpy(value) for value in session.run(None, feed)]

    _check(whole, run, call, "ONNX model")
    write_atomically(Path(path), lambda file: file.write(data))
