"""RLSFilter against padasip, the NumPy specification, closed forms, and its own contract."""

import copy
import pickle
import threading
import time
import tracemalloc

import numpy as np
import padasip
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from rlscuda import RLSFilter
from rlscuda.reference.filter import rls_filter

CLONES = [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))]
TOLERANCE = {np.float64: 1e-10, np.float32: 2e-4}


def series(n, T, n_out=1, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((T, n))
    Y = X @ rng.standard_normal((n, n_out)) + 0.1 * rng.standard_normal((T, n_out))
    return X.astype(dtype), Y.astype(dtype)


def snapshot(f):
    return f.P.copy(), f.W.copy(), f.updates, f.resets


def assert_unchanged(f, before):
    np.testing.assert_array_equal(f.P, before[0])
    np.testing.assert_array_equal(f.W, before[1])
    assert (f.updates, f.resets) == before[2:]


def assert_matches_reference(f, X, Y, dtype=np.float64, **options):
    P, W = f.P.copy(), f.W.copy()
    predictions = f.run(X, Y)
    epsilon = float(np.finfo(dtype).eps)
    wanted, P, W = rls_filter(P, W, X, Y, epsilon=epsilon, **options)
    for got, want in ((predictions, wanted), (f.P, P), (f.W, W)):
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * scale)
    assert f.resets == 0
    np.testing.assert_array_equal(f.P, f.P.T)


def test_hand_checked_update():
    f = RLSFilter(2, forgetting=0.5, ridge=0)
    f.update([1.0, 2.0], 3.0)
    np.testing.assert_allclose(f.P, [[18 / 11, -8 / 11], [-8 / 11, 6 / 11]], rtol=1e-15)
    np.testing.assert_allclose(f.W, [[3 / 5.5, 6 / 5.5]], rtol=1e-15)  # h = 5.5


