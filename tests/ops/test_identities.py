"""The identities that a correct implementation satisfies, in float64."""

import math

import pytest
import torch
from support.cases import CONVOLUTIONS, unfolded
from support.compare import random_spd
from torch import nn

import rlscuda.functional as RF
from rlscuda import RLSOptimizer

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def test_hand_checkable_example():
    P = torch.eye(2)
    u, h = RF.rls_update_(P, torch.tensor([1.0, 2.0]), forgetting=0.5, gain=1.0)
    assert h.item() == 5.5
    assert u.tolist() == [1.0, 2.0]
    expected = torch.tensor([[1.636364, -0.727273], [-0.727273, 0.545455]])
    torch.testing.assert_close(P, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("forgetting", [1.0, 0.97])
@pytest.mark.parametrize("bias", [False, True])
def test_paper_form_is_weighted_ridge_regression(forgetting, bias):
    n, c, steps, scale = 5, 3, 40, 2.0
    layer = nn.Linear(n, c, bias=bias).double()
    optimizer = RLSOptimizer(
        layer, form="paper", lr=1.0, gain=1.0, forgetting=forgetting, ridge=0,
        initial_scale=scale, trust_ratio=math.inf,
    )  # fmt: skip
    start = [p.detach().clone() for p in layer.parameters()]
    W = start[0] if not bias else torch.cat([start[0], start[1][:, None]], 1)
    X, Y = torch.randn(steps, n).double(), torch.randn(steps, c).double()
    for x, y in zip(X, Y):
        optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().sum()).backward()
        optimizer.step()

    rows = torch.cat([X, torch.ones(steps, 1)], 1) if bias else X
    age = forgetting ** torch.arange(steps - 1, -1, -1).double()
    prior = forgetting**steps / scale * torch.eye(rows.shape[1]).double()
    R = rows.T @ (age[:, None] * rows) + prior
    solution = torch.linalg.solve(R, rows.T @ (age[:, None] * Y) + prior @ W.T).T
    learnt = layer.weight if not bias else torch.cat([layer.weight, layer.bias[:, None]], 1)
    torch.testing.assert_close(learnt, solution, **EXACT)
    P = optimizer.inverse_autocorrelation(layer)
    torch.testing.assert_close(P, torch.linalg.inv(R), **EXACT)


