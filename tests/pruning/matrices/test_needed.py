"""Only the layers that a coupling with a target feeds are calibrated; what takes much is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from rlscuda.closed_form.few_rows import FewRows
from rlscuda.pruning import RLSPruner
from rlscuda.pruning.matrices import calibration, needed


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
    with pytest.warns(UserWarning, match="'parts.features.2' 0.0 GB: less") as caught:
        RLSPruner(Model(), None, x[:2], loader=[x], ratio=0.5).step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("damping", [1e-3, 0.0])
@pytest.mark.parametrize("selection", ["greedy", "one-shot"])
def test_few_rows_of_a_wide_layer_prune_as_their_matrix(selection, damping, monkeypatch):
    """20 rows of 193 columns, in blocks of 16 a channel, and of 40; and a convolution's many."""

    def pruned(wide):
        monkeypatch.setattr(calibration, "_WIDE", wide)
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 60), nn.ReLU(),
            nn.Linear(60, 3),
        ).double()  # fmt: skip
        data = torch.randn(20, 3, 6, 6).double()
        few.clear()
        loader = [data[:7], data[7:]]
        options = {"ratio": 0.5, "selection": selection, "damping": damping}
        report = RLSPruner(model, None, data[:1], loader=loader, **options).step()
        return report, model(data)

    def spy(sums, damping):
        found = inverses(sums, damping)
        few.extend(name for name, P in found.items() if isinstance(P, FewRows))
        return found

    few: list[str] = []
    inverses = needed.inverses
    monkeypatch.setattr(needed, "inverses", spy)
    expected, whole = pruned(4096)
    assert not few
    report, output = pruned(10)
    assert few == (["3", "5"] if damping else [])
    assert not report.uncompensated
    if damping:
        torch.testing.assert_close(output, whole, rtol=1e-6, atol=1e-9)
    for one, other in zip(report.couplings, expected.couplings):
        assert one.removed == other.removed
        assert one.cost == pytest.approx(other.cost, rel=1e-5, abs=1e-12)


def test_many_rows_of_a_wide_layer_are_summed(monkeypatch):
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double(), torch.randn(30, 6).double()
    expected = calibration.calibrate(model, [x])
    monkeypatch.setattr(calibration, "_WIDE", 1)
    for loader in ([x], [x[:2], x[2:20], x[20:]]):
        found = needed.calibrate_some(model, loader, {"0", "1"}, 1e-3, few=True)
        for name, P in found.items():
            torch.testing.assert_close(P, expected[name], rtol=1e-10, atol=1e-10)
    few = needed.calibrate_some(model, [x[:3]], {"0"}, 1e-3, few=True)["0"]
    dense = calibration.calibrate(model, [x[:3]], layers=["0"])["0"]
    rows = few.rows[0]
    whole = torch.linalg.inv(rows.mT @ rows + few.damping * torch.eye(7))
    torch.testing.assert_close(whole, dense[0], rtol=1e-8, atol=1e-8)
    silent = needed.calibrate_some(model, [0 * x[:3]], {"0"}, 1e-3, few=True)["0"]
    assert silent.damping > 0
    with pytest.raises(ValueError, match="saw NaN or infinite input"):
        needed.calibrate_some(model, [x[:3] / 0], {"0"}, 1e-3, few=True)
