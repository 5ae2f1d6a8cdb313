"""Which branches get a gate, and what is refused."""

import pytest
import torch
from support.blocks import IMAGES, resnet
from torch import nn

from rlscuda.pruning import LayerGates


def test_one_branch_in_another_has_no_gate_of_its_own():
    class Nest(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.outer(x + self.inner(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.nest, self.head = Nest(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x + self.nest(x))

    x = torch.randn(4, 6)
    gates = LayerGates(Model(), x, total_steps=10)
    assert [gate.name for gate in gates.report().gates] == ["nest"]


def refusals():
    yield {"total_steps": 0}, "total_steps must be an integer >= 1"
    yield {"price": 0}, "price must be above 0"
    yield {"price": -1}, "price must be a finite number"
    yield {"by": "euros"}, "by must be equal | params | flops"
    yield {"initial": 0}, "initial must be a share in"
    yield {"warmup": 1.0}, "warmup must be a share in"
    yield {"horizon": 0}, "horizon must be a share in"
    yield {"probes": 0}, "probes must be an integer >= 1"
    yield {"patience": 0}, "patience must be an integer >= 1"
    yield {"names": "stem*"}, "no branch of the model can have a gate"
    yield {"tolerance": 2}, "tolerance must be a share"


@pytest.mark.parametrize(("options", "message"), list(refusals()))
def test_a_refusal_leaves_no_gate(options, message):
    torch.manual_seed(0)
    model = resnet()
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        LayerGates(model, IMAGES, **({"total_steps": 10} | options))
    assert all(module._compiled_call_impl is None for module in model.modules())
