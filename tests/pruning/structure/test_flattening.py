"""Channels are followed through a transposition and a flattening, as channels-last models have."""

import pytest
import torch
from torch import nn

from rlscuda.pruning import RLSPruner
from rlscuda.pruning.structure.trace import trace

FLATTENED = {
    "nchw": lambda x: x.flatten(1),
    "nhwc": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "nwhc": lambda x: x.permute(0, 3, 2, 1).contiguous().view(x.shape[0], -1),
    "nhcw": lambda x: x.transpose(1, 2).flatten(1),
    "two transpositions": lambda x: x.transpose(1, 2).transpose(-1, 2).reshape(len(x), -1),
    "there and back": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3).flatten(1),
    "moved": lambda x: x.movedim(1, -1).flatten(1),
}
every_order = pytest.mark.parametrize("flatten", FLATTENED.values(), ids=FLATTENED)


class Flattened(nn.Module):
    """A convolution whose channels are flattened in some order."""

    def __init__(self, flatten, channels, size):
        super().__init__()
        self.conv, self.prelu = nn.Conv2d(3, channels, 1), nn.PReLU(channels)
        self.flatten = flatten
        self.hidden = nn.Linear(channels * size[0] * size[1], 8)
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 4)])

    def forward(self, x):
        x = self.hidden(self.flatten(self.prelu(self.conv(x))))
        return [head(x) for head in self.heads]


@every_order
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels, size", [(6, (3, 4)), (4, (4, 4)), (5, (1, 3)), (3, (2, 1))])
def test_each_channel_has_its_features(flatten, batch, channels, size):
    structure = trace(Flattened(flatten, channels, size), torch.randn(batch, 3, *size))
    numbers = torch.arange(channels)[None, :, None, None].expand(1, -1, *size)
    features = flatten(numbers)[0]
    expected = [(features == c).nonzero().flatten().tolist() for c in range(channels)]
    assert structure.refused == {}
    assert structure.coupling("conv").member("hidden", "in").indices.tolist() == expected
    assert structure.coupling("conv").units == channels


@every_order
def test_copies_of_channels_go_without_a_loss(flatten):
    model = Flattened(flatten, 10, (3, 4))
    with torch.no_grad():
        for tensor in (model.conv.weight, model.conv.bias, model.prelu.weight):
            tensor[5:] = tensor[:5]
    x = torch.randn(300, 3, 3, 4)
    before = model(x)
    pruner = RLSPruner(model, None, x[:1], ratio={"conv": 0.5}, loader=[x], damping=1e-7)
    report = pruner.step()
    assert model.hidden.in_features == 60 and report.uncompensated == {}
    for now, then in zip(model(x), before):
        torch.testing.assert_close(now, then, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(3, 4), (6, 6)])
def test_an_operation_in_between_is_followed(size):
    """Even where rows, columns and channels are as many, so that they could be mistaken."""
    model = Flattened(lambda x: x.permute(0, 2, 3, 1).relu().flatten(1), 6, size)
    structure = trace(model, torch.randn(2, 3, *size))
    expected = [list(range(c, 6 * size[0] * size[1], 6)) for c in range(6)]
    assert structure.coupling("conv").member("hidden", "in").indices.tolist() == expected
    assert structure.refused == {}
