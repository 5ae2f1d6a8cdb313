"""Exported models give the model's outputs, and leave no file where they do not."""

from __future__ import annotations

import sys

import onnxruntime
import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn
from torch.nn.utils import prune

from rlscuda.pruning.files import export
from rlscuda.pruning.files.export import export_onnx, export_program

# of torch itself, while it converts
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def onnx_outputs(path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs)}
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def program_outputs(path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [torch.export.load(path).module()(*inputs)]


KINDS = {"program": (export_program, program_outputs), "onnx": (export_onnx, onnx_outputs)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_in_training(kind, tmp_path):
    write, outputs = KINDS[kind]
    model = cnn()
    optimizer = make(model)
    prune.l1_unstructured(model[5], "weight", 0.5)
    train(model, optimizer)
    flags, before = [m.training for m in model.modules()], snapshot(model, optimizer)
    path = tmp_path / "model.pt2"
    write(model, batch(model, 1), path)
    assert [m.training for m in model.modules()] == flags and prune.is_pruned(model[5])
    assert not differing(before, snapshot(model, optimizer))
    model.eval()
    for size in (1, 2, 5):
        x = batch(model, size)
        torch.testing.assert_close(outputs(str(path), x), [model(x).detach()], rtol=0, atol=1e-5)
    model.train()
    train(model, optimizer)  # the hooks of the model itself still stage
    assert optimizer.health()["0"].updates == 6 and optimizer.health()["0"].missing == 0


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, scale, shift=None, double=False):
        y = self.layer(x) * scale
        return {"y": y + shift, "x": (x * 2 if double else x).sum(1)}


def test_named_inputs_and_several_outputs(tmp_path):
    model = Named()
    inputs = {"x": torch.randn(3, 4), "scale": torch.tensor(2.0), "shift": torch.randn(3, 2)}
    export_program(model, inputs, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(**inputs)
    torch.testing.assert_close(found, model(**inputs))


class Joined(nn.Module):
    """Puts out the batch, twice the batch, and a number; one input has no batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, scale, others=None, double=False):
        y = self.layer(x) * scale
        return y, torch.cat((x, others["more"])) * (2 if double else 1), y.mean()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("named", [True, False])
def test_the_batch_of_onnx_is_named(size, named, tmp_path):
    values = torch.randn(size, 4), torch.tensor([2.0, 3.0]), {"more": torch.randn(size, 4)}, True
    inputs = dict(zip(("x", "scale", "others", "double"), values)) if named else values
    export_onnx(Joined(), inputs, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [v.shape for v in session.get_inputs()] == [["batch", 4], [2], ["batch", 4]]
    assert [v.shape for v in session.get_outputs()] == [["batch", 2], ["2*batch", 4], []]


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_leaves_no_file(kind, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match=r"output 0 of the .* within -1.0e\+00 at batch size 2"):
        KINDS[kind][0](mlp(), torch.randn(2, 4), path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_other_shapes_are_a_difference(tmp_path, monkeypatch):
    load = torch.export.load

    class Cut:
        def __init__(self, stream):
            self._program = load(stream)

        def module(self):
            return nn.Sequential(self._program.module(), nn.Flatten(0))

    monkeypatch.setattr(torch.export, "load", Cut)
    with pytest.raises(RuntimeError, match=r"must give outputs \[\[2, 3\]\].*, got \[\[6\]\]"):
        export_program(mlp(), torch.randn(2, 4), tmp_path / "model")
    assert not list(tmp_path.iterdir())


class Constant(nn.Module):
    def forward(self, x):
        return x.reshape(3, -1)


def test_what_cannot_be_traced_leaves_no_file(tmp_path):
    with pytest.raises(Exception, match="batch"):
        export_program(Constant(), torch.randn(3, 4), tmp_path / "model")
    with pytest.raises(TypeError, match="got str"):
        export_program(mlp(), "x", tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", [nn.Linear(4, 2), nn.Conv1d(4, 2, 1), nn.Identity()])
def test_what_onnxruntime_cannot_run_leaves_no_file(layer, tmp_path):
    x = torch.randn(2, 4, 1) if isinstance(layer, nn.Conv1d) else torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="onnxruntime cannot run the ONNX model: "):
        export_onnx(layer.bfloat16(), x.bfloat16(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"the package {package}, .*rlscuda\[export\]"):
        export_onnx(mlp(), torch.randn(2, 4), tmp_path / "model")
