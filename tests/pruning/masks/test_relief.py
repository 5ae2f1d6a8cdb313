"""Neural network relief: its scores, what is kept, and what must hold whatever the data."""

from __future__ import annotations

import copy

import pytest
import torch
from support.pruning_data import with_ones
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from rlscuda.optim.layers import Layer
from rlscuda.pruning import calibrate, prune_relief
from rlscuda.pruning.masks.activity import Activity, strongest

CONVOLUTIONS = {
    "plain": (nn.Conv2d, (3, 4, 3), {}, (3, 7, 6)),
    "stride": (nn.Conv2d, (3, 4, (3, 2)), {"stride": (2, 1), "padding": (1, 2)}, (3, 7, 6)),
    "dilation": (nn.Conv2d, (2, 5, 3), {"dilation": 2, "padding": "same"}, (2, 6, 6)),
    "groups": (nn.Conv2d, (4, 6, 3), {"groups": 2, "padding": 1, "bias": False}, (4, 5, 5)),
    "depthwise": (nn.Conv2d, (4, 4, 3), {"groups": 4}, (4, 5, 5)),
    "reflected": (nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 5, 5)),
    "line": (nn.Conv1d, (3, 4, 3), {"padding": 1}, (3, 9)),
    "volume": (nn.Conv3d, (2, 3, (2, 3, 3)), {"stride": (2, 1, 1)}, (2, 5, 4, 4)),
}


def looped(conv, x, norm):
    """The signals [c, C / groups (+ 1)] by a loop over positions, as in the authors' code."""
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    found = torch.zeros(conv.out_channels, conv.weight.shape[1], dtype=torch.float64)
    size = conv.out_channels // conv.groups
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), 0
    else:
        padding = conv.padding
    for i in range(conv.out_channels):
        for j in range(conv.weight.shape[1]):
            channel = i // size * conv.weight.shape[1] + j
            y = convolve(
                x[:, [channel]].abs(), conv.weight[[i]][:, [j]].abs(), None, conv.stride, padding,
                conv.dilation,
            ).mean(0).flatten()  # fmt: skip
            found[i, j] = sum(y) if norm == "sum" else sum(v * v for v in y) ** 0.5
    if conv.bias is not None:
        factor = len(y) if norm == "sum" else len(y) ** 0.5
        found = torch.cat([found, factor * conv.bias.abs()[:, None]], 1)
    return found, len(y)


