"""Training steps on a GPU as multiples of fused Adam's, over whole intervals; TF32 is on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import shapes
from benchmarks.steps import networks
from benchmarks.steps.turns import in_turns
from rlscuda import RLSOptimizer, zoo

LR, BATCH = 1e-3, 128
NETWORKS = {
    "ResNet-18, 32 × 32, batch 128": networks.resnet18,
    "VGG-16, 32 × 32, batch 128": lambda: zoo.vgg16(networks.IMAGES, 10),
}
OPTIMIZERS = {
    "RLS spectral": lambda m: RLSOptimizer(m, lr=LR),
    "RLS adaptive": lambda m: RLSOptimizer(m, lr=LR, form="adaptive"),
    "RLS paper, mean": lambda m: RLSOptimizer(m, lr=LR, form="paper"),
    shapes.BASELINE: lambda m: torch.optim.Adam(m.parameters(), lr=LR, fused=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=LR, momentum=0.9),
}


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
    trainers = {key: Trainer(NETWORKS[name], make) for key, make in OPTIMIZERS.items()}
    lanes, work = in_turns(trainers)
    race(
        name,
        lanes,
        targets={f"RLS {f} / {shapes.BASELINE}": 1.25 for f in ("spectral", "adaptive")},
        ratios=[f"{key} / {shapes.BASELINE}" for key in OPTIMIZERS if key != shapes.BASELINE],
        rounds=15,
        sample_seconds=0.05,
        work=work,
    )
    for key, train in trainers.items():
        assert all(p.isfinite().all() for p in train.model.parameters()), key
