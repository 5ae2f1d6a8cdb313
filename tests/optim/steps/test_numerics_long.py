"""1e5 float32 steps: P stays finite, symmetric to the bit, positive definite and bounded."""

import functools

import numpy as np
import pytest

from rlscuda import RLSFilter

N, STEPS = 64, 100_000


@functools.cache
def inputs(kind):
    rng = np.random.default_rng(1)
    X = rng.standard_normal((STEPS, N), np.float32)
    if kind == "relu":
        np.maximum(X, 0, out=X)
    elif kind == "half-dead":
        X[:, ::2] = 0
    elif kind == "low-rank":
        X = X[:, :4] @ rng.standard_normal((4, N), np.float32)
    return X


def run(kind, dtype, **options):
    X = inputs(kind).astype(dtype)
    true = np.random.default_rng(2).standard_normal((1, N)).astype(dtype)
    f = RLSFilter(N, dtype=dtype, **options)
    f.run(X, X @ true.T)
    return f, X, true


@pytest.mark.parametrize("kind", ["white", "relu", "half-dead", "low-rank"])
@pytest.mark.parametrize("forgetting", [1.0, 0.999, 0.99])
def test_float32_stays_healthy(kind, forgetting):
    f, X, true = run(kind, np.float32, forgetting=forgetting)
    assert (f.updates, f.resets) == (STEPS, 0)
    assert np.isfinite(f.P).all() and np.isfinite(f.W).all()
    np.testing.assert_array_equal(f.P, f.P.T)
    eigenvalues = np.linalg.eigvalsh(f.P.astype(np.float64))
    assert eigenvalues[0] > 0
    powers = np.square(X.astype(np.float64)).mean(0)
    least = np.maximum(powers, np.sqrt(np.finfo(np.float32).eps) * powers.mean()).min()
    assert eigenvalues[-1] <= (1.001 if forgetting == 1 else 1.01 / (1e-2 * least))
    twin, _, _ = run(kind, np.float64, forgetting=forgetting)
    if kind in ("white", "relu") or forgetting == 1:  # else the ridge of a dtype is in P itself
        np.testing.assert_allclose(f.P, twin.P, rtol=0, atol=1e-3)
    np.testing.assert_allclose(X[-1] @ f.W[0], X[-1] @ twin.W[0], atol=1e-2)


@pytest.mark.parametrize("forgetting", [0.999, 0.99])
def test_excited_inputs_need_no_ridge(forgetting):
    f, X, true = run("white", np.float32, forgetting=forgetting, ridge=0)
    assert f.resets == 0
    np.testing.assert_array_equal(f.P, f.P.T)
    assert np.linalg.eigvalsh(f.P.astype(np.float64))[0] > 0
    np.testing.assert_allclose(f.W, true, atol=1e-4)
