"""One whole training step: zero_grad, forward, backward, step; as a multiple of fused Adam's.

Images and labels are random: the time does not depend on them. `eager` is `eager_rls.EagerRLS`,
the same rules in plain PyTorch; `singd` is structured inverse-free natural gradient descent
with its dense structures, refreshed at every step. The spectral and the adaptive form are timed
over whole intervals, after the steps in which each has an update of `P`; eager RLS has one in each.
Rates are small, so that a model trained on noise for hundreds of steps stays finite. Of the
networks of the quality suite, peers are left out.
"""

import pytest
import torch
import torch.nn.functional as F
from singd.optim.optimizer import SINGD
from torch import nn

from benchmarks.common import shapes
from benchmarks.common.eager_rls import EagerRLS
from benchmarks.learning.sources import CODES, WINDOW
from benchmarks.learning.tasks import TASKS
from benchmarks.steps.turns import in_turns
from rlscuda import RLSOptimizer, zoo

LR = 1e-3
OPTIMIZERS = {
    "RLS paper, mean": lambda m: RLSOptimizer(m, lr=LR, form="paper"),
    "RLS paper, sketch": lambda m: RLSOptimizer(m, lr=LR, form="paper", summary="sketch"),
    "RLS adaptive": lambda m: RLSOptimizer(m, lr=LR, form="adaptive"),
    "RLS spectral": lambda m: RLSOptimizer(m, lr=LR),
    shapes.BASELINE: lambda m: torch.optim.Adam(m.parameters(), lr=LR, fused=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9),
    "eager RLS paper, mean": lambda m: EagerRLS(m, form="paper", lr=LR),
    "eager RLS adaptive": lambda m: EagerRLS(m, lr=LR),
    "singd": lambda m: SINGD(m, lr=LR, T=1, warn_unsupported=False),
}
EAGER = ("eager RLS paper, mean", "eager RLS adaptive")
TORCH = (shapes.BASELINE, "SGD")
SUITE = {  # task of the quality suite: (target over fused Adam, rounds)
    "autoencoder": (1.8, 40),
    "gpt": (1.08, 20),
    "vit": (1.08, 20),
}


class Trainer:
    """A model with its optimizer; calling it makes one step."""

    def __init__(self, model: nn.Module, make, loss):
        self.model, self.optimizer, self.loss = model, make(model), loss

    def __call__(self):
        self.optimizer.zero_grad()
        loss = self.loss(self.model)
        loss.backward()
        self.optimizer.step()
        return loss


def classifier(case, make, batch, dtype=torch.float32):
    """That of a case on one minibatch of noise."""
    torch.manual_seed(0)
    model = zoo.NETWORKS[case.model](case.shape, 10).to(dtype)
    x, y = torch.randn(batch, *case.shape, dtype=dtype), torch.randint(10, (batch,))
    return Trainer(model, make, lambda model: F.cross_entropy(model(x), y))


def of_suite(task, make):
    """That of a task of the quality suite, likewise."""
    model = task.build(0)
    if task.name == "gpt":
        x = y = torch.randint(CODES, (task.batch, WINDOW))
    else:
        pixels = (784,) if task.name == "autoencoder" else (3, 32, 32)
        x = torch.rand(task.batch, *pixels)
        y = x if task.name == "autoencoder" else torch.randint(10, (task.batch,))
    return Trainer(model, make, lambda model: task.loss(model, x, y))


def assert_right(case):
    """Paper form, mean: weights as eager RLS moves them, in float64. All forms learn the batch."""
    rule = {"form": "paper", "lr": 0.1, "gain": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    rule |= {"summary": "mean", "rank": 1, "fallback_lr": 1e-3}
    trainers = [
        classifier(case, lambda m, kind=kind: kind(m, **rule), 8, torch.float64)
        for kind in (RLSOptimizer, EagerRLS)
    ]
    for _ in range(3):
        for train in trainers:
            train()
    ours, eager = (dict(train.model.named_parameters()) for train in trainers)
    for name, value in ours.items():
        torch.testing.assert_close(value, eager[name], rtol=1e-7, atol=1e-9, msg=name)
    for options in (
        {"form": "paper", "summary": "sketch", "lr": 0.02},
        {"form": "adaptive", "lr": 0.02},
        {"lr": 0.02},
    ):
        train = classifier(case, lambda m, options=options: RLSOptimizer(m, **options), 8)
        losses = [train().item() for _ in range(8)]
        assert losses[-1] < losses[0], (options, losses)


@pytest.mark.parametrize("case", shapes.TRAININGS, ids=lambda c: c.name)
def test_training_step(race, case):
    assert_right(case)
    trainers = {name: classifier(case, make, case.batch) for name, make in OPTIMIZERS.items()}
    lanes, work = in_turns(trainers)
    targets = {
        f"RLS paper, mean / {shapes.BASELINE}": case.paper_target,
        f"RLS paper, sketch / {shapes.BASELINE}": case.paper_target,
        f"RLS adaptive / {shapes.BASELINE}": case.adaptive_target,
        f"RLS spectral / {shapes.BASELINE}": case.adaptive_target,
    }
    race(
        case.name,
        lanes,
        targets=targets,
        ratios=[f"{name} / {shapes.BASELINE}" for name in OPTIMIZERS if name != shapes.BASELINE],
        rounds=case.rounds,
        every={"singd": max(1, case.rounds // 4), **dict.fromkeys(EAGER, 2)},
        work=work,
    )
    assert_finite(trainers)


@pytest.mark.parametrize("name", SUITE)
def test_step_of_the_quality_suite(race, name):
    task, (target, rounds) = TASKS[name], SUITE[name]
    kept = {lane: make for lane, make in OPTIMIZERS.items() if "RLS" in lane or lane in TORCH}
    trainers = {lane: of_suite(task, make) for lane, make in kept.items() if lane not in EAGER}
    lanes, work = in_turns(trainers)
    names = [lane for lane in lanes if lane != shapes.BASELINE]
    race(
        f"{task.title}, batch {task.batch}",
        lanes,
        targets={f"{lane} / {shapes.BASELINE}": target for lane in names if "RLS" in lane},
        ratios=[f"{lane} / {shapes.BASELINE}" for lane in names],
        rounds=rounds,
        work=work,
    )
    assert_finite(trainers)


def assert_finite(trainers):
    for name, train in trainers.items():
        assert all(p.isfinite().all() for p in train.model.parameters()), name
