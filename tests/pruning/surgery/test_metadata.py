"""Widths that a model keeps beside its layers are named where they do not follow."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from support.libraries.importing import importable
from torch import nn

from rlscuda.pruning import RLSPruner
from rlscuda.pruning.report import PruneReport

with importable():
    import timm
    from transformers import BertConfig, BertForSequenceClassification

PLAIN = {"ratio": 0.5, "importance": "l2", "compensate": False}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.hidden_dim = config, 12
        self.rows = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.rows.out_channels = 12  # as torchvision's blocks say

    def forward(self, x):
        return self.rows(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(intermediate_size=12, hidden_size=6, layers=12)
        self.first, self.second, self.head = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, 4)
        self.num_features, self.patch_size, self.in_features, self.other_width = 6, 12, 4, 7
        self.block = Block(self.config)

    def forward(self, x):
        x = self.second(self.first(x).relu())
        return self.head(x + self.block(x))


def test_numbers_that_give_the_width_from_before():
    report = RLSPruner(Net(), None, torch.randn(2, 4), **PLAIN).step()
    # of 12 and of 6 units there are none any more but those that 12 has left
    assert report.outdated == {
        "config.intermediate_size": "12, now 6", "block.hidden_dim": "12, now 6"
    }  # fmt: skip
    assert "give a width from before: hidden_dim, intermediate_size, see outdated" in str(report)
    assert PruneReport.from_dict(report.to_dict()) == report


def test_layers_follow_by_themselves_and_what_stays_is_right():
    model = Net()
    report = RLSPruner(
        model, None, torch.randn(2, 4), ignored=["first", "block.rows.0"], **PLAIN
    ).step()
    assert model.head.in_features == 3
    assert report.outdated == {"config.hidden_size": "6, now 3", "num_features": "6, now 3"}


def test_a_report_from_before_has_none():
    report = RLSPruner(Net(), None, torch.randn(2, 4), **PLAIN).step().to_dict()
    del report["outdated"]
    assert PruneReport.from_dict(report).outdated == {}


def test_timm_and_transformers():
    model = timm.create_model("resnet18", num_classes=5).eval()
    report = RLSPruner(model, None, torch.randn(2, 3, 32, 32), **PLAIN).step()
    assert report.outdated == dict.fromkeys(("num_features", "head_hidden_size"), "512, now 256")
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=20)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    report = RLSPruner(model, None, torch.randint(0, 9, (2, 5)), **PLAIN).step()
    assert report.outdated["config.intermediate_size"] == "20, now 10"
