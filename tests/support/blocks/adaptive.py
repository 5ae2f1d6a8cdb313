"""A small training run that an `AdaptivePruner` follows."""

from functools import partial

import torch
import torch.nn.functional as F

from rlscuda import RLSOptimizer
from rlscuda.pruning import AdaptivePruner
from support.blocks import resnet

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(96, 3, 8, 8, generator=GENERATOR)
Y = (X.mean((1, 2, 3)) > 0).long() + 2 * (X[:, 0].mean((1, 2)) > 0).long()
LOADER = list(X.split(32))
OPTIMIZERS = {
    "rls": lambda model: RLSOptimizer(model, seed=1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 3e-3),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-3),
}


SMALL = partial(resnet, blocks=1)


def started(make=SMALL, optimizer="rls", x=X, **options):
    """A model, its optimizer, and a pruner that measures often enough for eight steps an epoch."""
    torch.manual_seed(0)
    model = make()
    trained_by = OPTIMIZERS[optimizer](model)
    options = {"loader": list(x.split(32)), "every": 2, "patience": 4, "epochs": 3} | options
    return model, trained_by, AdaptivePruner(model, trained_by, x[:2], **options)


def steps(model, optimizer, pruner, count=8, x=X, y=Y, seed=0):
    """Trains for some steps; the batches depend on nothing but the seed."""
    model.train()
    order = torch.Generator().manual_seed(seed)
    for _ in range(count):
        rows = torch.randint(len(x), (24,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        pruner.after_backward()
        optimizer.step()
        pruner.after_step()


def epochs(model, optimizer, pruner, count, x=X, y=Y, first=0):
    """Trains for some epochs and gives what became of each."""
    found = []
    for number in range(count):
        steps(model, optimizer, pruner, x=x, y=y, seed=first + number)
        found.append(pruner.after_epoch())
    return found


def mlp(hidden=16):
    """Two hidden layers of which a unit saves as much in either; no norms."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden),
        torch.nn.ReLU(), torch.nn.Linear(hidden, 6),
    )  # fmt: skip


ROWS = torch.randn(96, 6, generator=GENERATOR)
LABELS = (ROWS[:, 0] > 0).long() + 2 * (ROWS[:, 1] + ROWS[:, 2] > 0).long()
