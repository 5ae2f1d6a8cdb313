"""Proximal maps are the minimisers that they claim to be, and the penalty has the right unit."""

import pytest
import torch
from support.compare import random_spd

from rlscuda.closed_form.formulas import block_saliency, compensate
from rlscuda.pruning.adaptive.penalties.proximal import (
    Metric,
    output_penalty,
    proximal_step_,
    shrink_,
    soft_threshold,
)
from rlscuda.pruning.adaptive.price import Price, marginal

DOUBLE = torch.float64


@pytest.mark.parametrize("t", [0.0, 0.3, 2.0])
def test_soft_threshold_is_the_minimiser(t):
    u = torch.randn(40, dtype=DOUBLE)
    grid = torch.linspace(-4, 4, 160_001, dtype=DOUBLE)
    values = 0.5 * (grid - u[:, None]).square() + t * grid.abs()
    found = soft_threshold(u, t)
    assert float((grid[values.argmin(1)] - found).abs().max()) <= 5e-5  # of the grid
    at = 0.5 * (found - u).square() + t * found.abs()
    assert bool((at <= values.amin(1) + 1e-8).all())
    assert bool((found[u.abs() <= t] == 0).all())


def test_without_a_price_it_is_nesterov_momentum():
    s = torch.nn.Parameter(torch.randn(9, dtype=DOUBLE))
    mine, velocity = s.detach().clone(), torch.zeros(9, dtype=DOUBLE)
    optimizer = torch.optim.SGD([s], 0.07, momentum=0.8, nesterov=True)
    for _ in range(12):
        s.grad = torch.randn(9, dtype=DOUBLE)
        proximal_step_(mine, velocity, s.grad, 0.07, 0.8, torch.zeros(9, dtype=DOUBLE))
        optimizer.step()
    torch.testing.assert_close(mine, s.detach(), rtol=0, atol=1e-12)


def test_zeros_are_exact_and_at_rest_and_may_be_left_again():
    s, velocity = torch.tensor([0.05, -0.05, 2.0]), torch.tensor([0.4, -0.4, 0.0])
    t, none = torch.full((3,), 0.2), torch.zeros(3)
    proximal_step_(s, velocity, none, 0.1, 0.9, t)
    assert s[:2].tolist() == [0.0, 0.0] and velocity[:2].tolist() == [0.0, 0.0]
    proximal_step_(s, velocity, none, 0.1, 0.9, t)
    assert s[:2].tolist() == [0.0, 0.0]
    proximal_step_(s, velocity, torch.tensor([5.0, 0.0, 0.0]), 0.1, 0.9, t)
    assert s[0] < 0 and s[1] == 0


def test_a_scale_that_must_not_be_negative_is_none():
    s, velocity = torch.tensor([0.1]), torch.zeros(1)
    proximal_step_(s, velocity, torch.tensor([50.0]), 0.1, 0.9, torch.tensor([0.01]), 0.0)
    assert s.tolist() == [0.0]


@pytest.mark.parametrize("t", [0.1, 0.8, 50.0])
def test_without_correlation_it_is_the_soft_threshold_of_a_block(t):
    W = torch.randn(5, 8, dtype=DOUBLE)
    metric, columns = Metric(torch.eye(8), W), torch.tensor([1, 4, 6])
    norm = float(W[:, columns].norm())
    left = shrink_([(metric, columns)], t)
    expected = W.clone()
    expected[:, columns] *= max(0.0, 1 - t / norm)
    torch.testing.assert_close(metric.W, expected, rtol=0, atol=1e-12)
    assert left == pytest.approx(max(0.0, norm - t))
    assert bool((metric.W[:, columns] == 0).all()) == (t >= norm)


@pytest.mark.parametrize("t", [0.2, 100.0])
def test_shrinking_minimises_the_change_of_the_outputs_plus_the_penalty(t):
    """Over all weights of two layers that take the unit, by the sizes of their outputs' errors."""
    sizes, weights = ((4, 7), (3, 5)), (0.5, 2.0)
    P = [random_spd(n) for _, n in sizes]
    W = [torch.randn(c, n, dtype=DOUBLE) for c, n in sizes]
    metrics = [Metric(*parts) for parts in zip(P, W, weights)]
    columns = [torch.tensor([0, 3]), torch.tensor([2])]

    def objective(new):
        apart = [
            scale * float(((n - w) @ torch.linalg.inv(p) * (n - w)).sum())
            for scale, n, w, p in zip(weights, new, W, P)
        ]
        own = [(Metric(p, n, s), g[None]) for p, n, s, g in zip(P, new, weights, columns)]
        return 0.5 * sum(apart) + t * float(output_penalty(own))

    shrink_(list(zip(metrics, columns)), t)
    found = [metric.W.clone() for metric in metrics]
    least = objective(found)
    for size in (1e-1, 1e-3):
        for _ in range(50):
            assert objective([w + size * torch.randn_like(w) for w in found]) >= least - 1e-9
    if t == 100:
        for p, w, g, new in zip(P, W, columns, found):
            torch.testing.assert_close(new, compensate(p, w, g), rtol=0, atol=1e-9)


def test_the_penalty_is_the_root_of_the_saliency_and_does_not_see_a_rescaling():
    P, W = random_spd(6), torch.randn(4, 6, dtype=DOUBLE)
    blocks = torch.tensor([[0, 1], [2, 3]])
    found = output_penalty([(Metric(P, W), blocks)])
    torch.testing.assert_close(found, block_saliency(P, W, blocks).sqrt())
    c = torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0, 1.0], dtype=DOUBLE)  # of what the unit puts out
    rescaled = output_penalty([(Metric(P / c / c[:, None], W / c), blocks)])
    torch.testing.assert_close(rescaled, found)


def test_what_is_left_out_of_a_metric_is_not_relied_upon():
    P, W = random_spd(6), torch.randn(4, 6, dtype=DOUBLE)
    W[:, 2:4] = 0
    metric, columns = Metric(P, W), torch.tensor([0, 1])
    metric.leave_out(torch.tensor([2, 3]))
    shrink_([(metric, columns)], 1e9)
    kept = torch.tensor([0, 1, 4, 5])
    exact = torch.linalg.inv(torch.linalg.inv(P)[kept][:, kept])
    torch.testing.assert_close(metric.W[:, kept], compensate(exact, W[:, kept], columns))
    assert bool((metric.W[:, 2:4] == 0).all())


def test_a_controlled_price_rises_while_there_is_too_much_and_ends_at_zero():
    price = Price(1e-4, 1.0, 0.5, 0, None, "cubic", 1000)
    price.control(1000)
    assert price.rho == pytest.approx(1e-4 * 2.718281828459045**0.5)
    for _ in range(100):
        price.control(990)
    assert price.rho == 0.1
    price.control(500)
    assert price.rho == 0


def test_the_marginal_price_is_the_least_that_saves_enough():
    measures = torch.tensor([3.0, 1.0, 2.0], dtype=DOUBLE)
    gains = torch.tensor([10.0, 5.0, 5.0], dtype=DOUBLE)
    assert [marginal(measures, gains, need) for need in (-1, 0, 4, 5, 6, 10, 11, 99)] == [
        0, 0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
