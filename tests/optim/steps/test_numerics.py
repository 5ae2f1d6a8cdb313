"""Long float32 runs of rls_update_: finite, symmetric to the bit, positive definite, bounded."""

import pytest
import torch
from support.compare import random_spd

import rlscuda.functional as RF
from rlscuda import _C

N, CHUNK = 64, 1000
KINDS = ("white", "relu-like", "half-dead", "low-rank")


def chunk_of_rows(mixing: torch.Tensor) -> torch.Tensor:
    """[CHUNK, 4, 1, N]: the next rows of each kind."""
    X = torch.randn(CHUNK, len(KINDS), 1, N)
    X[:, 1].clamp_(min=0)
    X[:, 2, :, ::2] = 0
    X[:, 3] = X[:, 3, :, :4] @ mixing
    return X


def run(steps, twin=False, **options):
    """The matrices of all kinds after as many updates, their counters, and a float64 twin."""
    mixing = torch.randn(4, N)
    P = torch.eye(N).repeat(len(KINDS), 1, 1)
    exact, health = P.double(), torch.zeros(len(_C.health_slots)).double()
    for _ in range(steps // CHUNK):
        for rows in chunk_of_rows(mixing):
            RF.rls_update_(P, rows, health=health, **options)
            if twin:
                RF.rls_update_(exact, rows.double(), **options)
    return P, health, exact


def options_for(forgetting, gain=1.0):
    mu = min(1.0, 2 * (1 - forgetting))
    return {"forgetting": forgetting, "gain": gain, "decay": 1 - mu, "diffusion": mu}


@pytest.mark.parametrize("forgetting", [1.0, 0.999, 0.99])
def test_a_hundred_thousand_steps(forgetting):
    P, health, _ = run(100_000, **options_for(forgetting))
    assert health[:3].tolist() == [len(KINDS) * 100_000, 0, 0]
    assert torch.isfinite(P).all()
    assert torch.equal(P, P.mT)
    eigenvalues = torch.linalg.eigvalsh(P.double())
    assert eigenvalues.min() > 0
    assert eigenvalues.max() <= (1.001 if forgetting == 1 else 2.0)


@pytest.mark.parametrize("forgetting", [1.0, 0.999, 0.99])
def test_float32_tracks_float64(forgetting):
    P, _, exact = run(10_000, twin=True, **options_for(forgetting))
    error = (P - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))
    assert (error < 2e-4).all(), dict(zip(KINDS, error.tolist()))


def test_drift_needs_no_other_guard():
    """The adaptive form's fixed point delta P + P A P = I bounds every eigenvalue by 1 / delta."""
    drift, gain = 0.3, 0.01
    P, health, exact = run(
        10_000, twin=True, forgetting=1.0, gain=gain, decay=1 - gain * drift, diffusion=gain
    )
    assert health[1:3].tolist() == [0, 0]
    assert torch.isfinite(P).all() and torch.equal(P, P.mT)
    eigenvalues = torch.linalg.eigvalsh(P.double())
    assert eigenvalues.min() > 0 and eigenvalues.max() <= 1.01 / drift
    assert (P - exact).abs().max() < 1e-4 * exact.abs().max()
    dead = P[2, ::2, ::2]  # inputs that never fire drift to the cap
    torch.testing.assert_close(dead, torch.eye(N // 2) / drift, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [2, 16])
def test_higher_ranks_stay_symmetric_and_definite(rank):
    P = torch.eye(N)
    for step in range(5000):
        X = torch.randn(rank, N) * (1e3 if step % 100 == 0 else 1.0)
        RF.rls_update_(P, X.clamp(min=0), **options_for(0.99))
    assert torch.equal(P, P.T)
    eigenvalues = torch.linalg.eigvalsh(P.double())
    assert eigenvalues.min() > 0 and eigenvalues.max() <= 2.0


def test_without_a_bound_dead_inputs_wind_up_and_are_reset():
    """What a ridge or shrinkage prevents: lambda^-t overflows, and the guard ends it."""
    P, health = torch.eye(8), torch.zeros(len(_C.health_slots)).double()
    s = torch.zeros(8)
    for _ in range(10_000):
        s[:4].normal_()
        RF.rls_update_(P, s, forgetting=0.99, gain=1.0, health=health)
        if health[2] > 0:
            break
    assert health[2] == 1 and torch.equal(P, torch.eye(8))


def test_large_and_small_scales():
    for scale in (1e-18, 1e-6, 1e6, 1e18):
        P = random_spd(9, dtype=torch.float32)
        health = torch.zeros(len(_C.health_slots)).double()
        for _ in range(50):
            RF.rls_update_(P, scale * torch.randn(9), 0.99, health=health)
            assert torch.isfinite(P).all() and torch.equal(P, P.T)
        assert torch.linalg.eigvalsh(P.double()).min() > -1e-4  # rounding of entries near 1
