"""Pruned models come back from their files as they were, or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.compare import differing, snapshot
from torch import nn
from torch.nn.utils import prune

from rlscuda import RLSOptimizer
from rlscuda.pruning.files.saving import load_optimizer, load_pruned, save_pruned


class Net(nn.Module):
    """Convolution, norms, recurrence, a tie and buffers, of a width that pruning would change."""

    def __init__(self, width: int = 6, hidden: int = 5, tied: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.first = nn.Linear(width * 16, hidden)
        self.norm = nn.LayerNorm((hidden,))
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.middle = nn.Linear(hidden, hidden)
        self.again = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 3)
        self.sizes = [width, (hidden, 0.5)]
        self.note = "plain"
        self.register_buffer("offset", torch.full((hidden,), 0.25), persistent=False)
        if tied:
            self.again.weight = self.middle.weight

    def forward(self, x):
        x = self.depthwise(self.bn(self.conv(x)).relu()).flatten(1)
        x = self.norm(self.first(x)) + self.offset
        x = self.again(self.middle(self.lstm(x.unsqueeze(1))[0].squeeze(1)).relu())
        return self.last(x)


def trained(model: nn.Module, optimizer, steps: int = 3, seed: int = 1) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed + step)
        optimizer.zero_grad()
        model(torch.randn(8, 2, 4, 4, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.fixture
def pruned() -> Net:
    """What surgery would leave of `Net()`."""
    model = Net(width=3, hidden=2)
    trained(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return model


def test_comes_back_to_the_bit(pruned, tmp_path):
    pruned.last.weight.requires_grad_(False)
    pruned.norm.bfloat16()
    pruned.offset.add_(1)
    pruned.note = "of no number, so the factory's own"
    save_pruned(pruned, tmp_path / "model.safetensors")
    model = load_pruned(Net, tmp_path / "model.safetensors")
    for (name, value), (other, loaded) in zip(
        [*pruned.named_parameters(), *pruned.named_buffers()],
        [*model.named_parameters(), *model.named_buffers()],
    ):
        assert name == other and value.dtype == loaded.dtype
        assert torch.equal(value, loaded) and value.requires_grad == loaded.requires_grad
    assert (model.conv.out_channels, model.bn.num_features, model.depthwise.groups) == (3, 3, 3)
    assert (model.norm.normalized_shape, model.lstm.hidden_size) == ((2,), 2)
    assert model.sizes == [3, (2, 0.5)] and model.note == "plain"
    assert "offset" not in model.state_dict()
    pruned.norm.float()
    model.norm.float()
    x = torch.randn(4, 2, 4, 4)
    assert torch.equal(pruned(x), model(x))


def test_ties_are_those_of_the_file(pruned, tmp_path):
    save_pruned(pruned, tmp_path / "tied")
    for tied in (True, False):
        model = load_pruned(lambda tied=tied: Net(tied=tied), tmp_path / "tied")
        assert model.again.weight is model.middle.weight
    assert "again.weight" not in load_file(tmp_path / "tied")
    pruned.again.weight = nn.Parameter(torch.randn(2, 2))
    save_pruned(pruned, tmp_path / "untied")
    model = load_pruned(Net, tmp_path / "untied")
    assert torch.equal(model.again.weight, pruned.again.weight)
    assert torch.equal(model.middle.weight, pruned.middle.weight)


def test_shared_module_and_shared_memory(tmp_path):
    def factory(width=4):
        layer = nn.Linear(width, width)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = factory(2)
    model.register_buffer("view", model[0].weight.detach()[:, 0])
    save_pruned(model, tmp_path / "model")

    def with_buffer():
        whole = factory()
        whole.register_buffer("view", torch.zeros(4))
        return whole

    loaded = load_pruned(with_buffer, tmp_path / "model")
    assert loaded[0] is loaded[2] and torch.equal(loaded[0].weight, model[0].weight)
    assert torch.equal(loaded.view, model.view)


def test_an_ordinary_safetensors_file_with_a_readable_manifest(pruned, tmp_path):
    save_pruned(pruned, tmp_path / "model", optimizer=torch.optim.SGD(pruned.parameters()))
    with safe_open(tmp_path / "model", "pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["manifest"])
    assert (metadata["format"], metadata["version"]) == ("rlscuda-pruned", "1")
    assert manifest["torch"] == torch.__version__ and "rlscuda" in manifest
    assert manifest["tensors"]["conv.weight"]["shape"] == [3, 2, 3, 3]
    assert manifest["ties"] == {"again.weight": "middle.weight"}
    tensors = load_file(tmp_path / "model")
    assert torch.equal(tensors.pop("conv.weight"), pruned.conv.weight)
    assert tensors.pop(".optimizer").dtype == torch.uint8


@pytest.mark.parametrize(
    "make",
    [
        RLSOptimizer,
        lambda model: RLSOptimizer(model, form="paper", momentum=0.5, fallback="sgd"),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
    ],
    ids=["adaptive", "paper", "adam"],
)
def test_training_goes_on_to_the_bit(make, tmp_path):
    model = Net(width=3, hidden=2)
    optimizer = make(model)
    trained(model, optimizer)
    save_pruned(model, tmp_path / "model", optimizer=optimizer)
    trained(model, optimizer, seed=7)
    loaded = load_pruned(Net, tmp_path / "model")
    resumed = make(loaded)
    load_optimizer(resumed, tmp_path / "model")
    trained(loaded, resumed, seed=7)
    assert not differing(snapshot(model, optimizer), snapshot(loaded, resumed))
    assert torch.equal(model.bn.running_var, loaded.bn.running_var)


def test_a_failed_write_leaves_the_old_file(pruned, tmp_path, monkeypatch):
    path = tmp_path / "model"
    save_pruned(pruned, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(OSError, match="no space"):
                save_pruned(Net(), path)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


class Code:
    """What only pickled code could bring back."""


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"count": 3}


def test_refuses_to_save_what_the_file_cannot_hold(pruned, tmp_path):
    path = tmp_path / "model"
    optimizer = torch.optim.SGD(pruned.parameters())
    optimizer.param_groups[0]["rule"] = Code()
    with pytest.raises(ValueError, match="state of SGD cannot be saved without code"):
        save_pruned(pruned, path, optimizer=optimizer)
    with pytest.raises(ValueError, match="'0' keeps extra state"):
        save_pruned(nn.Sequential(Extra(2, 2)), path)
    prune.random_unstructured(pruned.last, "weight", 1)
    with pytest.raises(ValueError, match="'last' has a mask.*make it permanent"):
        save_pruned(pruned, path)
    with pytest.raises(ValueError, match="'weight' must be a dense tensor with data.*meta"):
        save_pruned(nn.Linear(2, 2, device="meta"), path)
    assert not list(tmp_path.iterdir())


def rewritten(path, **changes) -> None:
    """Changes the file's metadata, or of `tensors` those that are given; without checksums."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["manifest"])
    if metadata.pop("sha256", None) and manifest.pop("sha256"):
        metadata["manifest"] = json.dumps(manifest)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors.update(changes.pop("tensors", {}))
    save_file(tensors, path, metadata={**metadata, **changes})


