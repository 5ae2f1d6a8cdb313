"""What the probe of the couplings finds: norms of a fixed width, groups, heads for training."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from support.pruning_surgery import every_other, operate
from torch import Tensor, nn

from rlscuda.pruning import RLSPruner
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Between(nn.Module):
    """Two layers and a function of what the first puts out."""

    def __init__(self, first: nn.Module, function, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def between_linear(function) -> nn.Module:
    return Between(nn.Linear(4, 8), function, nn.Linear(8, 3))


def between_convolutions(function, groups: int = 1) -> nn.Module:
    first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=groups))
    return Between(first, function, nn.Conv2d(8, 2, 1))


def test_rms_norm_is_cut():
    norm = nn.RMSNorm(8)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8.0))
    model = between_linear(norm)
    structure = trace(model, torch.randn(2, 4))
    operate(model, [], plan(structure, {"first": [0, 3]}), {}, torch.randn(2, 4))
    assert norm.weight.tolist() == [1, 2, 4, 5, 6, 7] and norm.normalized_shape == (6,)
    assert structure.refused == {}


def test_rms_norms_that_share_their_weight_are_cut():
    norms = nn.Sequential(nn.RMSNorm(8), nn.ReLU(), nn.RMSNorm(8))
    norms[2].weight = norms[0].weight
    model, x = between_linear(norms), torch.randn(2, 4)
    structure = trace(model, x)
    operate(model, [], plan(structure, every_other(structure)), {}, x)
    assert norms[0].weight is norms[2].weight
    assert norms[0].normalized_shape == norms[2].normalized_shape == (4,)


@pytest.mark.parametrize(
    "norm",
    [lambda x: F.layer_norm(x, (8,)), lambda x: F.rms_norm(x, (8,))],
)  # fmt: skip
def test_norms_of_a_fixed_width_are_refused(norm):
    x = torch.randn(32, 4)
    report = RLSPruner(between_linear(norm), None, x[:2], ratio=0.5, loader=[x]).step()
    assert report.couplings == [] and "normalized_shape=[8]" in report.refused["first"]


def test_norms_of_any_width_are_not_refused():
    for norm in (lambda x: F.layer_norm(x, x.shape[1:]), lambda x: F.rms_norm(x, x.shape[1:]),
                 nn.LayerNorm(8, elementwise_affine=False),
                 nn.RMSNorm(8, elementwise_affine=False)):  # fmt: skip
        structure = trace(between_linear(norm), torch.randn(2, 4))
        assert structure.coupling("first").units == 8 and structure.refused == {}


def test_a_group_norm_that_is_a_function_is_cut():
    structure = trace(between_convolutions(lambda x: F.group_norm(x, 4)), IMAGES)
    assert structure.refused == {} and structure.coupling("first.1").units == 2
    structure = trace(between_convolutions(lambda x: F.group_norm(x, 1)), IMAGES)
    assert structure.refused == {} and structure.coupling("first.1").units == 8


def test_units_across_the_groups_of_a_norm():
    model = between_convolutions(lambda x: F.group_norm(x, 2), groups=2)
    structure = trace(model, IMAGES)
    assert structure.refused == {} and structure.coupling("first.1").units == 4


def test_units_stay_in_their_group():
    """Each gives two features, of which the norm takes any even number."""
    first = nn.Sequential(nn.Conv2d(3, 4, (8, 7)), nn.Flatten())
    model = Between(first, lambda x: F.group_norm(x, 2), nn.Linear(8, 2))
    coupling = trace(model, IMAGES).coupling("first.0")
    assert coupling.member("first.0", "out").indices.tolist() == [[0, 2], [1, 3]]


class Auxiliary(nn.Module):
    """Puts out more in training mode; there a batch norm wants more than one value a channel."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 3, 1)
        self.head = head

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.first(x))
        y = self.third(F.relu(self.second(x)))
        return (y, self.head(x)) if self.training else y


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize(
    ("head", "reason"),
    [(nn.Conv2d(8, 2, 1), r"fails in training mode: .*\(structure/test_soundness.py:\d+\)"),
     (nn.Dropout(0.5), "puts out its channels in training mode")],
)  # fmt: skip
def test_what_feeds_a_head_for_training_is_refused(head, reason, size, mode):
    torch.manual_seed(0)
    model = Auxiliary(head).train(mode)
    random = torch.get_rng_state()
    report = RLSPruner(model, None, IMAGES[:size], ratio=0.5, loader=[IMAGES]).step()
    assert torch.equal(torch.get_rng_state(), random)
    unreached = ["head"] if list(head.parameters()) else []  # where it is not called
    assert list(report.refused) == ["first", *unreached]
    assert re.search(reason, report.refused["first"])
    assert model.second.out_channels == 3 and model.training == mode
    model.train()(IMAGES)


def test_a_model_that_needs_more_for_training_is_pruned():
    class Wanting(Auxiliary):
        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            y = self.third(F.relu(self.second(self.norm(self.first(x)))))
            return (y - target).square().mean() if self.training else y

    model = Wanting(nn.Identity())
    report = RLSPruner(model, None, IMAGES, ratio=0.5, importance="l1", compensate=False).step()
    assert report.refused == {} and model.first.out_channels == 4


def test_the_surgery_fails_where_training_would():
    model = Auxiliary(nn.Identity())
    structure = trace(model, IMAGES)
    surgery = plan(structure, every_other(structure))
    assert "second" in {coupling.name for coupling in structure.couplings}
    model.head = nn.Sequential(model.second, nn.Conv2d(6, 2, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="fails in training mode on the example inputs: .*input"):
        operate(model, [], surgery, {}, IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class AlikeInWidth(nn.Module):
    """Two layers of which one is written over zeros in the shape of the other's output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.heads = nn.ModuleList(nn.Linear(6, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.first(x), self.second(x)
        both = torch.zeros_like(x)
        both += y
        return self.heads[0](F.relu(x).mean((2, 3))) + self.heads[1](F.relu(both).mean((2, 3)))


def test_layers_that_must_lose_as_many_channels_as_each_other_are_coupled():
    structure = trace(AlikeInWidth(), IMAGES)
    [coupling] = structure.couplings
    assert structure.refused == {} and coupling.units == 6
    assert {("first", "out"), ("second", "out")} <= {(m.name, m.kind) for m in coupling.members}
