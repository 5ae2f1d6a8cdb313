"""Weights removed one by one: against refits by least squares, brute force and magnitude masks."""

from __future__ import annotations

import copy
import heapq
import itertools

import pytest
import torch
from conftest import batch, cnn, differing, make, mlp, random_spd, snapshot, train
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from rlscuda import RLSOptimizer
from rlscuda.pruning import masks, weightwise
from rlscuda.pruning.masks import prune_weights
from rlscuda.pruning.matrices import calibrate, own_matrices
from rlscuda.pruning.weightwise import cheapest_prefixes, refit, removal_paths


def inputs(n: int, rows: int = 300, seed: int = 0) -> torch.Tensor:
    """Correlated rows [rows, n] in float64 with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(rows, n, generator=generator, dtype=torch.float64) @ mix + 0.5


def inverse(X: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(X.T @ X / len(X))


def with_ones(X: torch.Tensor) -> torch.Tensor:
    return torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


def error(X: torch.Tensor, change: torch.Tensor) -> float:
    return float((X @ change.T).square().sum() / len(X))


def all_columns(n: int) -> torch.Tensor:
    return torch.arange(n)[None]


# -- the rows ------------------------------------------------------------------------------------


def test_refit_is_least_squares_on_the_kept_columns():
    X, W = with_ones(inputs(9)), torch.randn(5, 10, dtype=torch.float64)
    keep = torch.rand(5, 10) < 0.6
    keep[0], keep[1] = True, False
    rows, costs = refit(inverse(X), W, keep)
    for w, kept, row, cost in zip(W, keep, rows, costs):
        direct = torch.zeros_like(w)
        if kept.any():
            direct[kept] = torch.linalg.lstsq(X[:, kept], X @ w).solution
        torch.testing.assert_close(row, direct, rtol=1e-10, atol=1e-10)
        assert torch.all(row[~kept] == 0)
        assert cost.item() == pytest.approx(error(X, (w - row)[None]), rel=1e-9, abs=1e-9)
    assert torch.equal(rows[0], W[0]) and costs[0] == 0


def naive_path(A: torch.Tensor, w: torch.Tensor, groups: list[list[int]], quota: int):
    """One removal at a time, each tried out by a refit on what would remain."""
    left, order, costs, total = list(range(len(w))), [], [], 0.0
    taken = [0] * len(groups)
    while sum(taken) < quota * len(groups):
        best = None
        for g, members in enumerate(groups):
            for j in members:
                if j not in left or taken[g] == quota:
                    continue
                kept = [i for i in left if i != j]
                change = w.clone()
                change[kept] -= torch.linalg.solve(A[kept][:, kept], A[kept] @ w)
                cost = float(change @ A @ change)
                if best is None or cost < best[0]:
                    best = (cost, j, g)
        order.append(best[1])
        costs.append(best[0] - total)
        total = best[0]
        left.remove(best[1])
        taken[best[2]] += 1
    return order, costs


@pytest.mark.parametrize("case", ["all", "pattern", "bias"])
def test_paths_are_those_of_refitting_for_every_candidate(case, monkeypatch):
    n = 12
    monkeypatch.setattr(weightwise, "_BLOCK", 3)  # several downdates, and columns taken out
    X = with_ones(inputs(n)) if case == "bias" else inputs(n)
    A, W = X.T @ X / len(X), torch.randn(3, X.shape[1], dtype=torch.float64)
    groups = torch.arange(n).view(-1, 4) if case == "pattern" else all_columns(n)
    quota = 2 if case == "pattern" else n
    order, costs = removal_paths(torch.linalg.inv(A), W, groups, quota)
    for r in range(3):
        direct, increases = naive_path(A, W[r], groups.tolist(), quota)
        assert order[r].tolist() == direct
        torch.testing.assert_close(costs[r], torch.tensor(increases, dtype=torch.float64),
                                   rtol=1e-7, atol=1e-8)  # fmt: skip


def test_the_first_removal_is_the_best_single_one_and_a_pair_no_better_than_the_best():
    X, w = inputs(6), torch.randn(1, 6, dtype=torch.float64)
    P = inverse(X)

    def cost(removed):
        keep = torch.ones(1, 6, dtype=torch.bool)
        keep[0, list(removed)] = False
        return refit(P, w, keep)[1].item()

    order, costs = removal_paths(P, w, all_columns(6))
    assert costs[0, 0].item() == pytest.approx(min(cost([j]) for j in range(6)))
    best = min(cost(pair) for pair in itertools.combinations(range(6), 2))
    assert best <= costs[0, :2].sum().item() * (1 + 1e-9)
    assert costs[0, :2].sum().item() == pytest.approx(cost(order[0, :2].tolist()))


def test_costs_of_a_long_path_add_up_to_the_true_increase():
    X, W = inputs(150, 400), torch.randn(4, 150, dtype=torch.float64)
    order, costs = removal_paths(inverse(X), W, all_columns(150))
    assert torch.equal(order.sort(1).values, torch.arange(150).expand(4, -1))
    for k in (1, 32, 33, 75, 149):
        keep = torch.ones(4, 150, dtype=torch.bool).scatter_(1, order[:, :k], False)
        rows, _ = refit(inverse(X), W, keep)
        assert costs[:, :k].sum().item() == pytest.approx(error(X, W - rows), rel=1e-6)


def test_chunks_change_nothing(monkeypatch):
    P, W = random_spd(40), torch.randn(7, 40, dtype=torch.float64)  # the last chunk is one row
    given = P.clone()
    order, costs = removal_paths(P, W, all_columns(40))
    keep = torch.rand(7, 40) < 0.5
    whole = refit(P, W, keep)
    monkeypatch.setattr(weightwise, "_CHUNK_BYTES", 3 * 40 * 40 * 8)
    again = removal_paths(P, W, all_columns(40))
    assert torch.equal(order, again[0])
    torch.testing.assert_close(costs, again[1])
    torch.testing.assert_close(whole, refit(P, W, keep))
    assert torch.equal(P, given)


def test_merging_paths_is_taking_the_cheapest_next_weight():
    costs = torch.rand(6, 9, dtype=torch.float64)
    heap = [(costs[r, 0].item(), r, 0) for r in range(6)]
    heapq.heapify(heap)
    lengths = [0] * 6
    for count in range(1, 55):
        _, r, k = heapq.heappop(heap)
        lengths[r] += 1
        if k < 8:
            heapq.heappush(heap, (costs[r, k + 1].item(), r, k + 1))
        assert cheapest_prefixes(costs, count).tolist() == lengths


def test_nearly_singular_inputs_give_no_nan():
    X = inputs(20)
    X[:, 7] = X[:, 3] + 1e-9 * X[:, 8]  # almost twice the same
    A = X.T @ X / len(X)
    P = torch.linalg.inv(A + 1e-12 * A.diagonal().mean() * torch.eye(20))
    P, W = (P + P.T) / 2, torch.randn(3, 20, dtype=torch.float64)
    order, costs = removal_paths(P, W, all_columns(20))
    assert torch.isfinite(costs).all() and {3, 7} & set(order[0, :3].tolist())


# -- layers --------------------------------------------------------------------------------------


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
    optimizer = RLSOptimizer(model)
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
        (mlp, good, {"pattern": (2, 4)}, "'2': its inputs must be a multiple of 4, got 6"),
        (mlp, good, {"layers": ["4"]}, "no matrix of '4', only of 0, 2"),
        (mlp, good, {"layers": []}, "at least one layer"),
        (mlp, {**good, "7": P}, {}, "the model has no layer '7'"),
        (mlp, {**good, "1": P}, {}, "'1' must be a Linear or Conv2d, got ReLU"),
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
        assert not prune.is_pruned(model)
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got int"):
        prune_weights(mlp(), good, sparsity=0.5, optimizer=3)
    with pytest.raises(TypeError, match="several names, got the string '0'"):
        prune_weights(mlp(), good, sparsity=0.5, layers="0")
