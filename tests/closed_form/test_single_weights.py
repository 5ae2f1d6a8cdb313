"""Weights of a row removed one by one: against refits by least squares and brute force."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch
from support.compare import random_spd
from support.pruning_data import all_columns, error, inputs, inverse, with_ones

from rlscuda.closed_form import single_weights
from rlscuda.closed_form.single_weights import cheapest_prefixes, refit, removal_paths


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
    monkeypatch.setattr(single_weights, "_BLOCK", 3)  # several downdates, and columns taken out
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
    monkeypatch.setattr(single_weights, "_CHUNK_BYTES", 3 * 40 * 40 * 8)
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