@pytest.mark.parametrize(
    ("n", "forgetting"),
    [(n, forgetting) for n in (1, 3, 8, 17, 64) for forgetting in (1.0, 0.999, 0.9)] + [(1, 0.3)],
)
def test_equals_padasip(n, forgetting):
    X, Y = series(n, 301)
    oracle = padasip.filters.FilterRLS(n, mu=forgetting, eps=0.1, w="zeros")
    wanted, _, _ = oracle.run(Y[:, 0], X)
    f = RLSFilter(n, forgetting=forgetting, initial_scale=10.0, ridge=0)
    np.testing.assert_allclose(f.run(X, Y[:, 0]), wanted, atol=1e-10)
    np.testing.assert_allclose(f.W[0], oracle.w, atol=1e-10)
    np.testing.assert_allclose(f.P, oracle.R, atol=1e-10 * np.abs(oracle.R).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("forgetting", [1.0, 0.99, 0.6, 0.4])
@pytest.mark.parametrize(
    ("n", "n_out", "T"), [(1, 1, 5), (5, 3, 40), (16, 1, 33), (63, 2, 70), (130, 7, 50)]
)
def test_equals_the_specification(n, n_out, T, forgetting, dtype):
    X, Y = series(n, T, n_out, dtype)
    f = RLSFilter(n, n_out, forgetting, gain=0.5, initial_scale=2.0, dtype=dtype)
    assert_matches_reference(f, X, Y, dtype, forgetting=forgetting, gain=0.5)
    assert f.updates == T


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_matrix_in_several_tiles_and_threads(dtype):
    X, Y = series(1100, 40, 30, dtype)
    f = RLSFilter(1100, 30, 0.999, dtype=dtype)
    single = copy.deepcopy(f)
    assert_matches_reference(f, X, Y, dtype, forgetting=0.999)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        single.run(X, Y)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(single.P, f.P)
    np.testing.assert_array_equal(single.W, f.W)


def test_is_weighted_ridge_regression():
    X, Y = series(6, 50, 2)
    f = RLSFilter(6, 2, forgetting=0.95, gain=0.7, initial_scale=3.0, ridge=0)
    f.W = start = np.arange(12.0).reshape(2, 6)
    f.run(X, Y)
    weights = 0.7 * 0.95 ** np.arange(49, -1, -1)
    prior = 0.95**50 / 3.0 * np.eye(6)
    R = prior + X.T @ (weights[:, None] * X)
    W = np.linalg.solve(R, prior @ start.T + X.T @ (weights[:, None] * Y)).T
    np.testing.assert_allclose(f.W, W, atol=1e-10)
    np.testing.assert_allclose(f.P, np.linalg.inv(R), atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_update_sample_by_sample_equals_run(dtype):
    X, Y = series(20, 60, 2, dtype)
    one, bulk = (RLSFilter(20, 2, 0.99, dtype=dtype) for _ in range(2))
    predictions = np.stack([one.update(x, y) for x, y in zip(X, Y, strict=True)])
    np.testing.assert_allclose(bulk.run(X, Y), predictions, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(bulk.P, one.P, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(bulk.W, one.W, atol=TOLERANCE[dtype])


def test_shapes_follow_the_target():
    X, Y = series(4, 9)
    f = RLSFilter(4)
    assert f.run(X, Y).shape == (9, 1)
    assert f.run(X, Y[:, 0]).shape == (9,)
    assert f.update(X[0], Y[0]).shape == (1,)
    assert f.update(X[0], float(Y[0, 0])).shape == ()
    assert f.predict(X).shape == (9, 1)
    assert f.predict(X[0]).shape == (1,)
    assert f.predict(X[0])[0] == pytest.approx(f.W[0] @ X[0])


def test_update_returns_the_prediction_made_before_learning():
    f = RLSFilter(2)
    assert f.update([1.0, 0.0], 4.0) == 0
    assert f.update([1.0, 0.0], 4.0) == pytest.approx(2.0)


def test_empty_series_is_an_empty_result():
    f = RLSFilter(3, 2)
    before = snapshot(f)
    assert f.run(np.empty((0, 3)), np.empty((0, 2))).shape == (0, 2)
    assert_unchanged(f, before)


def views():
    base, _ = series(40, 80)
    unaligned = np.zeros(8 * 40 * 10 + 1, np.uint8)[1:].view(np.float64).reshape(40, 10)
    unaligned[...] = base[:40, :10]
    return {
        "sliding windows": sliding_window_view(base.ravel()[:49], 10),
        "columns": base[:40, 5:15],
        "Fortran order": np.asfortranarray(base[:40, :10]),
        "steps": base[::2, ::4],
        "reversed": base[39::-1, 9::-1],
        "one row repeated": np.broadcast_to(base[0, :10], (40, 10)),
        "unaligned": unaligned,
    }


@pytest.mark.parametrize("name", views())
def test_strided_arrays(name):
    X = views()[name]
    Y = series(40, 2)[0].T[::-1]
    strided, dense = RLSFilter(10, 2), RLSFilter(10, 2)
    predictions = strided.run(X, Y)
    np.testing.assert_array_equal(predictions, dense.run(X.copy("C"), Y.copy("C")))
    np.testing.assert_array_equal(strided.P, dense.P)


@pytest.mark.parametrize("order", ["C", "F"])
def test_run_copies_no_input(order):
    X, Y = series(8, 200_000)
    X = np.asarray(X, order=order)
    f = RLSFilter(8)
    tracemalloc.start()
    try:
        predictions = f.run(X, Y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < predictions.nbytes + 100_000


def test_run_releases_the_gil():
    X, Y = series(128, 100_000)
    thread = threading.Thread(target=RLSFilter(128).run, args=(X, Y))
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.002)
        ticks += 1
    assert ticks >= 5


@pytest.mark.parametrize("clone", CLONES)
def test_copies_go_on_to_the_same_bits(clone):
    X, Y = series(30, 100, 2, np.float32)
    f = RLSFilter(30, 2, 0.99, 0.5, 2.0, 0.01, dtype=np.float32)
    f.run(X[:50], Y[:50])
    twin = clone(f)
    np.testing.assert_array_equal(f.run(X[50:], Y[50:]), twin.run(X[50:], Y[50:]))
    assert_unchanged(f, snapshot(twin))
    assert repr(f) == repr(twin)
    twin.reset()
    assert twin.updates == 0 and not twin.W.any() and f.W.any()


def test_state_is_live_and_read_only():
    f = RLSFilter(3)
    P, W = f.P, f.W
    f.update([1.0, 2.0, 3.0], 1.0)
    assert np.shares_memory(P, f.P) and P[0, 0] == f.P[0, 0] != 1
    assert np.shares_memory(W, f.W) and W[0, 0] != 0
    for array in (P, W):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1.0


def test_coefficients_may_change_between_calls():
    X, Y = series(5, 20)
    f = RLSFilter(5)
    f.forgetting = 0.9
    assert_matches_reference(f, X, Y, forgetting=0.9)
    for name, value in (("forgetting", 2.0), ("gain", 0.0), ("ridge", -1.0), ("initial_scale", 0)):
        kept = getattr(f, name)
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(f, name, value)
        assert getattr(f, name) == kept
    with pytest.raises(AttributeError):
        f.forgeting = 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "n and n_out must be at least 1, got 0 and 1"),
        ({"n_out": 0}, ValueError, "n and n_out must be at least 1, got 3 and 0"),
        ({"n": 2.5}, TypeError, "integer"),
        ({"forgetting": 0.0}, ValueError, r"forgetting must be in \(0, 1\], got 0.0"),
        ({"forgetting": 1.1}, ValueError, r"forgetting must be in \(0, 1\], got 1.1"),
        ({"forgetting": float("nan")}, ValueError, r"forgetting must be in \(0, 1\], got nan"),
        ({"gain": 0.0}, ValueError, "gain must be > 0 and finite, got 0.0"),
        ({"gain": float("inf")}, ValueError, "gain must be > 0 and finite, got inf"),
        ({"initial_scale": -1.0}, ValueError, "initial_scale must be > 0 and finite, got -1.0"),
        ({"initial_scale": [1.0, 2.0]}, ValueError, r"initial_scale must be a number or \[3\]"),
        ({"ridge": -1.0}, ValueError, "ridge must be >= 0 and finite, or None, got -1.0"),
        ({"form": "lattice"}, ValueError, "form must be one of covariance"),
        ({"dtype": np.int32}, TypeError, "dtype must be one of float32, float64.*got int32"),
        ({"missing": "drop"}, ValueError, "missing must be 'raise' or 'skip', got 'drop'"),
        ({"window": 0}, ValueError, "window must be at least 1 or None, got 0"),
    ],
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        RLSFilter(**{"n": 3, **arguments})


def with_bad(array, where, value):
    array = array.copy()
    array[where] = value
    return array


X, Y = series(3, 10, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f.run(X[:, :2], Y), ValueError, r"X must be \[T, 3\], got \[10, 2\]"),
        (lambda f: f.run(X[0], Y), ValueError, r"X must be \[T, 3\], got \[3\]"),
        (lambda f: f.run(X, Y[:9]), ValueError, r"Y must be \[10, 2\] .* got \[9, 2\]"),
        (lambda f: f.run(X, Y[:, 0]), ValueError, r"Y must be \[10, 2\] .* got \[10\]"),
        (lambda f: f.run(X.astype(str), Y), TypeError, "X must be float64 or convertible to it"),
        (lambda f: f.run(X, Y + 1j), TypeError, "Y must be float64 or .*, got complex128"),
        (lambda f: f.run(X, Y, weights=[1.0]), ValueError, r"weights must be \[10\], got \[1\]"),
        (lambda f: f.run(X, Y, weights=-np.ones(10)), ValueError, "weights must be >= 0"),
        (lambda f: f.update(X[0], Y[0], weight=np.nan), ValueError, "weights must be >= 0"),
        (lambda f: f.variance(X[:, :2]), ValueError, r"x must be \[3\] or \[T, 3\]"),
        (lambda f: setattr(f, "P", np.eye(2)), ValueError, r"P must be \[3, 3\], got \[2, 2\]"),
        (lambda f: setattr(f, "P", -np.eye(3)), ValueError, "P must be symmetric and positive"),
        (lambda f: setattr(f, "P", np.tri(3)), ValueError, "P must be symmetric and positive"),
        (lambda f: f.grow(0), ValueError, "count must be at least 1, got 0"),
        (lambda f: f.merge(RLSFilter(4, 2)), ValueError, "other must have n 3 and n_out 2, got 4"),
        (
            lambda f: f.run(with_bad(X, (7, 1), np.nan), Y),
            ValueError,
            "X must be finite, got NaN or inf in sample 7",
        ),
        (
            lambda f: f.run(X, with_bad(Y, (9, 1), np.inf)),
            ValueError,
            "Y must be finite, got NaN or inf in sample 9",
        ),
        (lambda f: f.update(X[0, :2], Y[0]), ValueError, r"x must be \[3\], got \[2\]"),
        (lambda f: f.update(X[:1], Y[0]), ValueError, r"x must be \[3\], got \[1, 3\]"),
        (lambda f: f.update(X[0], 1.0), ValueError, r"y must be \[2\], got \[\]"),
        (lambda f: f.update(X[0], Y[0, :1]), ValueError, r"y must be \[2\], got \[1\]"),
        (lambda f: f.update([1.0, np.nan, 0.0], Y[0]), ValueError, "must be finite, got NaN"),
        (lambda f: f.predict(X[:, :2]), ValueError, r"x must be \[3\] or \[T, 3\], got \[10, 2\]"),
        (lambda f: f.predict(X[0] * np.nan), ValueError, "x must be finite"),
        (lambda f: setattr(f, "W", Y), ValueError, r"W must be \[2, 3\], got \[10, 2\]"),
        (lambda f: setattr(f, "W", X[:2] * np.inf), ValueError, "W must be finite"),
    ],
)
def test_wrong_arrays_raise_and_change_nothing(call, error, message):
    f = RLSFilter(3, 2)
    f.run(X, Y)
    before = snapshot(f)
    with pytest.raises(error, match=message):
        call(f)
    assert_unchanged(f, before)