def factory_with(**modules) -> Net:
    model = Net()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def without_norm() -> Net:
    model = Net()
    del model.norm
    return model


WRONG_FACTORIES = {
    "missing module": (without_norm, "modules that only the file has: norm; that only.*none"),
    "more modules": (lambda: factory_with(more=nn.ReLU()), "only the factory's model has: more"),
    "other type": (lambda: factory_with(bn=nn.GroupNorm(1, 6)), "'bn' must be a BatchNorm2d"),
    "no bias": (
        lambda: factory_with(last=nn.Linear(5, 3, bias=False)),
        "parameters and buffers that only the file has: last.bias",
    ),
    "narrower": (lambda: Net(width=2), r"'conv.weight' \[3, 2, 3, 3\] is no pruned \[2, 2, 3, 3\]"),
    "other kernel": (
        lambda: factory_with(conv=nn.Conv2d(2, 6, 1)),
        r"\[3, 2, 3, 3\] is no pruned \[6, 2, 1, 1\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_FACTORIES)
def test_wrong_factories(case, pruned, tmp_path):
    save_pruned(pruned, tmp_path / "model")
    factory, message = WRONG_FACTORIES[case]
    model = factory()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = list(model.parameters())
    with pytest.raises(ValueError, match=message):
        load_pruned(lambda: model, tmp_path / "model")
    assert all(p is q for p, q in zip(objects, model.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.conv.out_channels == len(model.conv.weight)


def test_a_factory_that_compiles(pruned, tmp_path):
    save_pruned(torch.compile(pruned, backend="eager"), tmp_path / "model")
    loaded = load_pruned(lambda: torch.compile(Net(), backend="eager"), tmp_path / "model")
    assert isinstance(loaded, torch._dynamo.OptimizedModule)
    expected = pruned.state_dict()
    found = loaded._orig_mod.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_wrong_kind_of_tensor(tmp_path):
    def factory(as_parameter):
        model, scale = nn.Linear(2, 2), torch.ones(2)
        if as_parameter:
            model.scale = nn.Parameter(scale)
        else:
            model.register_buffer("scale", scale)
        return model

    save_pruned(factory(True), tmp_path / "model")
    with pytest.raises(ValueError, match="'scale' must be a parameter, got a buffer"):
        load_pruned(lambda: factory(False), tmp_path / "model")


def test_broken_files(pruned, tmp_path):
    path = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match="model is no file"):
        load_pruned(Net, path)
    save_pruned(pruned, path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            load_pruned(Net, path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="was not written by save_pruned"):
        load_pruned(Net, path)
    path.write_bytes(whole)
    rewritten(path, version="2")
    with pytest.raises(ValueError, match="must be of format version 1, got 2"):
        load_pruned(Net, path)
    path.write_bytes(whole)
    rewritten(path, manifest="{")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_pruned(Net, path)
    path.write_bytes(whole)
    rewritten(path, tensors={"last.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'last.bias' must be \[3\] float32.*, got \[2\] float32"):
        load_pruned(Net, path)
    path.write_bytes(whole)
    rewritten(path, tensors={"unlisted": torch.ones(2)})
    with pytest.raises(ValueError, match="manifest does not list the tensors"):
        load_pruned(Net, path)


def test_other_errors(pruned, tmp_path):
    path = tmp_path / "model"
    save_pruned(pruned, path)
    with pytest.raises(TypeError, match="factory must return a module, got int"):
        load_pruned(lambda: 3, path)
    with pytest.raises(ValueError, match="holds no optimizer"):
        load_optimizer(torch.optim.SGD(pruned.parameters()), path)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.5)
    save_pruned(pruned, path, optimizer=optimizer)
    other = torch.optim.SGD([pruned.last.weight], lr=0.1)
    with pytest.raises(ValueError, match="doesn't match the size"):
        load_optimizer(other, path)
    assert other.param_groups[0]["lr"] == 0.1


def test_the_missing_package_is_named(pruned, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors.torch.*rlscuda\[pruning\]"):
        save_pruned(pruned, tmp_path / "model")