@pytest.mark.parametrize("norm", ["sum", "position"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_closed_forms_are_the_loop_over_positions(name, norm):
    kind, sizes, options, shape = CONVOLUTIONS[name]
    conv, x = kind(*sizes, **options), torch.randn(6, *shape)
    layer = Layer("conv", conv, 0, conv.bias is not None)
    activity = Activity(layer, norm)
    for part in x.split((1, 3, 2)):
        activity.add(part)
    rows = conv.weight.flatten(1)
    if conv.bias is not None:
        rows = torch.cat([rows, conv.bias[:, None]], 1)
    expected, positions = looped(conv.double(), x.double(), norm)
    scale = positions if norm == "sum" else positions**0.5
    torch.testing.assert_close(scale * activity.signals(rows), expected, rtol=1e-5, atol=1e-6)


def test_linear_signals():
    linear, h = nn.Linear(5, 3).double(), torch.randn(4, 7, 5).double()
    for norm in ("sum", "position"):
        activity = Activity(Layer("fc", linear, 0, True), norm)
        for part in h.split(2):
            activity.add(part)
        W = torch.cat([linear.weight, linear.bias[:, None]], 1).detach()
        expected = W.abs() * with_ones(h.abs().mean((0, 1))[None])
        torch.testing.assert_close(activity.signals(W), expected)


@pytest.mark.parametrize("alpha", [0.3, 0.9, 0.999])
def test_the_shortest_prefix_that_reaches_the_share_is_kept(alpha):
    s = torch.rand(200, 17).double() ** 3
    kept = strongest(s, alpha)
    total, carried = s.sum(1), (s * kept).sum(1)
    least = torch.where(kept, s, torch.inf).min(1).values
    assert torch.all(carried >= alpha * total * (1 - 1e-12))
    assert torch.all(carried - least < alpha * total)
    assert torch.all(least > torch.where(kept, 0, s).max(1).values)
    published = strongest(s, alpha, as_published=True)
    room = kept.sum(1) < 17
    assert torch.equal(published[room], kept[room])
    assert torch.all(published.sum(1) == kept.sum(1).clamp(max=16))


def test_ties_zeros_and_single_inputs():
    one = torch.rand(3, 1)
    assert strongest(one, 0.5).all() and strongest(one, 0.5, as_published=True).all()
    distinct = torch.tensor([[4.0, 1, 3, 2]])
    assert strongest(distinct, 1 - 1e-9).all()
    assert strongest(distinct, 1 - 1e-9, True).tolist() == [[True, False, True, True]]
    tied = torch.tensor([[2.0, 1, 1, 1, 0]])
    assert strongest(tied, 0.7).tolist() == [[True] * 4 + [False]]
    assert strongest(tied, 0.7, True).tolist() == [[True] + [False] * 4]
    dead = torch.zeros(2, 4)
    assert not strongest(dead, 0.9).any() and not strongest(dead, 0.9, True).any()


def relieved(model, x, **options):
    model = copy.deepcopy(model)
    report = prune_relief(model, [x], backward=False, **options)
    return [torch.cat([row.mask.flatten(1), row.bias[:, None]], 1) for row in report], report


def test_scales_and_permutations():
    model, x = nn.Sequential(nn.Linear(9, 6)).double(), torch.randn(50, 9).double()
    (mask,), _ = relieved(model, x, alpha=0.8)
    assert 0.2 < mask.double().mean() < 0.9
    scaled = copy.deepcopy(model)
    a = torch.rand(6).double() + 0.1
    scaled[0].weight.data.mul_(a[:, None])
    scaled[0].bias.data.mul_(a)
    assert torch.equal(relieved(scaled, x, alpha=0.8)[0][0], mask)
    scaled = copy.deepcopy(model)
    scaled[0].bias.data.mul_(3.7)
    assert torch.equal(relieved(scaled, 3.7 * x, alpha=0.8)[0][0], mask)
    order = torch.randperm(9)
    permuted = copy.deepcopy(model)
    permuted[0].weight.data = model[0].weight.data[:, order]
    both = torch.cat([order, torch.tensor([9])])
    assert torch.equal(relieved(permuted, x[:, order], alpha=0.8)[0][0], mask[:, both])


@torch.no_grad()
def excess(module, x, as_published=False, alpha=0.8):
    """By how much the mean change of each output is above (1 - alpha) of its signal at most."""
    model = nn.Sequential(module).double()
    layer = Layer("0", module, 0, module.bias is not None)
    activity = Activity(layer, "sum")
    activity.add(x)
    rows = module.weight.flatten(1)
    if module.bias is not None:
        rows = torch.cat([rows, module.bias[:, None]], 1)
    bound = (1 - alpha) * activity.signals(rows).sum(1)
    before = model(x)
    prune_relief(model, [x], alpha=alpha, backward=False, as_published=as_published)
    change = (before - model(x)).abs().movedim(1, -1).flatten(0, -2).mean(0)
    assert change.max() > 0 or not as_published
    return float((change - bound).max())


@pytest.mark.parametrize("alpha", [0.5, 0.8, 0.97])
def test_the_signal_bound(alpha):
    for _ in range(5):
        assert excess(nn.Linear(20, 8), torch.randn(40, 20).double(), alpha=alpha) <= 1e-12
        conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        assert excess(conv, torch.randn(8, 4, 9, 9).double(), alpha=alpha) <= 1e-12
    few = nn.Linear(2, 4, bias=False)  # all but the least do not reach the share
    few.weight.data = 1 + 0.1 * torch.rand(4, 2)
    x = torch.rand(30, 2).double() + 1
    assert excess(copy.deepcopy(few), x, alpha=alpha) <= 1e-12
    assert excess(few, x, as_published=True, alpha=alpha) > 0 or alpha == 0.5


def mlp():
    return nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)
    ).double()


def test_layers_are_judged_by_the_network_as_it_was():
    model, x = mlp(), torch.randn(60, 8).double()
    together, _ = relieved(model, x, alpha=0.7)
    for name, mask in zip(("0", "2", "4"), together):
        (alone,), _ = relieved(model, x, alpha=0.7, layers=[name])
        assert torch.equal(alone, mask)


