"""What may be put into a filter, what becomes of it, and what recovers it."""

import copy
import warnings

import numpy as np
import pytest

from rlscuda import RLSFilter

UNTOLD = pytest.mark.filterwarnings("ignore:RLSFilter. ")


def series(n, T, n_out=1, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((T, n))
    return X, X @ rng.standard_normal((n, n_out)) + 0.1 * rng.standard_normal((T, n_out))


def assert_same(f, g, atol=1e-10):
    np.testing.assert_allclose(f.P, g.P, atol=atol * np.abs(g.P).max())
    np.testing.assert_allclose(f.W, g.W, atol=atol)
    assert f.updates == g.updates


def test_a_known_state_may_be_put_in():
    X, Y = series(5, 60)
    f, g = RLSFilter(5, forgetting=0.99), RLSFilter(5, forgetting=0.99)
    f.run(X[:30], Y[:30])
    g.run(X[:30], Y[:30])
    g.P, g.W = f.P.copy(), f.W.copy()
    g.run(X[30:], Y[30:])
    f.run(X[30:], Y[30:])
    assert_same(f, g, 1e-12)


def test_reset_may_keep_the_weights():
    X, Y = series(5, 30)
    f = RLSFilter(5, initial_scale=[1.0, 2.0, 3.0, 4.0, 5.0])
    np.testing.assert_array_equal(f.P, np.diag([1.0, 2.0, 3.0, 4.0, 5.0]))
    f.run(X, Y)
    W = f.W.copy()
    f.reset(keep_weights=True)
    np.testing.assert_array_equal(f.P, np.diag([1.0, 2.0, 3.0, 4.0, 5.0]))
    np.testing.assert_array_equal(f.W, W)
    assert f.updates == 0
    f.reset()
    assert not f.W.any()


def test_scale_of_each_input():
    X, Y = series(3, 50)
    scales = np.array([1e6, 1.0, 1e-3])
    f = RLSFilter(3, initial_scale=scales)
    f.run(X, Y)
    R = X.T @ X + np.diag(1 / scales)
    np.testing.assert_allclose(f.W[0], np.linalg.solve(R, X.T @ Y[:, 0]), atol=1e-9)


def test_merging_is_learning_the_samples_of_both():
    X, Y = series(6, 90, 2)
    one, two, all_of_them = (RLSFilter(6, 2, initial_scale=3.0) for _ in range(3))
    one.run(X[:40], Y[:40])
    two.run(X[40:], Y[40:])
    before = two.P.copy(), two.W.copy()
    one.merge(two)
    all_of_them.run(X, Y)
    assert_same(one, all_of_them)
    np.testing.assert_array_equal(before[0], two.P)
    np.testing.assert_array_equal(before[1], two.W)


def test_merging_of_filters_that_had_a_common_past():
    X, Y = series(6, 90)
    base, all_of_them = RLSFilter(6), RLSFilter(6)
    base.run(X[:30], Y[:30])
    one, two = copy.copy(base), copy.copy(base)
    one.run(X[30:50], Y[30:50])
    two.run(X[50:], Y[50:])
    one.merge(two, base=base)
    all_of_them.run(X, Y)
    assert_same(one, all_of_them)
    with pytest.raises(ValueError, match="base must be older than other, got 60 updates more"):
        one.merge(base, base=all_of_them)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_growing_is_as_if_the_new_inputs_had_been_silent(dtype):
    X, Y = series(7, 80)
    silent = X.copy()
    silent[:30, 5:] = 0
    X, Y, silent = X.astype(dtype), Y.astype(dtype), silent.astype(dtype)
    f = RLSFilter(5, dtype=dtype, initial_scale=2.0)
    f.run(X[:30, :5], Y[:30])
    f.grow(2, initial_scale=[3.0, 4.0])
    whole = RLSFilter(7, dtype=dtype, initial_scale=[2.0] * 5 + [3.0, 4.0])
    whole.run(silent[:30], Y[:30])
    assert (f.n, f.updates) == (7, 30)
    f.run(X[30:], Y[30:])
    whole.run(X[30:], Y[30:])
    assert_same(f, whole, 1e-10 if dtype == np.float64 else 1e-4)


def test_a_window_cannot_grow():
    with pytest.raises(ValueError, match="a filter with a window cannot grow"):
        RLSFilter(3, window=5).grow(1)


# -- samples that cannot be learnt -----------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 64, 370])
@pytest.mark.parametrize("position", [0, 1, 9, 20])
def test_a_sample_that_is_too_large_is_left_out(n, position):
    X, Y = series(n, 40, 2)
    X[position] *= 1e200  # h overflows
    f, clean = RLSFilter(n, 2, 0.99), RLSFilter(n, 2, 0.99)
    with pytest.warns(RuntimeWarning, match="a sample is too large and was left out"):
        f.run(X, Y)
    keep = np.arange(40) != position
    clean.run(X[keep], Y[keep])
    assert (f.updates, f.resets) == (39, 1)
    assert_same(f, clean, 1e-12)


@UNTOLD
def test_a_sample_that_is_left_out_does_not_leave_a_window():
    X, Y = series(4, 60)
    X[20] *= 1e200
    f, clean = RLSFilter(4, window=10), RLSFilter(4, window=10)
    keep = np.arange(60) != 20
    for part in (slice(0, 25), slice(25, 60)):
        f.run(X[part], Y[part])
    clean.run(X[keep], Y[keep])
    assert f.updates == 59
    np.testing.assert_allclose(f.W, clean.W, atol=1e-9)


@UNTOLD
def test_an_error_that_overflows_leaves_the_weights_alone():
    f = RLSFilter(64, dtype=np.float32)
    f.W = np.full((1, 64), 1e37, np.float32)
    f.run(np.ones((3, 64), np.float32), np.full((3, 1), -3e38, np.float32))
    assert (f.updates, f.resets) == (0, 3)
    assert (np.float32(1e37) == f.W).all()
    np.testing.assert_array_equal(f.P, np.eye(64))


@UNTOLD
def test_windup_of_the_textbook_ends_in_resets_not_nan():
    X, Y = series(16, 20_000)
    X[:, 8:] = 0
    f = RLSFilter(16, forgetting=0.99, ridge=0, dtype=np.float32)
    predictions = f.run(X.astype(np.float32), Y.astype(np.float32))
    assert 0 < f.resets < 20
    assert f.updates == 20_000
    assert np.isfinite(predictions).all() and np.isfinite(f.W).all()


def five_lines(X, y, scale):
    """Recursive least squares as it is found in textbooks."""
    P, w = np.eye(X.shape[1], dtype=X.dtype) * X.dtype.type(scale), np.zeros(X.shape[1], X.dtype)
    for x, target in zip(X, y):
        u = P @ x
        w = w + u * ((target - w @ x) / (1 + x @ u))
        P = P - np.outer(u, u / (1 + x @ u))
    return w


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_repair_is_no_worse_than_going_on(scale):
    """Inputs of mean 1000 and deviation 1 in float32, over 10 series."""
    ours, theirs = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        X = np.column_stack([1000 + rng.standard_normal((500, 4)), np.ones(500)])
        y = X @ rng.standard_normal(5) + 0.1 * rng.standard_normal(500)
        penalty = np.eye(5) / np.sqrt(scale)
        exact = np.linalg.lstsq(np.vstack([X, penalty]), np.append(y, np.zeros(5)), rcond=None)[0]
        X4, y4 = X.astype(np.float32), y.astype(np.float32)
        f = RLSFilter(5, initial_scale=scale, dtype=np.float32)
        with pytest.warns(RuntimeWarning, match="rounding has made P indefinite") as told:
            f.run(X4, y4)
        assert len(told) == 1 <= f.resets
        assert f.updates == 500
        wrong = [
            np.sqrt(np.square(X @ (w - exact)).mean()) for w in (f.W[0], five_lines(X4, y4, scale))
        ]
        ours.append(wrong[0])
        theirs.append(wrong[1])
    assert np.median(ours) < np.median(theirs)
    assert np.median(ours) < 0.1  # the noise


def test_good_data_warn_of_nothing():
    X, Y = series(8, 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RLSFilter(8, forgetting=0.99).run(X, Y)
