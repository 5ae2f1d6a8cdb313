"""Removed weights: how many, that they stay removed, and what zeroing a filter is."""

import math

import pytest
import torch
from torch import nn

from rlscuda.pruning import RLSPruner, calibrate, ratio_after
from rlscuda.pruning.schedule import CURVES
from rlscuda.studies.weights import kept_by_quantile, weight_copies

SHARES = (0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.95, 0.999, 1)


@pytest.mark.parametrize("n", [1, 2, 7, 40, 1000])
def test_the_quantile_removes_a_count_that_is_known(n):
    scores = torch.randperm(n).double() + 1
    for share in SHARES:
        keep = kept_by_quantile(scores, share)
        assert int((~keep).sum()) == math.ceil(round(share * (n - 1), 9))
        if n < 1000:
            assert torch.equal(keep, scores >= scores.quantile(share) - 1e-9)
        assert keep[scores.argmax()]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).double()  # fmt: skip


def trained():
    model, x = net(), torch.randn(40, 2, 8, 8).double()
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    model(x)
    return model.eval(), x


@pytest.mark.parametrize("importance", ["l1", "saliency", "random"])
def test_each_layer_loses_its_share_and_the_model_nothing(importance):
    model, x = trained()
    before = model(x)
    matrices = calibrate(model, [x])
    for ratio, pruned in zip((0.0, 0.5), weight_copies(model, matrices, importance, False,
                                                       (0.0, 0.5), 0)):  # fmt: skip
        for name in matrices:
            weight = pruned.get_submodule(name).weight
            assert int((weight == 0).sum()) == math.ceil(ratio * (weight.numel() - 1))
        assert torch.equal(pruned(x), before) == (ratio == 0)
    assert torch.equal(model(x), before)


def test_what_is_left_makes_up_for_what_went():
    model, x = trained()
    matrices, errors = calibrate(model, [x]), {}
    for importance, compensate in (("l1", False), ("l1", True), ("saliency", True)):
        (pruned,) = weight_copies(model, matrices, importance, compensate, (0.6,), 0)
        error = (pruned[0](x) - model[0](x)).square().mean()
        errors[importance + "+" * compensate] = error.item()
    assert errors["saliency+"] < errors["l1+"] < errors["l1"]


def test_rewound_survivors_are_the_stored_weights_and_the_rest_stays_0():
    model, x = trained()
    (pruned,) = weight_copies(model, calibrate(model, [x]), "l1", False, (0.7,), 0)
    stored = {n: torch.randn_like(p) for n, p in pruned.named_parameters()}
    with torch.no_grad():
        for name, parameter in pruned.named_parameters():
            parameter.copy_(stored[name])
    pruned(x)  # a mask holds from the next forward on
    kept = pruned[3].weight_mask.bool()
    assert torch.equal(pruned[3].weight[kept], stored["3.weight_orig"][kept])
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        pruned(x).square().mean().backward()
        optimizer.step()
    pruned(x)
    assert (pruned[3].weight[~kept] == 0).all() and 0 < kept.sum() < kept.numel()


def test_zeroing_filters_is_removing_them():
    model, x = trained()
    (removed,) = RLSPruner(model, None, x[:2], ratio=0.5, importance="l1", compensate=False).copies(
        [0.5]
    )
    with torch.no_grad():
        for conv, norm in ((model[0], model[1]), (model[3], model[4])):
            gone = conv.weight.abs().sum((1, 2, 3)).argsort()[: len(conv.weight) // 2]
            for tensor in (conv.weight, conv.bias, norm.weight, norm.bias):
                tensor[gone] = 0
            norm.running_mean[gone] = 0
    torch.testing.assert_close(removed(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("curve", CURVES)
def test_schedules_end_at_their_ratio_and_never_turn_back(curve):
    values = [ratio_after(curve, 0.83, done, 50) for done in range(51)]
    assert values == sorted(values) and values[0] == 0 and abs(values[-1] - 0.83) < 1e-15
