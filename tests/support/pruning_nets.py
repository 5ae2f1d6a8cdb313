"""Small fully connected networks that the tests of the pruner share."""

import torch
from torch import nn

from rlscuda import RLSOptimizer


def mlp(*sizes, dtype=torch.float64):
    torch.manual_seed(0)
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def rows(count=64, features=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64)


def trained(*sizes, **options):
    model = mlp(*sizes)
    optimizer = RLSOptimizer(model, **options)
    for seed in range(5):
        optimizer.zero_grad()
        model(rows(seed=seed, features=sizes[0])).square().mean().backward()
        optimizer.step()
    return model, optimizer


def widths(model):
    return [m.out_features for m in model if isinstance(m, nn.Linear)]