def test_paper_form_is_the_filter_of_padasip():
    padasip = pytest.importorskip("padasip", reason="the oracle is in the extra [test]")
    n, mu, eps = 6, 0.98, 0.2
    oracle = padasip.filters.FilterRLS(n, mu=mu, eps=eps, w="zeros")
    layer = nn.Linear(n, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    optimizer = RLSOptimizer(
        layer, form="paper", lr=1.0, gain=1.0, forgetting=mu, ridge=0, initial_scale=1 / eps,
        trust_ratio=math.inf,
    )  # fmt: skip
    for x, y in zip(torch.randn(60, n).double(), torch.randn(60).double()):
        oracle.adapt(y.item(), x.numpy())
        optimizer.zero_grad()
        (0.5 * (layer(x) - y).square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight[0], torch.from_numpy(oracle.w), **EXACT)
    P = optimizer.inverse_autocorrelation(layer)
    torch.testing.assert_close(P, torch.from_numpy(oracle.R), **EXACT)


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_rank_r_is_r_sequential_updates(rank):
    n, forgetting, gain = 7, 0.9, 0.4
    S, P = torch.randn(rank, n).double(), random_spd(n)
    together, one_by_one = P.clone(), P.clone()
    RF.rls_update_(together, S, forgetting, gain)
    for k, s in enumerate(S):  # R <- lambda R + (kappa / r) S^T S: lambda goes in once
        RF.rls_update_(one_by_one, s, forgetting if k == 0 else 1.0, gain / rank)
    torch.testing.assert_close(together, one_by_one, **EXACT)


def test_all_rows_at_once_is_block_least_squares():
    n, N, forgetting = 6, 30, 0.95
    X, P = torch.randn(N, n).double(), random_spd(n)
    block = torch.linalg.inv(forgetting * torch.linalg.inv(P) + X.T @ X)
    RF.rls_update_(P, X, forgetting, gain=float(N))
    torch.testing.assert_close(P, block, **EXACT)


@pytest.mark.parametrize("summary", ["sketch", "sample"])
def test_random_summaries_are_unbiased(summary):
    """E[S^T S / r] = X^T X / N, as `P` sees it: the mean over seeds of its inverse."""
    n, N, draws = 3, 10, 1000
    layer = nn.Linear(n, 1, bias=False).double()
    optimizer = RLSOptimizer(layer, form="natural", summary=summary, rank=4, gain=1.0, lr=0.0)
    P = optimizer.inverse_autocorrelation(layer)
    X, total = torch.randn(N, n).double() + 1, torch.zeros(n, n).double()
    for _ in range(draws):
        P.copy_(torch.eye(n))
        optimizer.zero_grad()
        layer(X).sum().backward()
        optimizer.step()
        total += torch.linalg.inv(P) - torch.eye(n).double()
    expected = X.T @ X / N
    torch.testing.assert_close(total / draws, expected, rtol=0, atol=0.06 * expected.max().item())


FORMS = {
    "paper": {"form": "paper", "momentum": 0.5, "weight_decay": 0.1, "forgetting": 0.9},
    "natural": {"form": "natural", "rank": 3, "summary": "sketch"},
    "adaptive": {"form": "adaptive", "rank": 2, "summary": "mean"},
}


@pytest.mark.parametrize(
    "number, case", list(enumerate(CONVOLUTIONS)), ids=lambda v: getattr(v, "name", "")
)
def test_convolution_is_a_linear_layer_on_unfolded_rows(number, case):
    options = list(FORMS.values())[number % 3]
    conv = case.layer()
    linears = [
        nn.Linear(conv.weight[0].numel(), conv.out_channels // conv.groups,
                  bias=conv.bias is not None).double()
        for _ in range(conv.groups)
    ]  # fmt: skip
    for k, linear in enumerate(linears):
        linear.weight.data = conv.weight.detach().chunk(conv.groups)[k].flatten(1).clone()
        if conv.bias is not None:
            linear.bias.data = conv.bias.detach().chunk(conv.groups)[k].clone()
    of_conv = RLSOptimizer(conv, **options)
    of_linears = [RLSOptimizer(linear, **options) for linear in linears]
    for optimizer in of_linears:  # random signs are seeded by a layer's place: the first in each
        assert optimizer._registry.layers[optimizer.param_groups[0]["params"][0]].index == 0

    for _ in range(3):
        x = case.input()
        target = torch.randn_like(conv(x))
        of_conv.zero_grad()
        (conv(x) - target).square().mean().backward()
        of_conv.step()
        wanted = target.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)
        for linear, optimizer, rows, goal in zip(linears, of_linears, unfolded(conv, x), wanted):
            optimizer.zero_grad()
            ((linear(rows) - goal).square().sum() / target.numel()).backward()
            if options.get("summary") == "mean" and options["rank"] > 1:
                positions = rows.shape[0] // x.shape[0]
                stage = optimizer._registry.stages[linear.weight]
                stage.summary.rows = _mean_by_image(linear, rows, positions, options["rank"])
            optimizer.step()

    P = of_conv.inverse_autocorrelation(conv)
    for k, (linear, optimizer) in enumerate(zip(linears, of_linears)):
        mine = conv.weight.chunk(conv.groups)[k].flatten(1)
        torch.testing.assert_close(mine, linear.weight, **EXACT)
        if conv.bias is not None:
            torch.testing.assert_close(conv.bias.chunk(conv.groups)[k], linear.bias, **EXACT)
        reference = optimizer.inverse_autocorrelation(linear)
        torch.testing.assert_close(P if conv.groups == 1 else P[k], reference, **EXACT)


def _mean_by_image(linear, rows, positions, rank):
    """The means of r slices, which go by images: a Linear takes each row for one."""
    image = torch.arange(rows.shape[0]) // positions
    means = torch.stack([rows[image % rank == k].mean(0) for k in range(rank)])
    ones = torch.ones(rank, 1).double()
    return (torch.cat([means, ones], 1) if linear.bias is not None else means)[None]
