"""The flattening hyper-prior, by which the penalty on a gate's probability is linear."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from rlscuda.pruning import LayerGates


def density(pi, gamma):
    """p(pi | gamma) of the probability that a gate is open a priori."""
    return (gamma - 1) / math.log(gamma) / (1 + (gamma - 1) * (1 - pi))


def divergence(theta, pi, gamma):
    """KL(Bernoulli(theta) | Bernoulli(pi)) - ln p(pi | gamma)."""
    parts = [p * math.log(p / q) for p, q in ((theta, pi), (1 - theta, 1 - pi)) if p]
    return sum(parts) - math.log(density(pi, gamma))


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 0.7, 3.0])
def test_the_prior_integrates_to_one(gamma):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    inner = density((nodes + 1) / 2, gamma)
    assert float((weights * inner).sum() / 2) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 0.7])
def test_the_penalty_is_linear(gamma):
    offset = None
    for theta in np.random.default_rng(0).uniform(0.01, 0.99, 8):
        best = gamma * theta / (1 + (gamma - 1) * theta)
        value = divergence(theta, best, gamma)
        for other in np.linspace(1e-6, 1 - 1e-6, 997):
            assert divergence(theta, other, gamma) >= value - 1e-12
        rest = value - (1 - theta) * math.log(gamma)
        offset = rest if offset is None else offset
        assert rest == pytest.approx(offset, abs=1e-9)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


def test_gates_descend_it():
    """A step without a difference is the rate times the slope of the divergence, at a price."""
    price, theta, wide = 0.05, 0.6, 1e-4
    gamma = math.exp(-price)
    ends = [
        divergence(t, gamma * t / (1 + (gamma - 1) * t), gamma)
        for t in (theta - wide, theta + wide)
    ]
    gates = LayerGates(
        nn.Sequential(nn.Linear(3, 4), Residual(), nn.Linear(4, 2)), torch.randn(2, 3),
        total_steps=1000, price=price, initial=0.9, warmup=0, ramp=0, horizon=0.5,
    )  # fmt: skip
    (gate,) = gates._alive
    gate.theta = theta
    gates._learn({gate: 0.0})
    rate = 0.9 / (price * 500)  # from initial to 0 in the horizon where a branch is worth nothing
    assert theta - gate.theta == pytest.approx(rate * (ends[1] - ends[0]) / (2 * wide), rel=1e-6)