# -- samples that wait for one another -------------------------------------------------------------


@pytest.mark.parametrize(("n", "dtype"), [(5, np.float32), (370, np.float64), (520, np.float32)])
@pytest.mark.parametrize("forgetting", [1.0, 0.99])
def test_calls_of_all_lengths_equal_the_specification(n, forgetting, dtype):
    X, Y = series(n, 60, 3, dtype)
    f = RLSFilter(n, 3, forgetting, 0.5, 2.0, dtype=dtype)
    start = 2 * np.eye(n), np.zeros((3, n))
    wanted, P, W = rls_filter(*start, X, Y, forgetting, 0.5, epsilon=float(np.finfo(dtype).eps))
    predictions = [f.update(x, y)[None] for x, y in zip(X[:20], Y[:20])]
    predictions += [f.run(X[20:22], Y[20:22]), f.run(X[22:54], Y[22:54])]
    predictions += [f.update(x, y)[None] for x, y in zip(X[54:], Y[54:])]
    for got, want in ((np.concatenate(predictions), wanted), (f.W, W), (f.P, P)):
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * scale)
    np.testing.assert_array_equal(f.P, f.P.T)
    assert (f.updates, f.resets) == (60, 0)


@pytest.mark.parametrize("n", [9, 370])
@pytest.mark.parametrize("clone", CLONES)
def test_copies_with_waiting_samples_go_on_to_the_same_bits(clone, n):
    X, Y = series(n, 30)
    f = RLSFilter(n, forgetting=0.99)
    for x, y in zip(X[:7], Y[:7]):
        f.update(x, y)
    twin = clone(f)
    for x, y in zip(X[7:], Y[7:]):
        assert f.update(x, y) == twin.update(x, y)
    assert_unchanged(f, snapshot(twin))


@pytest.mark.parametrize("n", [9, 370])
def test_reading_P_enters_what_waits_and_reset_drops_it(n):
    X, Y = series(n, 3)
    f = RLSFilter(n)
    before = f.P
    f.update(X[0], Y[0])
    assert np.shares_memory(before, f.P) and before[0, 0] == f.P[0, 0] != 1
    f.update(X[1], Y[1])
    f.reset()
    np.testing.assert_array_equal(f.P, np.eye(n))
