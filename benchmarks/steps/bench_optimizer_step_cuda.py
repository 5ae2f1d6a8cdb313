"""The optimizer's step by itself on a GPU, against the same rules in plain PyTorch.

It runs over the layers of a network with random gradients and summaries, staged anew for each step,
which has an update of `P`.
"""

import pytest
import torch

from benchmarks.common.eager_rls import EagerRLS
from benchmarks.steps import networks
from rlscuda import RLSOptimizer
from rlscuda.optim.staging import Summary

LR, BATCH = 1e-3, 128
LAYERS = {"ResNet-50": networks.resnet50_layers, "VGG-16": networks.vgg16_layers}
RULES = {"paper": {"summary": "mean", "rank": 1}, "adaptive": {"summary": "sample", "rank": 16}}


class Step:
    """An optimizer over bare layers; calling it makes one step with the same random inputs."""

    def __init__(self, build, kind, form):
        torch.manual_seed(0)
        self.layers = build().cuda()
        rule = RULES[form]
        for p in self.layers.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        self.optimizer = kind(self.layers, form=form, lr=LR, **rule)
        for group in self.optimizer.param_groups:
            group["interval"] = 1
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
                stage = self.optimizer._registry.covered[layer.weight].stage
                stage.summary = Summary(self.summary, rows[None], [BATCH] * self.rank)
        self.optimizer.step()


@pytest.mark.parametrize("form", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_optimizer_step(race, name, form):
    lanes = {"ours": Step(LAYERS[name], RLSOptimizer, form)}
    lanes["eager"] = Step(LAYERS[name], EagerRLS, form)
    race(
        f"layers of {name}, {form}",
        lanes,
        targets={"ours / eager": 0.2},
        rounds=12,
        sample_seconds=0.05,
    )
