"""RLSOptimizer against the eager oracle of the benchmarks, which shares no code with it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common.eager_rls import EagerRLS
from rlscuda import RLSOptimizer

PLAIN = {"momentum": 0.0, "weight_decay": 0.0}
CASES = {
    "paper": PLAIN | {"form": "paper", "lr": 0.3, "gain": 0.1, "momentum": 0.5},
    "natural-forgetting": PLAIN
    | {"form": "natural", "lr": 0.1, "gain": 0.2, "forgetting": 0.99, "momentum": 0.9},
    "paper-shrinkage": PLAIN
    | {"form": "paper", "lr": 0.3, "gain": 0.1, "forgetting": 0.95, "shrinkage": 0.1},
    "paper-unlimited": PLAIN
    | {"form": "paper", "lr": 0.3, "gain": 0.1, "momentum": 0.5, "trust_ratio": math.inf},
    "natural-rank4": PLAIN
    | {"form": "natural", "lr": 0.1, "gain": 0.2, "rank": 4, "weight_decay": 0.1},
    "adaptive-rank1": {"form": "adaptive", "rank": 1},
    "adaptive-rank4": {"form": "adaptive", "rank": 4, "lr": 0.2, "drift": 0.2},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 6, 3, dilation=(1, 2), bias=False), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(18, 7), nn.ReLU(), nn.Linear(7, 4)),
    ).double()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_training_agrees_with_the_eager_oracle(settings):
    net = network()
    twin = copy.deepcopy(net)
    common = settings | {"summary": "mean", "fallback_lr": 1e-3}
    pairs = [(net, RLSOptimizer(net, ridge=0, **common)), (twin, EagerRLS(twin, **common))]
    start = net[3].weight.detach().clone()
    for _ in range(12):
        x, y = torch.randn(16, 3, 9, 9, dtype=torch.float64), torch.randint(0, 4, (16,))
        for model, optimizer in pairs:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert (net[3].weight - start).abs().max() > 1e-3
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for layer, mirror in zip(net, twin, strict=True):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            P = pairs[0][1].inverse_autocorrelation(layer)
            torch.testing.assert_close(
                P, pairs[1][1].state[mirror.weight]["P"], rtol=1e-10, atol=1e-12
            )
