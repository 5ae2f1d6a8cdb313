"""Greedy removal, blocked and downdated, against one inverse after the other."""

import pytest
import torch
from support.pruning_data import SHAPES, Data, layer_data, others
from torch import Tensor

from rlscuda.closed_form import formulas
from rlscuda.closed_form.greedy import Consumer, greedy_path

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def naive_greedy(data: list[Data], weights: list[float], count: int) -> tuple[list[int], Tensor]:
    """One unit at a time: invert what remains, refit, score all, remove the least."""
    units = list(range(len(data[0].blocks)))
    order, costs = [], []
    current = [d.W for d in data]
    gone = [torch.empty(0, dtype=torch.int64) for _ in data]
    for _ in range(count):
        scores = torch.zeros(len(units)).double()
        for k, d in enumerate(data):
            kept = others(d.X.shape[1], gone[k])
            X = d.X[:, kept]
            P = torch.zeros(d.X.shape[1], d.X.shape[1]).double()
            P[kept[:, None], kept] = torch.linalg.inv(X.T @ X / len(X))
            for i, unit in enumerate(units):
                g = d.blocks[unit]
                W = current[k][:, g]
                scores[i] += weights[k] * torch.trace(W @ torch.linalg.inv(P[g][:, g]) @ W.T)
        i = int(scores.argmin())
        costs.append(float(scores[i]))
        order.append(units.pop(i))
        for k, d in enumerate(data):
            gone[k] = torch.cat([gone[k], d.blocks[order[-1]]])
            current[k] = d.refit(gone[k])[0]
    return order, torch.tensor(costs, dtype=torch.float64)


@pytest.mark.parametrize("window", [1, 5, 1000], ids="window_{}".format)
@shapes
def test_greedy_is_one_at_a_time(shape, window, monkeypatch):
    monkeypatch.setattr("rlscuda.closed_form.greedy._WINDOW", window)
    data = layer_data(*shape)
    path = greedy_path([Consumer(data.P, data.W, data.blocks)], shape[0])
    order, costs = naive_greedy([data], [1.0], shape[0])
    assert path.order.tolist() == order
    torch.testing.assert_close(path.cost, costs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("window", [1, 8, 1000], ids="window_{}".format)
def test_greedy_over_unequal_consumers(window, monkeypatch):
    monkeypatch.setattr("rlscuda.closed_form.greedy._WINDOW", window)
    data = [layer_data(8, 1, 6, True), layer_data(8, 4, 3, False), layer_data(8, 9, 1, True)]
    weights = [1.0, 0.3, 0.05]
    consumers = [Consumer(d.P, d.W, d.blocks, w) for d, w in zip(data, weights)]
    path = greedy_path(consumers, 6)
    order, costs = naive_greedy(data, weights, 6)
    assert path.order.tolist() == order
    torch.testing.assert_close(path.cost, costs, rtol=1e-8, atol=1e-10)
    alone = greedy_path(consumers[:1], 6)
    assert alone.order.tolist() != order  # the others do take part


def test_greedy_costs_add_up_to_the_joint_cost():
    data = layer_data(9, 3, 4, True)
    path = greedy_path([Consumer(data.P, data.W, data.blocks)], 6)
    error = data.refit(data.blocks[path.order].flatten())[1]
    assert float(path.cost.sum()) == pytest.approx(error, rel=1e-9)


def test_ties_go_to_the_lowest_index():
    P, W = torch.eye(6).double(), torch.ones(2, 6)
    blocks = torch.tensor([[5], [0], [3], [1], [2], [4]])
    path = greedy_path([Consumer(P, W, blocks)], 6)
    assert path.order.tolist() == [0, 1, 2, 3, 4, 5]
    assert path.cost.tolist() == [2.0] * 6


def test_greedy_of_none():
    path = greedy_path([Consumer(torch.eye(2), torch.ones(1, 2),
                                                 torch.tensor([[0], [1]]))], 0)  # fmt: skip
    assert path.order.shape == path.cost.shape == (0,)
    assert (path.order.dtype, path.cost.dtype) == (torch.int64, torch.float64)


def test_greedy_over_copies_of_channels():
    """Copies of one channel, undamped but for rounding: all but one go for next to nothing."""
    X = torch.randn(60, 4).double()
    X = torch.cat([X, X[:, :2], X[:, :2]], 1)
    P = formulas.damped_inverse(X.T @ X / len(X), 1e-12)
    W = torch.randn(3, 8).double()
    path = greedy_path([Consumer(P, W, torch.arange(8)[:, None])], 8)
    assert torch.isfinite(path.cost).all()
    assert path.cost[:4].max() < 1e-6 < path.cost[4:].min()
    assert sorted(unit % 4 if unit < 6 else unit - 6 for unit in path.order[4:].tolist()) == [
        0, 1, 2, 3,
    ]  # fmt: skip