def test_refit_is_least_squares_on_what_is_kept():
    model, x = mlp(), torch.randn(400, 8).double()
    matrices = calibrate(model, [x], damping=1e-12)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    prune_relief(plain, [x], alpha=0.7, backward=False)
    report = prune_relief(fitted, [x], alpha=0.7, matrices=matrices, backward=False)
    h = x
    for row in report:
        i = int(row.name)
        X, keep = with_ones(h), torch.cat([row.mask, row.bias[:, None]], 1)
        W, masked, now = (
            torch.cat([m[i].weight, m[i].bias[:, None]], 1).detach() for m in (model, plain, fitted)
        )
        assert torch.equal(now != 0, keep) and torch.equal(masked != 0, keep)
        errors = [(X @ (W - w).T).square().mean(0) for w in (masked, now)]
        assert torch.all(errors[1] <= errors[0] + 1e-12) and errors[1].sum() < errors[0].sum()
        assert row.cost == pytest.approx(float(errors[1].sum()), rel=1e-5)
        for w, k, target in zip(now, keep, W):
            best = torch.linalg.lstsq(X[:, k], (X @ target)[:, None], driver="gelsd").solution
            torch.testing.assert_close(w[k], best[:, 0], rtol=1e-6, atol=1e-8)
        h = model[i](h).relu().detach()


def test_biases_outside_the_matrix_are_masked_and_not_fitted():
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), torch.randn(90, 6).double() + 1
    model[0].bias.data[:] = torch.tensor([1e-9, 1e-9, 0.7, -0.7])
    P = torch.linalg.inv(x.T @ x / len(x))
    bias = model[0].bias.detach().clone()
    (row,) = prune_relief(model, [x], alpha=0.9, matrices={"0": P}, backward=False)
    assert not row.bias[:2].any() and row.bias[2:].any()
    assert torch.equal(model[0].bias, bias * row.bias)


def test_inputs_that_are_always_zero_go_first():
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), torch.randn(50, 6).double()
    x[:, 2] = 0
    (row,) = prune_relief(model, [x], alpha=0.999999, backward=False)
    assert not row.mask[:, 2].any() and row.mask[:, [0, 1, 3, 4, 5]].all() and row.bias.all()


def test_rows_without_a_signal_go_whole():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(50, 6)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
    report = prune_relief(model, [x], alpha=0.9)
    assert not report[0].mask[1].any() and not report[0].bias[1]
    assert not report[1].mask[:, 1].any()
    assert report[0].connections[0] <= 21 and report.left < 1


def test_a_module_that_is_called_twice_sees_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x).tanh())

    model, x = Twice().double(), torch.randn(30, 4).double()
    h = torch.cat([x, model.fc(x).tanh().detach()])
    S = torch.cat([model.fc.weight, model.fc.bias[:, None]], 1).abs().detach()
    expected = strongest(S * with_ones(h.abs().mean(0)[None]), 0.8)
    (row,) = prune_relief(model, [x], alpha=0.8)
    assert torch.equal(torch.cat([row.mask, row.bias[:, None]], 1), expected)


def test_rounds_only_remove():
    model, x = mlp(), torch.randn(60, 8).double()
    masks = []
    for _ in range(3):
        report = prune_relief(model, [x], alpha=0.8, matrices=calibrate(model, [x]))
        masks.append(torch.cat([part.flatten() for row in report for part in (row.mask, row.bias)]))
        assert all(prune.is_pruned(model[i]) for i in (0, 2, 4))
    assert not (masks[1] & ~masks[0]).any() and not (masks[2] & ~masks[1]).any()
    assert masks[2].sum() < masks[1].sum() < masks[0].sum()
    assert report.left == pytest.approx(float(masks[2].double().mean()))
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "connections", "left", "share", "signal"]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1


def test_errors_leave_the_model_as_it_was():
    x = torch.randn(20, 8).double()
    nan = x.clone()
    nan[3, 2] = torch.nan
    indefinite = {n: -P for n, P in calibrate(mlp(), [x]).items()}
    cases = [
        ([x], {"alpha": 1.0}, "alpha must be above 0 and below 1, got 1.0"),
        ([x], {"alpha_conv": 0}, "alpha_conv must be above 0 and below 1, got 0"),
        ([x], {"alpha": "a"}, "alpha must be a finite number, got 'a'"),
        ([x], {"norm": "max"}, r"norm must be sum \| position, got 'max'"),
        ([], {}, "at least one batch, got none"),
        ([nan], {}, "layer '0' saw NaN or infinite input"),
        ([x], {"matrices": {}}, "there is no matrix of '0', only of none"),
        ([x], {"matrices": indefinite}, "'0': P must be positive definite"),
        ([x], {"layers": ["5"]}, "layers names '5', which the model does not have"),
    ]
    for loader, options, message in cases:
        model = mlp()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            prune_relief(model, loader, **options)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), message
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got int"):
        prune_relief(mlp(), [x], optimizers=3)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match="norm 'position' needs inputs of one size, got those"):
        sizes = [torch.randn(2, 1, 5, 5), torch.randn(2, 1, 6, 6)]
        prune_relief(conv, sizes, norm="position", backward=False)
