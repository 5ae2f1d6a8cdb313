"""The spectral form: its direction against the specification, and what it must not depend on."""

import pytest
import torch
from support.compare import assert_close, assert_exact, differing, random_spd, snapshot
from support.training import batch, cnn, train
from torch import nn

from rlscuda import RLSOptimizer, reference
from rlscuda.optim.steps import spectral
from rlscuda.optim.steps.spectral import COEFFICIENTS, ROWS, block_rows

NETWORKS = {
    "wide": lambda: nn.Sequential(nn.Linear(9, 4)),
    "tall": lambda: nn.Sequential(nn.Linear(4, 30, bias=False)),
    "square": lambda: nn.Sequential(nn.Linear(6, 7)),
    "one row": lambda: nn.Sequential(nn.Linear(5, 1)),
    "one input": lambda: nn.Sequential(nn.Linear(1, 6, bias=False)),
    "equal ones": lambda: nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 2)),
    "equal but for a bias": lambda: nn.Sequential(
        nn.Linear(8, 4), nn.Linear(4, 9), nn.Linear(9, 4, bias=False)
    ),
    "two blocks": lambda: nn.Sequential(nn.Linear(70, 90)),
    "three blocks, not equal": lambda: nn.Sequential(nn.Linear(3, 131, bias=False)),
    "blocks of groups": lambda: nn.Sequential(nn.Conv2d(2, 2 * 67, 3, groups=2)),
    "convolutions": cnn,
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 3, 1)),
}


def inputs(model, size=8, dtype=torch.float64):
    first = model[0]
    shape = (first.in_features,) if isinstance(first, nn.Linear) else (first.in_channels, 6, 6)
    return torch.randn(size, *shape, dtype=dtype)


def matrix(parameter, bias, groups):
    """[groups, c, n] of weights, gradients or moments, a bias as the last column."""
    rows = parameter.flatten(1)
    rows = rows if bias is None else torch.cat([rows, bias[:, None]], 1)
    return rows.view(groups, -1, rows.shape[1]).detach().clone()


@pytest.mark.parametrize("at_once", [True, False], ids=["by one operator", "by libraries"])
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_are_those_of_the_specification(network, at_once, monkeypatch):
    monkeypatch.setattr(spectral, "ONE_CALL", {"cpu"} if at_once else set())  # else as on a GPU
    torch.manual_seed(3)
    model = NETWORKS[network]().double()
    optimizer = RLSOptimizer(model, form="spectral", rank=3, lr=0.3, eps=1e-3, gain=0.2,
                             weight_decay=0.05)  # fmt: skip
    covered = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    moments = dict.fromkeys(covered, 0.0)
    for step in range(4):
        optimizer.zero_grad()
        model(inputs(model)).square().mean().backward()
        before = {m: matrix(m.weight, m.bias, getattr(m, "groups", 1)) for m in covered}
        gradients = {
            m: matrix(m.weight.grad, None if m.bias is None else m.bias.grad, len(before[m]))
            for m in covered
        }
        optimizer.step()
        warm = 0.2 / max(0.2, 1 / (step + 1))  # as the gain of P is still above its last
        for m in covered:
            rows = block_rows(before[m].shape[1])
            constants = reference.SpectralStep(0.3 * warm, 0.9, 0.05, 1e-3, rows, COEFFICIENTS)
            state, now = optimizer.state[m.weight], matrix(m.weight, m.bias, len(before[m]))
            P = state["P"].view(len(now), *state["P"].shape[-2:])
            averages = []
            for g, (W, G) in enumerate(zip(before[m], gradients[m])):
                M = moments[m][g] if step else torch.zeros_like(G)
                W, M = reference.spectral_weight_step(
                    W, G, P[g], M, state["power"][g].item(), constants
                )
                averages.append(M)
                assert_exact(now[g], W, 1e-9)
            moments[m] = torch.stack(averages)
            assert_exact(state["momentum_buffer"], moments[m].flatten(0, 1))


def test_the_polynomials_are_close_to_the_inverse_root():
    """Within 3.7 % from 3 % of the norm on; below it they grow in proportion, and never beyond."""
    s = torch.logspace(-6, 0, 20_001, dtype=torch.float64)
    x = s.clone()
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    assert ((x[s >= 0.03] - 1).abs() < 0.037).all()
    small = s < 1e-3
    torch.testing.assert_close(x[small] / s[small], torch.full_like(s[small], 43.96), rtol=.01,
                               atol=0)  # fmt: skip
    assert x.max() < 1.037


