"""Many small layers, whose step is hooks, Python and calls of operators: what they cost a layer."""

import torch
from torch import nn

from benchmarks.common import shapes
from benchmarks.steps.turns import in_turns
from rlscuda import RLSOptimizer

LAYERS, WIDTH, BATCH = 50, 8, 8
PLAIN = "forward and backward"
OPTIMIZERS = {
    PLAIN: lambda model: None,
    shapes.BASELINE: lambda model: torch.optim.Adam(model.parameters(), lr=1e-3, fused=True),
    **{
        f"RLS {form}": lambda model, form=form: RLSOptimizer(model, lr=1e-3, form=form)
        for form in ("spectral", "adaptive", "paper", "natural")
    },
}


class Trainer:
    """A network with its optimizer and one minibatch; calling it makes one step."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        self.x, self.optimizer = torch.randn(BATCH, WIDTH), make(self.model)

    def __call__(self):
        self.model.zero_grad()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()


def test_small_layers(race):
    trainers = {name: Trainer(make) for name, make in OPTIMIZERS.items()}
    lanes, work = in_turns(trainers)
    race(
        f"{LAYERS} Linear layers of {WIDTH} × {WIDTH}, batch {BATCH}",
        lanes,
        ratios=[f"{name} / {PLAIN}" for name in OPTIMIZERS if name != PLAIN],
        facts={"layers": LAYERS},
        rounds=20,
        sample_seconds=0.1,
        work=work,
    )
    for name, train in trainers.items():
        before = Trainer(OPTIMIZERS[PLAIN]).model[-1].weight
        assert torch.equal(train.model[-1].weight, before) == (name == PLAIN), name
        assert all(p.isfinite().all() for p in train.model.parameters()), name
