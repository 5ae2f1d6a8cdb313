"""What removal is measured by: the default loss, and what becomes of losses that are none."""

import pytest
import torch
from support.blocks import resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rlscuda.pruning import remove_blocks
from rlscuda.pruning.blocks.stand_ins import StandIn
from rlscuda.pruning.running.distortion import Distortion

SAMPLES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(7))


class Wrapped(nn.Module):
    """Puts out what a function makes of the networks' outputs."""

    def __init__(self, change, count=1):
        super().__init__()
        self.nets = nn.ModuleList(resnet(blocks=1) for _ in range(count))
        self.change = change

    def forward(self, x):
        return self.change(*(net(x) for net in self.nets))


def test_it_is_the_squared_difference_over_the_variance():
    torch.manual_seed(0)
    whole, other = resnet().eval(), resnet().eval()
    with torch.no_grad():
        wanted, got = whole(SAMPLES).double(), other(SAMPLES).double()
    expected = (got - wanted).square().sum(1).mean() / wanted.var(0, correction=0).sum()
    assert Distortion(whole, SAMPLES.split(5))(other) == pytest.approx(float(expected), rel=1e-6)
    assert Distortion(whole, [SAMPLES[:1]])(whole) == 0


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_loader_may_shuffle(generator):
    torch.manual_seed(0)
    whole, other = resnet(), resnet()
    data = TensorDataset(SAMPLES)
    shuffled = Distortion(whole, DataLoader(data, 8, shuffle=True, generator=generator))
    torch.rand(1)  # as whatever ran in between does
    assert shuffled(whole) == 0
    assert shuffled(other) == pytest.approx(Distortion(whole, DataLoader(data, 8))(other), rel=1e-6)


def test_every_output_counts():
    torch.manual_seed(0)
    model = Wrapped(lambda one, other: {"one": one, "other": other, "class": one.argmax(1)}, 2)
    report = remove_blocks(model, SAMPLES[:2], [SAMPLES], count=2, ways=("delete",))
    assert all(change.cost > 1e-6 for change in report.changes)


def test_a_scalar_is_an_output():
    torch.manual_seed(0)
    model = Wrapped(lambda y: (y.square().mean(), y))
    report = remove_blocks(model, SAMPLES[:2], SAMPLES.split(8), count=1, ways=("delete",))
    assert report.changes[0].cost > 0


def test_what_cannot_be_compared_is_refused():
    pixels = Wrapped(lambda y: y)
    pixels.nets[0] = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match="one size, got 256 and 64 values a sample"):
        Distortion(pixels, [SAMPLES, SAMPLES[..., :4, :4]])(pixels)
    with pytest.raises(ValueError, match="at least one batch"):
        remove_blocks(resnet(), SAMPLES[:2], [], count=1, ways=("delete",))
    with pytest.raises(ValueError, match="must put out a tensor"):
        Distortion(Wrapped(lambda y: None), [SAMPLES])(Wrapped(lambda y: None))


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -float("inf")])
def test_what_breaks_the_model_does_not_go(worst):
    torch.manual_seed(0)
    model = resnet()

    def evaluate(trial):
        return worst if isinstance(trial.block12.bn2, StandIn) else 1.0

    report = remove_blocks(model, SAMPLES[:2], [SAMPLES], count=3, evaluate=evaluate)
    assert report.kept == ["block12"]
    with pytest.raises(ValueError, match="out of reach"):
        remove_blocks(model, SAMPLES[:2], [SAMPLES], count=1, evaluate=evaluate)
