"""A model leaves while it is trained: exported, saved whole, loaded where this package is not."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from optim.dropin.networks import Recurrent
from support.compare import differing, snapshot
from support.training import cnn, mlp
from torch import nn

from rlscuda import RLSOptimizer


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


MODELS = {
    "mlp": (mlp, (8, 4)),
    "cnn": (cnn, (8, 2, 6, 6)),
    "gru": (Recurrent, (8, 6, 4)),
    "attention": (Attention, (8, 5, 8)),
}


def build(name):
    torch.manual_seed(0)
    kind, shape = MODELS[name]
    return kind(), shape


def fit(model, optimizer, shape, seed, steps=2):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().mean().backward()
        optimizer.step()


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_while_it_is_trained(name, strict, training):
    """Nothing of ours is in the program, and training goes on to the bit."""
    model, shape = build(name)
    twin = copy.deepcopy(model)
    optimizer, other = RLSOptimizer(model), RLSOptimizer(twin)
    for m, o in ((model, optimizer), (twin, other)):
        fit(m, o, shape, 1)
    x = torch.randn(shape)
    model.train(training)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    program = torch.export.export(model, (x,), strict=strict)
    assert operators(program) and not any("rlscuda" in name for name in operators(program))
    assert all(map(torch.equal, buffers.values(), model.buffers()))
    exported = program.module()
    state = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-6)
    model.load_state_dict(state)  # of a batch norm
    model.train()
    for m, o in ((model, optimizer), (twin, other)):
        fit(m, o, shape, 2)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert str(optimizer.health()) == str(other.health())


LOADED = """
import pickle, sys, torch

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "rlscuda":
            raise ImportError(f"{name} is not to be imported here")

sys.meta_path.insert(0, Blocked())
for path in sys.argv[1:3]:
    with open(path, "rb") as file:
        model = pickle.load(file) if path.endswith("pkl") else torch.load(file, weights_only=False)
    x, y = torch.load(sys.argv[3])
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    model(x).sum().backward()
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in model.modules())
assert not any(name.partition(".")[0] == "rlscuda" for name in sys.modules)
print("loaded")
"""


def whole():
    """Of torch's own classes alone: a process that lacks the tests' may load it, too."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Conv1d(4, 8, 1), nn.Flatten(2), block, nn.LayerNorm(8), nn.Linear(8, 3))


def test_loaded_where_this_package_cannot_be_imported(tmp_path):
    model = whole()
    optimizer = RLSOptimizer(model.parameters())
    fit(model, optimizer, (3, 4, 8), 1)
    x = torch.randn(3, 4, 8)
    model(x).sum()  # its hooks have just been called, and nothing of that is saved
    paths = [tmp_path / name for name in ("model.pt", "model.pkl", "data.pt")]
    torch.save(model, paths[0])
    paths[1].write_bytes(pickle.dumps(model))
    assert not any(b"rlscuda" in path.read_bytes() for path in paths[:2])
    model.eval()
    torch.save((x, pickle.loads(pickle.dumps(model))(x).detach()), paths[2])
    model.train()
    done = subprocess.run([sys.executable, "-c", LOADED, *map(str, paths)], capture_output=True,
                          text=True, cwd=tmp_path)  # fmt: skip
    assert done.stdout.strip() == "loaded", done.stderr
    fit(model, optimizer, (3, 4, 8), 2)
    assert optimizer.health()["4"].updates == 4
