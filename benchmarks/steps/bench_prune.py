"""`RLSPruner.step()` on VGG-16: 70 % of all channels, n up to 4608, by the optimizer's matrices.

The yardstick is the work of one symmetric factorisation of each matrix, n^3 / 3 multiply-adds, done
as a float64 matrix product. Copying model and optimizer, which a step of its own would not need, is
part of our time. What the values are does not matter to the time; the forms do: the adaptive one's
matrices have to be turned back first.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks.common import harness
from benchmarks.steps import networks
from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner

RATIO = 0.7
MOST_SECONDS, MOST_MEMORY = 60, 3  # to reach on two cores; memory as a multiple of all P


class Step:
    """Prunes a fresh copy at each call; notes how far the memory grew, relative to all P."""

    def __init__(self, form):
        torch.manual_seed(0)
        self.model = networks.vgg16()
        self.optimizer = RLSOptimizer(self.model, form=form)
        self.x = torch.randn(8, 3, 32, 32)
        F.cross_entropy(self.model(self.x), torch.randint(10, (8,))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.matrices = [s["P"] for s in self.optimizer.state.values() if "P" in s]
        self.memory: list[float] = []

    def __call__(self):
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        pruner = RLSPruner(model, optimizer, self.x[:1], ratio=RATIO)
        grown = harness.growth(lambda: self.check(pruner.step(), model))
        if grown is not None:
            self.memory.append(grown / sum(P.numel() * P.element_size() for P in self.matrices))

    def check(self, report, model):
        """That every layer was cut, and the network still runs."""
        assert len(report.couplings) == 13 and not report.uncompensated
        for change in report.couplings:
            assert change.after == change.before - int(RATIO * change.before)
        assert model(self.x).shape == (8, 10)


@pytest.mark.parametrize("form", ["paper", "adaptive"])
def test_prune(race, form):
    step = Step(form)
    n = round((sum(len(P) ** 3 for P in step.matrices) / 3) ** (1 / 3))
    a, out = torch.randn(n, n, dtype=torch.float64), torch.empty(n, n, dtype=torch.float64)
    race(
        f"VGG-16, {form} form",
        {"RLSPruner.step": step, "n³/3 in GEMM": lambda: torch.mm(a, a, out=out)},
        rounds=1,
        facts={"peak memory / all P": step.memory, "targets": [MOST_SECONDS, MOST_MEMORY]},
    )
