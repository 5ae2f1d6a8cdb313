"""RLSFilter(form="square-root") against the covariance form, R itself, and exact least squares."""

import copy
import pickle

import numpy as np
import pytest
import torch

from rlscuda import RLSFilter
from rlscuda.reference.filter import RidgeTurn

ROOT = "square-root"
SIZES = [1, 3, 17, 64, 130, 370]


def series(n, T, n_out=1, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((T, n))
    Y = X @ rng.standard_normal((n, n_out)) + 0.1 * rng.standard_normal((T, n_out))
    return X, Y


def forms(*args, **options):
    return RLSFilter(*args, form=ROOT, **options), RLSFilter(*args, **options)


def assert_close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def updates(f, X, Y, weights=None):
    targets = Y if f.n_out > 1 else Y[:, 0]
    weights = np.ones(len(X)) if weights is None else weights
    predictions = [f.update(*sample) for sample in zip(X, targets, weights, strict=True)]
    return np.reshape(predictions, Y.shape)


def information(X, gains, scale, forgetting, ridge):
    """R after a series, by its definition."""
    n = X.shape[1]
    R, turn = np.eye(n) / scale, RidgeTurn(n)
    for x, gain in zip(X, gains, strict=True):
        if gain == 0:
            continue
        R = forgetting * R + gain * np.outer(x, x)
        for j in turn.after(forgetting, 1.0):
            R[j, j] += ridge * max(1, 1 / forgetting - 1)
    return R


@pytest.mark.parametrize("ridge", [None, 0.0, 0.3])
@pytest.mark.parametrize("forgetting", [1.0, 0.99, 0.5])
@pytest.mark.parametrize("n", SIZES)
def test_equals_the_covariance_form(n, forgetting, ridge):
    n_out = 3 if n in (3, 64, 370) else 1
    X, Y = series(n, 60, n_out, n)
    X[[0, 30]] = 0
    weights = np.random.default_rng(n).integers(0, 3, 60) * 0.7
    ours, single = (
        RLSFilter(n, n_out, forgetting, 0.5, 2.0, ridge=ridge, form=ROOT) for _ in range(2)
    )
    other = RLSFilter(n, n_out, forgetting, 0.5, 2.0, ridge=ridge)
    wanted = other.run(X, Y, weights)
    assert_close(ours.run(X, Y, weights), wanted)
    assert_close(updates(single, X, Y, weights), wanted)
    for f in (ours, single):
        assert_close(f.variance(X), other.variance(X))
        assert_close(f.P, other.P)
        assert_close(f.W, other.W)
        assert (f.updates, f.resets) == (other.updates, 0)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("forgetting", [1.0, 0.99, 0.5])
@pytest.mark.parametrize("n", SIZES)
def test_P_is_the_inverse_of_R(n, forgetting, ridge):
    X, Y = series(n, 20, 1, n)
    gains = 0.5 * np.random.default_rng(n).integers(0, 3, 20)
    f = RLSFilter(n, 1, forgetting, 0.5, 2.0, ridge=ridge, form=ROOT)
    f.run(X, Y, gains / 0.5)
    R = information(X, gains, 2.0, forgetting, ridge)
    assert_close(f.P, np.linalg.inv(R))
    np.testing.assert_array_equal(f.P, f.P.T)
    assert_close(f.variance(X), np.einsum("ti,ti->t", X, np.linalg.solve(R, X.T).T))


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
@pytest.mark.parametrize("n", [1, 3, 17])
def test_window_holds_its_samples_alone(n, forgetting):
    length, T = 25, 80
    X, Y = series(n, T, 2, n)
    f, other = forms(n, 2, forgetting, ridge=0.0, window=length, initial_scale=10.0)
    half, rest = f.run(X[:40], Y[:40]), updates(f, X[40:], Y[40:])
    assert_close(np.concatenate([half, rest]), other.run(X, Y))
    kept = forgetting ** np.arange(length - 1, -1, -1)
    R = (X[-length:].T * kept) @ X[-length:] + forgetting**T / 10 * np.eye(n)
    assert_close(f.P @ R, np.eye(n))
    assert_close(f.W.T, np.linalg.solve(R, (X[-length:].T * kept) @ Y[-length:]), 1e-8)
    assert f.resets == 0


def test_history_is_the_weights_after_each_sample():
    X, Y = series(17, 40, 2)
    f, single = RLSFilter(17, 2, 0.99, form=ROOT), RLSFilter(17, 2, 0.99, form=ROOT)
    predictions, path = f.run(X, Y, history=True)
    for t in range(40):
        assert_close(predictions[t], single.update(X[t], Y[t]), 1e-10)
        assert_close(path[t], single.W, 1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [7, 130])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_go_on_to_the_same_bits(clone, n, dtype):
    X, Y = (a.astype(dtype) for a in series(n, 60, 2))
    f = RLSFilter(n, 2, 0.97, dtype=dtype, form=ROOT)
    f.run(X[:20], Y[:20])
    updates(f, X[20:25], Y[20:25])  # which wait
    twin = clone(f)
    for g in (f, twin):
        updates(g, X[25:40], Y[25:40])
        g.run(X[40:], Y[40:])
    np.testing.assert_array_equal(f.W, twin.W)
    np.testing.assert_array_equal(f.P, twin.P)
    assert repr(f) == repr(twin)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_do_not_change_a_bit(dtype):
    X, Y = (a.astype(dtype) for a in series(700, 40))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            f = RLSFilter(700, 1, 0.9, dtype=dtype, form=ROOT)
            f.run(X[:30], Y[:30])
            updates(f, X[30:], Y[30:])
            results.append((f.W.copy(), f.P))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_P_may_be_assigned():
    rng = np.random.default_rng(5)
    A = rng.standard_normal((6, 6))
    P = A @ np.diag(np.logspace(0, -8, 6)) @ A.T
    f, other = forms(6)
    f.P = other.P = P
    assert_close(f.P, P, 1e-14)
    X, Y = series(6, 30)
    assert_close(f.run(X, Y), other.run(X, Y))
    f.reset(keep_weights=True)
    np.testing.assert_array_equal(f.P, np.eye(6))
    g = RLSFilter(3, initial_scale=[1.0, 4.0, 9.0], form=ROOT)
    assert_close(g.P, np.diag([1.0, 4.0, 9.0]), 1e-15)


@pytest.mark.parametrize("position", [0, 5, 39])
def test_sample_that_is_too_large_is_left_out(position):
    X, Y = series(20, 40, 2)
    f, other = RLSFilter(20, 2, 0.99, form=ROOT), RLSFilter(20, 2, 0.99, form=ROOT)
    keep = np.arange(40) != position
    other.run(X[keep], Y[keep])
    X[position] *= 1e200
    with pytest.warns(RuntimeWarning, match="too large"):
        f.run(X, Y)
    assert (f.updates, f.resets) == (39, 1)
    assert_close(f.W, other.W)
    assert_close(f.P, other.P)


# -- inputs of a bad condition ---------------------------------------------------------------------


def least_squares(X, y, scale):
    """Weights that minimise ‖y − X w‖² + ‖w‖² / scale, by columns of one size."""
    X = np.vstack([X.astype(float), np.eye(X.shape[1]) / scale**0.5])
    sizes = np.linalg.norm(X, axis=0)
    y = np.concatenate([y.astype(float), np.zeros(X.shape[1])])
    return np.linalg.lstsq(X / sizes, y, rcond=None)[0] / sizes


def polynomial(degree):
    def samples(rng):
        u = rng.uniform(0, 10, 500)
        return u[:, None] ** np.arange(degree + 1), np.sin(u)

    return samples


def prices(rng):
    price = 100 + rng.standard_normal(500).cumsum()
    return np.stack([1.7e9 + 60.0 * np.arange(500), price, np.ones(500)], 1), price / 2


def condition(log):
    """Inputs whose autocorrelation has the condition 10^log."""

    def samples(rng):
        U, _, V = np.linalg.svd(rng.standard_normal((500, 20)), full_matrices=False)
        X = 20 * U * np.logspace(0, -log / 2, 20) @ V
        return X, X @ rng.standard_normal(20)

    return samples


def raised(n):
    def samples(rng):
        X = 1000 + rng.standard_normal((500, n))
        return X, X @ rng.standard_normal(n)

    return samples


def excess(f, X, y, by_updates):
    """How much larger than the least one the root mean square error of a fit is."""
    if by_updates:
        updates(f, X, y[:, None])
    else:
        f.run(X, y)
    best = least_squares(X, y, f.initial_scale)
    ours, least = (
        np.mean((y - X.astype(float) @ w) ** 2) ** 0.5 for w in (f.W[0].astype(float), best)
    )
    return ours - least


@pytest.mark.parametrize("by_updates", [False, True])
@pytest.mark.parametrize(
    ("samples", "dtype", "scale", "most"),
    [
        (polynomial(5), np.float64, 1e6, 1e-10),
        (polynomial(7), np.float64, 1.0, 1e-10),
        (polynomial(7), np.float64, 1e6, 1e-10),
        (prices, np.float64, 1.0, 1e-10),
        (prices, np.float64, 1e6, 1e-10),
        (condition(12), np.float64, 1e6, 1e-10),
        (raised(4), np.float32, 1e3, 1e-4),
        (raised(4), np.float32, 1e6, 1e-3),
        (raised(32), np.float32, 1e3, 2e-3),
    ],
)
def test_badly_conditioned_inputs(samples, dtype, scale, most, by_updates):
    noise = 0.1
    X, y = samples(np.random.default_rng(7))
    y = y + noise * np.random.default_rng(8).standard_normal(len(y))
    X, y = X.astype(dtype), y.astype(dtype)
    f = RLSFilter(X.shape[1], initial_scale=scale, dtype=dtype, form=ROOT)
    assert excess(f, X, y, by_updates) < most * noise
    assert f.resets == 0
    assert (f.variance(X) >= 0).all()


@pytest.mark.filterwarnings("ignore:RLSFilter")
@pytest.mark.parametrize(
    ("samples", "dtype", "scale"),
    [(polynomial(9), np.float64, 1e3), (raised(32), np.float32, 1e3)],
)
def test_the_covariance_form_fails_where_the_root_does_not(samples, dtype, scale):
    X, y = (a.astype(dtype) for a in samples(np.random.default_rng(7)))
    y += dtype(0.1) * np.random.default_rng(8).standard_normal(len(y)).astype(dtype)
    root, other = forms(X.shape[1], initial_scale=scale, dtype=dtype)
    assert excess(root, X, y, False) < 1e-3 * excess(other, X, y, False)
    assert root.resets == 0 < other.resets


@pytest.mark.parametrize("forgetting", [1.0, 0.999])
def test_a_million_samples_of_float32(forgetting):
    rng = np.random.default_rng(3)
    n, T = 4, 1_000_000
    X = (30 + rng.standard_normal((T, n))).astype(np.float32)
    y = (X @ rng.standard_normal(n) + 0.1 * rng.standard_normal(T)).astype(np.float32)
    f = RLSFilter(n, 1, forgetting, initial_scale=1e3, dtype=np.float32, form=ROOT)
    exact = RLSFilter(n, 1, forgetting, initial_scale=1e3, form=ROOT)
    f.run(X, y), exact.run(X, y)
    assert f.resets == exact.resets == 0
    deviation = np.sqrt(0.01 * np.diag(exact.P))  # of the weights, by the noise
    assert (np.abs(f.W - exact.W)[0] < 5 * deviation).all()
    assert_close(f.P, exact.P, 0.05)


def test_silence_and_one_tone_neither_overflow_nor_reset():
    t = np.arange(20_000)
    X = np.stack([np.sin(0.1 * t + p) for p in range(16)], 1).astype(np.float32)
    X[10_000:] = 0
    f = RLSFilter(16, 1, 0.99, dtype=np.float32, form=ROOT)
    f.run(X, X[:, 0])
    assert f.resets == 0 and np.isfinite(f.P).all() and np.isfinite(f.W).all()
    assert np.linalg.eigvalsh(f.P.astype(float))[0] > 0
