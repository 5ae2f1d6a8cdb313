"""Convolutions with forwards of their own: what is not proven on the real input has no matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlscuda.pruning.matrices.calibration import calibrate, pruning_layers


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class Louder(nn.Conv2d):
    def forward(self, x):
        return super().forward(2 * x)


class Dynamic(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * x.abs().mean(), self.bias)


class Strided(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, 2)


class Unbiased(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


class InTraining(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * (1 + self.training), self.bias)


class Listed(nn.Conv2d):
    def forward(self, both=None):
        return super().forward(both[0] if isinstance(both, list) else both)


class Failing(nn.Conv2d):
    def forward(self, x):
        raise KeyError("scale")


REASONS = {
    Twice: "its output is not that of one convolution",
    Dynamic: "the weight of its convolution is another for other inputs",
    Strided: "another stride, dilation or number of groups",
    Unbiased: "another bias or shape of the weight",
    InTraining: "the weight of its convolution is another in training mode",
    Failing: "its forward raises KeyError: 'scale'",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_is_not_proven_has_no_matrix(kind):
    model = nn.Sequential(kind(2, 3, 2), nn.Flatten(), nn.Linear(27, 2))
    x = torch.randn(5, 2, 4, 4)
    if kind is Strided:
        model[2] = nn.Linear(12, 2)
    if kind is not Failing:
        assert set(calibrate(model, [x])) == {"2"}
    with pytest.raises(ValueError, match=REASONS[kind]):
        calibrate(model, [x], layers=["0"])


def test_inputs_of_any_kind_and_name():
    class Model(nn.Module):
        def __init__(self, listed):
            super().__init__()
            self.first, self.last, self.listed = Listed(2, 3, 2), nn.Conv2d(3, 2, 1), listed

        def forward(self, x):
            return self.last(self.first(both=[x] if self.listed else x))

    x = torch.randn(5, 2, 4, 4)
    assert set(calibrate(Model(True), [x])) == {"last"}
    assert set(calibrate(Model(False), [x])) == {"first", "last"}
    with pytest.raises(ValueError, match="'first': Listed has a .*, and its input is a list"):
        calibrate(Model(True), [x], layers=["first"])


def test_the_proof_leaves_no_trace():
    class Stateful(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return F.conv2d(x, self.weight, self.bias)

    model, x = nn.Sequential(Stateful(2, 3, 2), nn.Conv2d(3, 2, 1)), torch.randn(5, 2, 4, 4)
    assert set(calibrate(model, [x, x])) == {"0", "1"}
    assert model[0].seen == 2 and model[0].training


def test_input_that_is_changed_is_not_proven_by_zeros():
    """An input of zeros tells nothing of a factor: the real one does."""
    model, x = nn.Sequential(Louder(2, 3, 2)), torch.randn(5, 2, 4, 4)
    assert [layer.name for layer in pruning_layers(model, None, others=True)] == ["0"]
    with pytest.raises(ValueError, match="is not its own with zeros around it"):
        calibrate(model, [x])
