"""Recurrent modules are covered by the optimizer and left alone by pruning."""

import pytest
import torch
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, own_matrices
from rlscuda.pruning.matrices.calibration import pruning_layers


class Between(nn.Module):
    """A recurrent module between layers that can be pruned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 6)
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(self.second(self.first(x).relu()))[0])


def test_pruning_leaves_it_as_it_is():
    model = Between()
    assert [layer.name for layer in pruning_layers(model, None)] == ["first", "second", "head"]
    with pytest.raises(ValueError, match="LSTM cannot be pruned"):
        pruning_layers(model, ["rnn"])
    optimizer = RLSOptimizer(model)
    x = torch.randn(5, 6, 4)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert own_matrices(optimizer)["rnn.weight_hh_l0"].shape == (1, 9, 9)
    report = RLSPruner(model, optimizer, x, ratio=0.5).step()
    assert "first" in str(report)
    assert (model.first.out_features, model.second.out_features) == (6, 6)
    assert model.rnn.weight_ih_l0.shape == (32, 6) and model.head.in_features == 8
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert {h.missing for h in optimizer.health().values()} == {0}
