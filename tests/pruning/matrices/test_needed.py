"""Only the layers that a coupling with a target feeds are calibrated; what takes much is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from rlscuda.pruning import RLSPruner
from rlscuda.pruning.matrices import needed


def classifier():
    """In the manner of VGG."""
    return nn.ModuleDict({
        "features": nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()),
        "classifier": nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(),
            nn.Linear(10, 3),
        ),
    })  # fmt: skip


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = classifier()

    def forward(self, x):
        return self.parts["classifier"](self.parts["features"](x))


@pytest.fixture
def calibrated(monkeypatch):
    """The names of the layers that were calibrated."""
    names: list[str] = []

    def spy(sums, damping):
        names.extend(sums)
        return inverses(sums, damping)

    inverses = needed.inverses
    monkeypatch.setattr(needed, "inverses", spy)
    return names


x = torch.randn(40, 3, 6, 6)


@pytest.mark.parametrize("options", [
    {"ratio": 0.5, "ignored": ["parts.features"]},
    {"ratio": {"parts.classifier.*": 0.5}},
    {"ratio": {"parts.classifier.*": 0.5}, "importance": "l2"},
    {"ratio": {"parts.features.*": 0.0, "*": 0.5}},
    {"target_params": 0.7, "ignored": ["parts.features"]},
])  # fmt: skip
def test_only_what_a_target_feeds_is_calibrated(options, calibrated):
    model = Model()
    report = RLSPruner(model, None, x[:2], loader=[x], **options).step()
    assert calibrated == ["parts.classifier.3", "parts.classifier.5"]
    assert not report.refused and not report.uncompensated
    assert model.parts["features"][2].out_channels == 4
    assert model.parts["classifier"][1].out_features < 12
    if "target_params" not in options:
        assert model.parts["classifier"][3].out_features == 5


def test_everything_is_calibrated_where_everything_may_go(calibrated):
    RLSPruner(Model(), None, x[:2], loader=[x], target_params=0.8).step()
    assert len(calibrated) == 4


def test_ratio_of_a_step_counts(calibrated):
    pruner = RLSPruner(Model(), None, x[:2], loader=[x], ratio=0.5)
    pruner.step({"parts.features.0": 0.5})
    assert calibrated == ["parts.features.2"]


def test_gigabytes_are_announced(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RLSPruner(Model(), None, x[:2], loader=[x], ratio=0.5).step()
    monkeypatch.setattr(needed, "_ANNOUNCED", 2e4)
    with pytest.warns(UserWarning, match=r"'parts.features.2' 0.0 GB: .* `ignored`") as caught:
        RLSPruner(Model(), None, x[:2], loader=[x], ratio=0.5).step()
    assert caught[0].filename == __file__
