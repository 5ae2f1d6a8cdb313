"""Masks of whole layers: exact sparsity, patterns, training on, and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from support.compare import differing, random_spd, snapshot
from support.pruning_data import error, inputs, inverse, with_ones
from support.training import batch, cnn, make, mlp, train
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from rlscuda import RLSOptimizer
from rlscuda.pruning.masks import weights as masks
from rlscuda.pruning.masks.weights import prune_weights
from rlscuda.pruning.matrices.calibration import calibrate
from rlscuda.pruning.matrices.own import own_matrices


def images(model: nn.Module, size: int = 64) -> dict[str, torch.Tensor]:
    """The im2col rows [groups, N, n (+ 1)] of every layer of `cnn`, seen in one forward."""
    seen, handles = {}, []

    def hook(name):
        def record(module, args):
            x = args[0].double()
            if isinstance(module, nn.Conv2d):
                if module.padding_mode == "circular":
                    x = F.pad(x, module._reversed_padding_repeated_twice, mode="circular")
                    rows = F.unfold(x, 3, stride=module.stride)
                else:
                    rows = F.unfold(x, 3, padding=module.padding, stride=module.stride)
                x = rows.transpose(1, 2).flatten(0, 1)
            parts = x.chunk(getattr(module, "groups", 1), 1)
            ones = module.bias is not None
            seen[name] = torch.stack([with_ones(p) if ones else p for p in parts])

        return record

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        model(batch(model, size))
    for handle in handles:
        handle.remove()
    return seen


def matrices_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return calibrate(model, [batch(model, 64)])


def layer_rows(module) -> torch.Tensor:
    W = module.weight.detach().double().flatten(1)
    return W if module.bias is None else torch.cat([W, module.bias.detach().double()[:, None]], 1)


def test_exact_sparsity_and_less_error_than_magnitude():
    model = cnn().eval()  # the batch norm as calibration sees it
    rows, before = images(model), {n: layer_rows(m) for n, m in model.named_modules()
                                   if isinstance(m, (nn.Conv2d, nn.Linear))}  # fmt: skip
    report = prune_weights(model, matrices_of(model), sparsity=0.6)
    assert [row.name for row in report] == ["0", "3", "5"]
    for row in report:
        module = model.get_submodule(row.name)
        total = module.weight.numel()
        assert row.zeros == round(0.6 * total) == int((module.weight == 0).sum())
        assert torch.equal(row.mask, module.weight != 0) and prune.is_pruned(module)
        W, X = before[row.name], rows[row.name]
        kept = W.abs().flatten().sort().values[row.zeros + (W.numel() - total)]
        magnitude = torch.where(W.abs() >= kept, W, 0)
        magnitude[:, module.weight[0].numel() :] = W[:, module.weight[0].numel() :]
        parts = [(x, W.chunk(len(X))[g], layer_rows(module).chunk(len(X))[g],
                  magnitude.chunk(len(X))[g]) for g, x in enumerate(X)]  # fmt: skip
        ours = sum(error(x, w - now) for x, w, now, _ in parts)
        theirs = sum(error(x, w - cut) for x, w, _, cut in parts)
        assert ours < 0.9 * theirs
        assert 0.9 * ours <= row.cost and 0 < row.loss < 1
    assert report.sparsity == pytest.approx(0.6, abs=0.01)


def test_the_bias_compensates_and_is_never_removed():
    model = nn.Sequential(nn.Linear(4, 2)).double()
    model[0].bias.data.fill_(1e-9)  # the cheapest of all
    X = with_ones(inputs(4))
    X[:, 2] = X[:, 4] + 1e-6 * X[:, 0]  # a constant input: the bias can stand in for it
    W = layer_rows(model[0])
    model[0].weight.data[:, 2] = 5
    prune_weights(model, {"0": inverse(X)[None]}, sparsity=0.25, permanent=True)
    assert torch.all(model[0].weight[:, 2] == 0) and (model[0].weight == 0).sum() == 2
    torch.testing.assert_close(
        model[0].bias.data, torch.full((2,), 5.0).double(), rtol=1e-4, atol=0
    )
    assert not torch.equal(W, layer_rows(model[0]))


def test_the_optimizer_s_own_matrices_will_do():
    model = cnn(torch.float64)
    optimizer = RLSOptimizer(model, lr=0.02)  # late in a schedule: P is of the network as it is
    train(model, optimizer, steps=60, size=32)
    model.eval()
    with torch.no_grad():
        reference = model(batch(model, 500))
    errors = {}
    for name in ("own", "exact", "magnitude"):
        other = copy.deepcopy(model)
        if name == "magnitude":
            for i in (0, 3, 5):
                prune.l1_unstructured(other[i], "weight", 0.5)
        else:
            exact = calibrate(model, [batch(model, 500)])
            matrices = own_matrices(optimizer, exact) if name == "own" else exact
            prune_weights(other, matrices, sparsity=0.5)
        with torch.no_grad():
            errors[name] = float((other(batch(model, 500)) - reference).square().sum())
    assert errors["exact"] < 0.7 * errors["magnitude"]
    assert errors["own"] < 0.9 * errors["magnitude"]


def test_a_bias_outside_the_matrix_stays():
    model = nn.Sequential(nn.Linear(4, 2))
    bias = model[0].bias.detach().clone()
    prune_weights(model, {"0": inverse(inputs(4))}, sparsity=0.5)
    assert torch.equal(model[0].bias, bias) and (model[0].weight == 0).sum() == 4


@pytest.mark.parametrize("permanent", [False, True])
def test_two_of_four(permanent):
    model = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 8))
    matrices = {"0": torch.stack([inverse(with_ones(inputs(36, seed=s))) for s in range(2)]),
                "2": inverse(inputs(24))}  # fmt: skip
    report = prune_weights(model, matrices, pattern=(2, 4), permanent=permanent)
    assert torch.all((model[2].weight.view(8, 6, 4) == 0).sum(2) == 2)
    # a convolution's four are channels at one kernel position, as tensor cores want them
    assert torch.all((model[0].weight == 0).sum(1) == 2)
    assert [row.sparsity for row in report] == [0.5, 0.5]
    assert prune.is_pruned(model) is not permanent
    W = torch.randn(8, 24, dtype=torch.float64)
    model[2] = nn.Linear(24, 8, bias=False)
    model[2].weight.data.copy_(W)
    groups = W.view(8, 6, 4).abs()
    magnitude = (groups >= groups.sort(2).values[..., 2:3]).flatten(1)
    prune_weights(model, matrices, pattern=(2, 4), layers=["2"], permanent=True)
    X = inputs(24)
    assert error(X, W - model[2].weight.detach().double()) < 0.5 * error(X, W * ~magnitude)


def test_more_sparsity_later_keeps_the_mask_and_its_hook():
    model = mlp(torch.float64)
    matrices = {"0": inverse(inputs(4))}
    first = prune_weights(model, matrices, sparsity=0.25)[0].mask
    weight, hooks = model[0].weight_orig, list(model[0]._forward_pre_hooks.values())
    model[0].weight_orig.data.add_(1)  # training moves what the mask hides, too
    second = prune_weights(model, matrices, sparsity=0.5)[0].mask
    assert model[0].weight_orig is weight
    assert list(model[0]._forward_pre_hooks.values()) == hooks
    assert not (second & ~first).any() and int((~second).sum()) == 12
    assert torch.equal(model[0].weight != 0, second)
    third = prune_weights(model, matrices, pattern=(1, 4))[0].mask
    assert not (third & ~second).any() and torch.all(third.sum(1) <= 1)
    with pytest.raises(ValueError, match="sparsity 0.1 of 24 weights is below that of its mask"):
        prune_weights(model, matrices, sparsity=0.1)
    prune_weights(model, matrices, sparsity=0.9, permanent=True)
    assert not prune.is_pruned(model) and model[0].weight is weight
    assert (weight == 0).sum() == 22


@pytest.mark.parametrize("kind", ["rls", "paper", "adamw"])
def test_the_same_optimizer_trains_on(kind):
    model = cnn()
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    else:
        optimizer = (
            RLSOptimizer(model) if kind == "rls" else make(model, form="paper", momentum=0.5)
        )
    train(model, optimizer)
    weights = [model[i].weight for i in (0, 3, 5)]
    report = prune_weights(model, matrices_of(model), sparsity=0.7, optimizer=optimizer)
    assert all(model[i].weight_orig is w for i, w in zip((0, 3, 5), weights))
    for row, weight in zip(report, weights):
        for name, value in optimizer.state[weight].items():
            if name in ("exp_avg", "exp_avg_sq", "first_moment", "momentum_buffer"):
                columns = value.flatten(1)[:, : weight[0].numel()]
                assert torch.all(columns[~row.mask.flatten(1)] == 0) and columns.any(), name
    before = [(w.detach().clone(), m.detach().clone()) for w, m in
              zip(weights, (model[i].weight for i in (0, 3, 5)))]  # fmt: skip
    train(model, optimizer, steps=4)
    for (_, old), row in zip(before, report):
        model(batch(model))
        now = model.get_submodule(row.name).weight
        assert torch.all(now[~row.mask] == 0) and torch.all(now[row.mask] != old[row.mask])
    if kind != "adamw":
        assert all(h.updates >= 7 and not h.missing for h in optimizer.health().values())


def test_an_error_in_the_midst_of_writing_undoes_everything(monkeypatch):
    model = cnn()
    optimizer = make(model, momentum=0.5)
    train(model, optimizer)
    matrices = matrices_of(model)
    prune_weights(model, matrices, sparsity=0.3, layers=["3"])
    tensors = {**snapshot(model, optimizer), **model.state_dict()}
    tensors = {name: value.clone() for name, value in tensors.items()}
    names = [name for name, _ in model.named_parameters()]
    objects, real, calls = list(model.parameters()), masks.write_mask, []

    for fault in range(3):
        for late in (False, True):
            calls.clear()

            def failing(*args, fault=fault, late=late):
                calls.append(1)
                if len(calls) == fault + 1 and not late:
                    raise RuntimeError("planted")
                real(*args)
                if len(calls) == fault + 1:
                    raise RuntimeError("planted")

            monkeypatch.setattr(masks, "write_mask", failing)
            with pytest.raises(RuntimeError, match="planted"):
                prune_weights(model, matrices, sparsity=0.5, optimizer=optimizer)
            assert [name for name, _ in model.named_parameters()] == names
            assert all(p is q for p, q in zip(objects, model.parameters()))
            assert not differing(tensors, {**snapshot(model, optimizer), **model.state_dict()})
            assert [prune.is_pruned(model[i]) for i in (0, 3, 5)] == [False, True, False]
    train(model, optimizer)
    assert (model[3].weight == 0).sum() == round(0.3 * model[3].weight.numel())


def test_channels_last_moments_are_cleared():
    model = nn.Sequential(nn.Conv2d(4, 3, 3, bias=False)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4, 5, 5)).sum().backward()
    optimizer.step()
    mask = prune_weights(model, {"0": random_spd(36)}, sparsity=0.5, optimizer=optimizer)[0].mask
    assert torch.all(optimizer.state[model[0].weight_orig]["exp_avg"][~mask] == 0)


def test_a_matrix_of_the_weight_s_own_shape_is_no_moment():
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    optimizer = RLSOptimizer(model)
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    P = optimizer.inverse_autocorrelation("0")
    before = P.clone()
    prune_weights(model, {"0": before}, sparsity=0.5, optimizer=optimizer)
    assert torch.equal(P, before) and P.all()


def test_more_sparsity_after_another_calibration():
    model = mlp()
    for sparsity in (0.25, 0.5):
        report = prune_weights(model, matrices_of(model), sparsity=sparsity)
        model[0].weight_orig.data.add_(0.1)
        assert report.sparsity == pytest.approx(sparsity, abs=0.05)
    assert all(torch.all(module.weight[~row.mask] == 0)
               for row in report for module in [model.get_submodule(row.name)])  # fmt: skip


def test_the_report_is_a_table():
    model = cnn()
    lines = str(prune_weights(model, matrices_of(model), sparsity=0.5)).splitlines()
    assert lines[0].split() == ["layer", "weights", "zeros", "sparsity", "loss"]
    assert lines[1].split()[:4] == ["0", "72", "36", "50.0%"]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1


def test_errors_leave_the_model_as_it_was():
    def tied():
        model = mlp()
        model[2] = nn.Linear(4, 6)
        model[2].weight = model[0].weight
        return model

    def parametrised():
        model = mlp()
        parametrizations.weight_norm(model[0])
        return model

    P = random_spd(5)
    good = {"0": P, "2": random_spd(7)}
    indefinite = P.clone()
    indefinite[0, 0] = -1
    lopsided = P.clone()
    lopsided[0, 1] += 1
    nan = mlp()
    nan[0].weight.data[0, 0] = torch.nan
    cases = [
        (mlp, good, {"sparsity": None}, "give either sparsity or pattern, got None and None"),
        (mlp, good, {"sparsity": 0.5, "pattern": (2, 4)}, "give either"),
        (mlp, good, {"sparsity": 1.0}, "above 0 and below 1, got 1.0"),
        (mlp, good, {"pattern": (4, 4)}, r"\(n, m\) with 0 < n < m, got \(4, 4\)"),
        (mlp, good, {"sparsity": "a"}, "sparsity must be a finite number, got 'a'"),
        (mlp, good, {"pattern": 2}, r"integers \(n, m\) with 0 < n < m, got 2"),
        (mlp, good, {"pattern": (1.0, 2.0)}, r"got \(1.0, 2.0\)"),
        (mlp, good, {"pattern": (2, 4)}, "'2': its inputs must be a multiple of 4, got 6"),
        (mlp, good, {"layers": ["4"]}, "no matrix of '4', only of 0, 2"),
        (mlp, good, {"layers": []}, "at least one layer"),
        (mlp, {**good, "7": P}, {}, "the model has no layer '7'"),
        (mlp, {**good, "1": P}, {}, "'1' must be a Linear or convolution, got ReLU"),
        (lambda: nn.MultiheadAttention(4, 1), {"out_proj": P}, {}, "uses the weight of 'out_proj'"),
        (tied, good, {"layers": ["0"]}, "weight of '0' is also that of '2'"),
        (parametrised, good, {}, "weight of '0' must be a parameter of it"),
        (mlp, {"0": random_spd(6)}, {}, r"must be \[1, 4, 4\] or \[1, 5, 5\], got \[1, 6, 6\]"),
        (mlp, {"0": random_spd(2, 5)}, {}, r"got \[2, 5, 5\]"),
        (mlp, {**good, "2": random_spd(7) * torch.nan}, {}, "'2' must be finite and symmetric"),
        (mlp, {"0": lopsided}, {}, "'0' must be finite and symmetric"),
        (mlp, {**good, "0": indefinite}, {}, "'0': P must be positive definite"),
        (lambda: nan, good, {}, "weight and bias of '0' must be finite"),
    ]
    for factory, matrices, options, message in cases:
        options = (
            options
            if any(wrong in options for wrong in ("sparsity", "pattern"))
            else {**options, "sparsity": 0.5}
        )
        model = factory()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            prune_weights(model, matrices, **options)
        assert not differing(before, model.state_dict()), message
        assert not any("weight_orig" in name for name in model.state_dict())
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got int"):
        prune_weights(mlp(), good, sparsity=0.5, optimizer=3)
    with pytest.raises(TypeError, match="several names, got the string '0'"):
        prune_weights(mlp(), good, sparsity=0.5, layers="0")
