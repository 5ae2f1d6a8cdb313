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


@UNTOLD
@pytest.mark.parametrize("form", ["covariance", "square-root"])
@pytest.mark.parametrize("size", [1e3, 1e7, 1e12])
def test_windows_outlive_an_outlier(size, form):
    """Beside it rounding loses what stays: the window's own samples then rebuild P and W."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((400, 3))
    y = Z @ [1.0, 2.0, 3.0] + 0.1 * rng.standard_normal(400)
    Z[100] *= size
    f = RLSFilter(3, window=50, form=form)
    for part in np.split(np.arange(400), [90, 120, 151, 260]):
        f.run(Z[part], y[part])
    R = np.eye(3) + Z[-50:].T @ Z[-50:]
    np.testing.assert_allclose(f.P, np.linalg.inv(R), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(f.W[0], np.linalg.solve(R, Z[-50:].T @ y[-50:]), rtol=1e-6)
    assert f.resets < 20


@pytest.mark.parametrize("form", ["covariance", "square-root"])
def test_an_assigned_P_empties_the_window(form):
    X, Y = series(4, 60)
    f, g = RLSFilter(4, window=6, form=form), RLSFilter(4, window=6, form=form)
    f.run(X[:20], Y[:20])
    f.P, f.W = np.eye(4), np.zeros((1, 4))
    for one in (f, g):
        one.run(X[20:], Y[20:])
    assert f.resets == 0
    np.testing.assert_allclose(f.P, g.P, rtol=1e-9)
    np.testing.assert_allclose(f.W, g.W, rtol=1e-7)


def test_merging_takes_off_what_the_other_really_started_from():
    X, Y = series(3, 80)
    whole = RLSFilter(3, initial_scale=2.0)
    whole.run(X, Y)
    one, two = RLSFilter(3, initial_scale=2.0), RLSFilter(3, initial_scale=5.0)
    one.run(X[:30], Y[:30])
    two.run(X[30:], Y[30:])
    two.initial_scale = 100.0  # counts from the next reset on
    one.merge(two)
    assert_same(one, whole)
    kept = RLSFilter(3)
    kept.run(X, Y)
    kept.reset(keep_weights=True)  # knows nothing, whatever its weights are
    before = one.P.copy(), one.W.copy()
    one.merge(kept)
    np.testing.assert_allclose(one.P, before[0], rtol=1e-10)
    np.testing.assert_allclose(one.W, before[1], rtol=1e-10)
    aged = RLSFilter(3, forgetting=0.9, ridge=0)
    aged.run(X, Y)
    others = [copy.copy(one), copy.copy(one)]
    others[0].merge(aged)
    aged.forgetting = 1.0  # of samples to come
    others[1].merge(aged)
    np.testing.assert_array_equal(others[0].P, others[1].P)
    two.P = two.P.copy()
    with pytest.raises(ValueError, match="base is needed: P or W of other was assigned"):
        one.merge(two)
    with pytest.raises(ValueError, match="filters with a window cannot be merged"):
        one.merge(RLSFilter(3, window=4))
    with pytest.raises(TypeError, match="other must be a RLSFilter, got NoneType"):
        one.merge(None)


def test_merging_under_forgetting_takes_off_what_is_left_of_the_start():
    X, Y = series(3, 50)
    one, two = (RLSFilter(3, forgetting=0.95, ridge=0, initial_scale=2.0) for _ in range(2))
    one.run(X[:30], Y[:30])
    two.run(X[30:], Y[30:])
    ages = np.concatenate([np.arange(29, -1, -1.0), np.arange(19, -1, -1.0)])
    weighted = X * (0.95**ages)[:, None]
    R = 0.95**30 / 2 * np.eye(3) + weighted.T @ X
    one.merge(two)
    np.testing.assert_allclose(one.P, np.linalg.inv(R), atol=1e-10)
    np.testing.assert_allclose(one.W, np.linalg.solve(R, weighted.T @ Y).T, atol=1e-10)


def test_merging_brings_the_running_power():
    X, Y = series(3, 500)
    one, two = RLSFilter(3, forgetting=0.99), RLSFilter(3, forgetting=0.99)
    two.run(100 * X, Y)
    one.merge(two)
    for f in (one, two):
        f.run(np.zeros((5000, 3)), np.zeros(5000))
    ratio = np.diag(one.P) / np.diag(two.P)  # whose turn it was last is a factor of 2
    assert (ratio > 0.45).all() and (ratio < 2.2).all()


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("n", [7, 28, 44, 60, 100, 116, 120])
def test_raises_fill_every_row_that_waits(n, dtype):
    rng = np.random.default_rng(n)
    for forgetting in (0.9, 0.98, 0.99):
        f = RLSFilter(n, forgetting=forgetting, dtype=dtype)
        for x in rng.standard_normal((40, 2, n)):
            f.update(x[0] + 1j * x[1], 1.0)
        assert np.isfinite(f.P).all() and f.resets == 0


def test_coefficients_that_the_dtype_cannot_hold_are_refused():
    for options in ({"initial_scale": 1e-60}, {"gain": 1e-60}):
        with pytest.raises(ValueError, match="must be > 0 and finite"):
            RLSFilter(2, dtype=np.float32, **options)
    f = RLSFilter(2, initial_scale=[1.0, 2.0])
    f.initial_scale[0] = -5
    assert f.initial_scale[0] == 1.0
    with pytest.raises(ValueError, match="missing must be 'raise' or 'skip'"):
        f.missing = "Skip"
