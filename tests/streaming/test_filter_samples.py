"""Weights, missing values, windows and histories of RLSFilter."""

import copy

import numpy as np
import pytest

from rlscuda import RLSFilter


def series(n, T, n_out=1, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((T, n))
    return X, X @ rng.standard_normal((n, n_out)) + 0.1 * rng.standard_normal((T, n_out))


def least_squares(X, Y, weights, prior):
    """P and W of weighted ridge regression."""
    R = prior * np.eye(X.shape[1]) + (X * weights[:, None]).T @ X
    return np.linalg.inv(R), np.linalg.solve(R, (X * weights[:, None]).T @ Y).T


def assert_is(f, P, W, rtol=1e-10):
    np.testing.assert_allclose(f.P, P, atol=rtol * np.abs(P).max())
    np.testing.assert_allclose(f.W, W, atol=rtol * max(1, np.abs(W).max()))


@pytest.mark.parametrize("n", [1, 6, 40])
@pytest.mark.parametrize("forgetting", [1.0, 0.97])
def test_weights_of_a_series(n, forgetting):
    X, Y = series(n, 90, 2)
    weights = np.random.default_rng(1).random(90) * 3
    weights[::7] = 0
    f = RLSFilter(n, 2, forgetting, gain=0.5, ridge=0)
    predictions = f.run(X, Y, weights=weights)
    one = RLSFilter(n, 2, forgetting, gain=0.5, ridge=0)
    single = [one.update(x, y, weight=w) for x, y, w in zip(X, Y, weights)]
    np.testing.assert_allclose(predictions, single, atol=1e-10)
    learnt = weights > 0  # the others change nothing: they do not even age the rest
    age = np.cumsum(learnt[::-1])[::-1] - 1
    scaled = np.where(learnt, 0.5 * weights * forgetting ** np.maximum(age, 0), 0)
    assert_is(f, *least_squares(X, Y, scaled, forgetting ** learnt.sum()))
    assert f.updates == one.updates == learnt.sum()


@pytest.mark.parametrize("length", [1, 5, 30, 200])
@pytest.mark.parametrize("forgetting", [1.0, 0.98])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_window_is_regression_on_what_is_in_it(length, forgetting, dtype):
    X, Y = series(4, 120, 2)
    weights = np.random.default_rng(2).random(120) + 0.5
    f = RLSFilter(4, 2, forgetting, ridge=0, window=length, dtype=dtype)
    one = copy.copy(f)
    parts = [(0, 50), (50, 50), (50, 51), (51, 120)]
    predictions = np.concatenate([f.run(X[a:b], Y[a:b], weights=weights[a:b]) for a, b in parts])
    single = [one.update(x, y, weight=w) for x, y, w in zip(X, Y, weights)]
    tolerance = 1e-9 if dtype == np.float64 else 3e-3
    np.testing.assert_allclose(predictions, single, atol=tolerance)
    kept = np.where(np.arange(120) >= 120 - length, forgetting ** np.arange(119, -1, -1.0), 0)
    P, W = least_squares(X, Y, kept * weights, forgetting**120)
    assert_is(f, P, W, tolerance)
    assert_is(one, P, W, tolerance)
    assert (f.updates, f.resets) == (120, 0)


def test_window_follows_a_jump_that_memory_blurs():
    X, _ = series(3, 400)
    y = np.where(np.arange(400) < 200, X @ [1.0, 2, 3], X @ [-3.0, 0, 1])
    f = RLSFilter(3, window=30, initial_scale=1e3)
    f.run(X[:260], y[:260])
    np.testing.assert_allclose(f.W, [[-3, 0, 1]], atol=1e-2)


def test_missing_values_are_refused_or_skipped():
    X, Y = series(3, 20, 2)
    X[4, 1], Y[9, 0], Y[12, 1] = np.nan, np.inf, np.nan
    with pytest.raises(ValueError, match="X must be finite, got NaN or inf in sample 4"):
        RLSFilter(3, 2).run(X, Y)
    f, clean = RLSFilter(3, 2, 0.9, missing="skip"), RLSFilter(3, 2, 0.9)
    predictions = f.run(X, Y)
    known = np.isfinite(X).all(1) & np.isfinite(Y).all(1)
    wanted = clean.run(X[known], Y[known])
    np.testing.assert_allclose(predictions[known], wanted, atol=1e-12)
    assert np.isnan(predictions[4]).all() and np.isfinite(predictions[[9, 12]]).all()
    assert f.updates == clean.updates == 17
    assert_is(f, clean.P, clean.W, 1e-14)
    assert np.isnan(f.update([np.nan, 0, 0], [1.0, 1.0])).all()
    np.testing.assert_allclose(f.update(X[0], [np.nan, 1.0]), f.predict(X[0]), rtol=1e-12)
    assert f.updates == 17


def test_masks_are_honoured():
    X, Y = series(3, 20)
    y = np.ma.array(np.where(np.arange(20) == 5, 1e9, Y[:, 0]), mask=np.arange(20) == 5)
    with pytest.raises(ValueError, match="Y must be finite, got NaN or inf in sample 5"):
        RLSFilter(3).run(X, y)
    f, clean = RLSFilter(3, missing="skip"), RLSFilter(3)
    f.run(X, y)
    clean.run(np.delete(X, 5, 0), np.delete(Y, 5, 0))
    assert_is(f, clean.P, clean.W, 1e-14)


@pytest.mark.parametrize("window", [None, 10])
def test_history_is_the_weights_after_each_sample(window):
    X, Y = series(5, 40, 2)
    f, one = (RLSFilter(5, 2, 0.99, window=window) for _ in range(2))
    predictions, path = f.run(X, Y, history=True)
    assert path.shape == (40, 2, 5)
    for x, y, prediction, W in zip(X, Y, predictions, path):
        np.testing.assert_allclose(one.update(x, y), prediction, atol=1e-12)
        np.testing.assert_allclose(one.W, W, atol=1e-12)


@pytest.mark.parametrize(("n", "dtype"), [(4, np.float64), (400, np.float64), (30, np.float32)])
def test_variance_needs_no_reading_of_P(n, dtype):
    X, Y = series(n, 40)
    f = RLSFilter(n, forgetting=0.99, dtype=dtype)
    for x, y in zip(X[:21], Y[:21]):
        f.update(x, y)
    twin, points = copy.deepcopy(f), X[21:].astype(dtype)
    got = f.variance(points)
    wanted = ((points @ twin.P) * points).sum(1)
    np.testing.assert_allclose(got, wanted, rtol=1e-10 if dtype == np.float64 else 1e-4)
    assert f.variance(points[3]) == pytest.approx(got[3], rel=1e-6)
    np.testing.assert_allclose(f.P, twin.P, rtol=1e-6)


def test_numbers_of_other_kinds_are_taken_as_lists_are():
    X, Y = series(3, 10)
    whole = np.round(4 * X)
    for inputs in (
        whole.astype(int),
        whole.astype(np.float32),
        whole.astype(">f8"),
        whole.tolist(),
    ):
        f, plain = RLSFilter(3), RLSFilter(3)
        f.run(inputs, Y[:, 0])
        plain.run(whole, Y[:, 0])
        np.testing.assert_array_equal(f.W, plain.W)
        np.testing.assert_array_equal(f.update(inputs[0], np.int64(1)), plain.update(whole[0], 1))
