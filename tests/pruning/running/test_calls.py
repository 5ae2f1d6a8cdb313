"""Batches of loaders as people have them: fed, or refused with what would do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlscuda.pruning import RLSPruner
from rlscuda.pruning.running.calls import feed

X = torch.randn(4, 3)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x, mask, scale=1.0):
        return self.head(self.hidden(x * mask).relu()) * scale


class Loose(Two):
    """Takes whatever it is given by name."""

    def forward(self, **inputs):
        return super().forward(inputs["x"], inputs["mask"])


class Faulty(nn.Linear):
    def forward(self, input):
        raise TypeError("its own")


@pytest.mark.parametrize("batch", [X, (X, 3), [X, {"y": 1}], {"input": X, "label": 3}, (X, X, X)])
def test_what_can_be_fed(batch):
    model = nn.Linear(3, 2)
    assert torch.equal(feed(model, batch), model(X))


def test_arguments_by_name():
    model, batch = Two(), {"mask": X > 0, "x": X, "label": 3}
    assert torch.equal(feed(model, batch), model(X, X > 0))
    loose = Loose()
    loose.load_state_dict(model.state_dict())
    assert torch.equal(feed(loose, batch), model(X, X > 0))


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (
            {"inputs": {"x": X}, "labels": 3},
            r"\(x, mask, scale\); got a mapping of 'inputs', 'labels'",
        ),
        ([{"x": X}, {"x": X}], r"\(x, mask, scale\); got a list of dict, dict"),
        (((X, X), {"scale": 2.0}), r"\(x, mask, scale\); got a tuple of tuple, dict"),
        (([X, X], [3, 3]), "got a tuple of list, list"),
        (({"x": X, "mask": X}, 3), "got a tuple of dict, int"),
        ((), "got a tuple of "),
        ("x", "got str"),
        ((X, X, 3), "got a tuple of Tensor, Tensor, int; missing a required argument: 'mask'"),
        (
            {"x": X, "label": 3},
            "got a mapping of 'x', 'label'; missing a required argument: 'mask'",
        ),
    ],
)
def test_what_cannot_be_fed_is_said_with_what_can(batch, got):
    model, example = Two(), {"x": X, "mask": X > 0}
    message = "mappings that hold the arguments of the model's forward by name .*" + got
    with pytest.raises(TypeError, match=message):
        feed(model, batch)
    for options in ({"importance": "l2"}, {"source": "calibration"}):
        with pytest.raises(TypeError, match=message):
            RLSPruner(model, None, example, ratio=0.5, loader=[batch], **options).step()
    assert model.hidden.out_features == 8
    good = [{"x": X, "mask": X > 0, "label": 3}]
    RLSPruner(model, None, example, ratio=0.5, loader=good).step()
    assert model.hidden.out_features == 4


def test_a_type_error_of_the_models_own_stays():
    with pytest.raises(TypeError, match="^its own$"):
        feed(Faulty(3, 2), (X, 3))