def test_the_specification_is_the_polar_factor_in_the_metric_of_P():
    """It has the metric's orthonormal rows, and is N itself where N has them."""
    N, P = torch.randn(4, 7, dtype=torch.float64), random_spd(7)
    O = reference.spectral_direction(N, P)  # noqa: E741
    assert_close(O @ torch.linalg.inv(P) @ O.T, torch.eye(4, dtype=torch.float64))
    K = N @ P @ N.T
    values, vectors = torch.linalg.eigh(K)
    assert_close(O, vectors @ torch.diag(values.rsqrt()) @ vectors.T @ N @ P)
    assert_close(reference.spectral_direction(O @ torch.linalg.inv(P), P), O)


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_scale_of_the_loss_does_not_matter(factor):
    """As far as eps, which is in units of the gradient, lets it."""
    moved = []
    for scale in (1.0, factor):
        model = cnn()
        optimizer = RLSOptimizer(model, form="spectral", eps=1e-38, fallback="sgd", fallback_lr=0)
        for seed in range(3):
            optimizer.zero_grad()
            (scale * model(batch(model, seed=seed)).square().mean()).backward()
            optimizer.step()
        moved.append(model[5].weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_vanishes_moves_nothing():
    """Rounding errors have directions too: below eps they are not blown up to a step."""
    model = cnn()
    optimizer = RLSOptimizer(model, form="spectral", weight_decay=0)
    train(model, optimizer, 3)
    for p in model.parameters():
        optimizer.state[p].get("momentum_buffer", torch.zeros(1)).zero_()
    start = model[5].weight.detach().clone()
    for factor, most in ((0.0, 0.0), (1e-13, 1e-5)):
        optimizer.zero_grad()
        (factor * model(batch(model)).square().mean()).backward()
        optimizer.step()
        assert (model[5].weight - start).abs().max() <= most


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_leaves_moments_and_weights(bad):
    model = cnn()
    optimizer = RLSOptimizer(model, form="spectral", fallback="sgd", fallback_lr=0.0)
    train(model, optimizer, 3)
    optimizer.zero_grad()
    model(batch(model)).square().mean().backward()
    model[3].weight.grad[1, 0, 0, 0] = bad
    before = snapshot(model, optimizer)
    optimizer.step()
    after = snapshot(model, optimizer)
    fallback = {"state.2.momentum_buffer", "state.3.momentum_buffer"}  # of the batch norm
    changed = differing(before, after) - fallback
    assert {name.split(".")[-1] for name in changed} <= {"health", "step"}
    train(model, optimizer, 3)
    assert all(p.isfinite().all() for p in model.parameters())


def test_layers_of_one_shape_move_as_each_would_alone():
    torch.manual_seed(0)
    together = nn.ModuleList(nn.Linear(6, 5) for _ in range(4))
    alone = nn.Linear(6, 5)
    alone.load_state_dict(together[2].state_dict())
    x = torch.randn(4, 3, 8, 6)
    pair = [RLSOptimizer(m, form="spectral", summary="mean", rank=1) for m in (together, alone)]
    for step in range(3):
        for optimizer in pair:
            optimizer.zero_grad()
        sum(layer(x[i, step]).square().sum() for i, layer in enumerate(together)).backward()
        alone(x[2, step]).square().sum().backward()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(together[2].weight, alone.weight, rtol=1e-5, atol=1e-6)


def test_blocks_are_few_and_about_equal():
    for rows in range(1, 1000):
        m = block_rows(rows)
        blocks = -(-rows // ROWS)
        assert m <= ROWS
        assert 0 < rows - (blocks - 1) * m <= m


@pytest.mark.parametrize("size", [(6, 70), (70, 6)])
def test_a_momentum_of_any_size_keeps_weights_finite(size):
    """As it fades out where gradients are exactly 0, through all sizes that float32 has."""
    model = nn.Linear(*size)
    optimizer = RLSOptimizer(model, form="spectral")
    scales = torch.logspace(0, -6, size[0])
    for exponent in range(-45, 36):
        model(torch.randn(4, size[0]) * scales).sum().mul(0).backward()
        if moment := optimizer.state.get(model.weight):
            moment["momentum_buffer"].normal_().mul_(10.0**exponent)
            before = model.weight.detach().clone()
            optimizer.step()
            assert (model.weight - before).isfinite().all(), exponent
        else:
            optimizer.step()
    assert all(row.refused == row.resets == 0 for row in optimizer.health().values())
