"""Training steps on a GPU as multiples of fused Adam's, and the optimizer's step by itself.

TF32 is on for products and convolutions. The step by itself runs over the layers of a network with
random gradients and summaries, staged anew for each step, against the same rules in plain PyTorch.
"""

import networks
import pytest
import shapes
import torch
import torch.nn.functional as F
from eager_rls import EagerRLS
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.cli.models import ImageShape, build_model
from rlscuda.staging import Summary

LR, BATCH = 1e-3, 128
NETWORKS = {
    "ResNet-18, 32 × 32, batch 128": networks.resnet18,
    "VGG-16, 32 × 32, batch 128": lambda: build_model("vgg16", ImageShape(3, 32, 32), 10),
}
OPTIMIZERS = {
    "RLS adaptive": lambda m: RLSOptimizer(m, lr=LR),
    "RLS paper, mean": lambda m: RLSOptimizer(m, lr=LR, form="paper"),
    shapes.BASELINE: lambda m: torch.optim.Adam(m.parameters(), lr=LR, fused=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9),
}
LAYERS = {"ResNet-50": networks.resnet50_layers, "VGG-16": networks.vgg16_layers}
RULES = {"paper": {"summary": "mean", "rank": 1}, "adaptive": {"summary": "sample", "rank": 16}}


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


class Trainer:
    """A network with its optimizer and one minibatch; calling it makes one step."""

    def __init__(self, build, make):
        torch.manual_seed(0)
        self.model: nn.Module = build().cuda()
        self.optimizer = make(self.model)
        self.x = torch.randn(BATCH, 3, 32, 32, device="cuda")
        self.y = torch.randint(10, (BATCH,), device="cuda")

    def __call__(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()


@pytest.mark.parametrize("name", NETWORKS)
def test_training_step(race, name):
    lanes = {key: Trainer(NETWORKS[name], make) for key, make in OPTIMIZERS.items()}
    race(
        name,
        lanes,
        targets={f"RLS adaptive / {shapes.BASELINE}": 1.25},
        ratios=[f"{key} / {shapes.BASELINE}" for key in OPTIMIZERS if key != shapes.BASELINE],
        rounds=15,
        sample_seconds=0.05,
    )
    for key, train in lanes.items():
        assert all(p.isfinite().all() for p in train.model.parameters()), key


class Step:
    """An optimizer over bare layers; calling it makes one step with the same random inputs."""

    def __init__(self, build, kind, form):
        torch.manual_seed(0)
        self.layers = build().cuda()
        rule = RULES[form]
        for p in self.layers.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        self.optimizer = kind(self.layers, form=form, lr=LR, **rule)
        self.rows = {}
        for layer in self.layers:
            n = layer.weight[0].numel() + (layer.bias is not None)
            self.rows[layer] = torch.randn(rule["rank"], n, device="cuda") / n**0.5
        self.summary, self.rank = rule["summary"], rule["rank"]

    def __call__(self):
        if isinstance(self.optimizer, EagerRLS):
            self.optimizer.staged.update(self.rows)
        else:
            for layer, rows in self.rows.items():
                stage = self.optimizer._stages[layer.weight]
                stage.summary = Summary(self.summary, rows[None], [BATCH] * self.rank)
        self.optimizer.step()


@pytest.mark.parametrize("form", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_step_alone(race, name, form):
    lanes = {"ours": Step(LAYERS[name], RLSOptimizer, form)}
    lanes["eager"] = Step(LAYERS[name], EagerRLS, form)
    race(
        f"{name} layers, step alone, {form}",
        lanes,
        targets={"ours / eager": 0.2},
        rounds=12,
        sample_seconds=0.05,
    )
