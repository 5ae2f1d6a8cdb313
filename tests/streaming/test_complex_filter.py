"""RLSFilter of complex signals: least squares, textbook loops, real filters turned in phase."""

import copy
import pickle

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from rlscuda import RLSFilter

TOLERANCE = {np.complex64: 2e-3, np.complex128: 1e-10}
FIELDS = list(TOLERANCE)


def draw(seed, *shape, dtype=np.complex128):
    """Circular noise of power 1."""
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((2, *shape)) / np.sqrt(2)
    return (parts[0] + 1j * parts[1]).astype(dtype)


def series(n, samples, n_out=1, dtype=np.complex128, seed=0):
    """Correlated inputs, and targets that follow them."""
    X = draw(seed, samples, n) @ (np.eye(n) + 0.3 * draw(seed + 1, n, n) / np.sqrt(n))
    Y = X @ draw(seed + 2, n, n_out) + 0.1 * draw(seed + 3, samples, n_out)
    return X.astype(dtype), Y.astype(dtype)


def assert_close(got, want, dtype=np.complex128, scale=1.0):
    size = max(1.0, np.abs(want).max()) * scale
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * size)


def assert_hermitian(f):
    np.testing.assert_array_equal(f.P, f.P.conj().T)
    assert not np.diagonal(f.P).imag.any()


def least_squares(X, Y, weights, prior, start=None):
    """W and P of the weighted ridge regression of Y on X, by its normal equations."""
    R = prior + X.T @ (weights[:, None] * X.conj())
    B = Y.T @ (weights[:, None] * X.conj())
    if start is not None:
        B = B + start @ prior
    return np.linalg.solve(R.T, B.T).T, np.linalg.inv(R)


@pytest.mark.parametrize("dtype", FIELDS)
@pytest.mark.parametrize(
    "n, n_out, forgetting",
    [(n, m, f) for n, m in ((1, 1), (2, 3), (12, 1), (13, 2)) for f in (1.0, 0.97, 0.6)]
    + [(40, 1, 0.97), (150, 13, 1.0), (150, 1, 0.99)],
)
def test_is_weighted_ridge_regression(n, n_out, forgetting, dtype):
    X, Y = series(n, 60, n_out, dtype)
    scale = np.linspace(0.5, 3, n)
    f = RLSFilter(n, n_out, forgetting, 0.7, scale, ridge=0, dtype=dtype)
    f.W = start = draw(7, n_out, n, dtype=dtype)
    counts = np.random.default_rng(5).uniform(0.2, 2, 60)
    predictions = f.run(X, Y, weights=counts)
    age = np.arange(59, -1, -1)
    W, P = least_squares(
        X.astype(complex), Y.astype(complex), 0.7 * counts * forgetting**age,
        np.diag(forgetting**60 / scale), start,
    )  # fmt: skip
    assert_close(f.W, W, dtype)
    assert_close(f.P, P, dtype)
    assert_close(predictions[0], start @ X[0], dtype)
    assert_hermitian(f)
    assert f.W.dtype == f.P.dtype == predictions.dtype == dtype
    assert (f.updates, f.resets) == (60, 0)


def equaliser(symbols=2000, taps=11, delay=7):
    """Windows of a received QPSK signal [T, taps], and the symbols that were sent [T]."""
    rng = np.random.default_rng(3)
    sent = (rng.choice([-1, 1], symbols) + 1j * rng.choice([-1, 1], symbols)) / np.sqrt(2)
    channel = np.array([0.1 - 0.3j, 1.0 + 0.2j, -0.3 + 0.4j, 0.1j])
    received = np.convolve(sent, channel)[:symbols] + 0.03 * draw(9, symbols)
    padded = np.concatenate([np.zeros(taps - 1), received])
    wanted = np.concatenate([np.zeros(delay), sent])[:symbols]
    return sliding_window_view(padded, taps)[:, ::-1], wanted


def textbook(X, d, forgetting, delta):
    """y = wᴴu, w ← w + k e*, P ← (P − k uᴴP) / λ: Haykin, Adaptive Filter Theory, table 10.1."""
    w, P = np.zeros(X.shape[1], complex), delta * np.eye(X.shape[1])
    outputs = []
    for u, wanted in zip(X, d, strict=True):
        k = P @ u / (forgetting + u.conj() @ P @ u)
        outputs.append(w.conj() @ u)
        w = w + k * np.conj(wanted - outputs[-1])
        P = (P - np.outer(k, u.conj() @ P)) / forgetting
    return np.array(outputs), w, P


@pytest.mark.parametrize("bulk", [True, False])
def test_channel_equaliser_equals_the_textbook_loop(bulk):
    X, sent = equaliser()
    f = RLSFilter(11, forgetting=0.99, initial_scale=100.0, ridge=0, dtype=np.complex128)
    outputs = f.run(X, sent) if bulk else [f.update(x, d) for x, d in zip(X, sent, strict=True)]
    wanted, w, P = textbook(X, sent, 0.99, 100.0)
    assert_close(outputs, wanted)
    assert_close(f.W[0], w.conj())  # y = W x: W is wᴴ
    assert_close(f.P, P)
    settled = outputs[200:]
    assert (np.sign(np.real(settled)) == np.sign(sent[200:].real)).all()
    assert (np.sign(np.imag(settled)) == np.sign(sent[200:].imag)).all()


@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("forgetting", [1.0, 0.99, 0.8, 0.3])
def test_real_filter_turned_in_phase(forgetting, window, bulk):
    """Inputs D x with |D_j| = 1 have the powers of x: W becomes W Dᴴ and P becomes D P Dᴴ."""
    n, samples = 20, 120
    rng = np.random.default_rng(8)
    X, Y = rng.standard_normal((samples, n)), rng.standard_normal((samples, 2))
    X[:, 15:] *= 1e-3
    D, turn = np.exp(1j * rng.uniform(0, 6, n)), np.exp(2j)
    options = {"forgetting": forgetting, "initial_scale": 5.0, "window": window}
    real, turned = RLSFilter(n, 2, **options), RLSFilter(n, 2, dtype=complex, **options)

    def learn(f, X, Y):
        return f.run(X, Y) if bulk else np.stack([f.update(x, y) for x, y in zip(X, Y)])

    predictions = learn(real, X, Y)
    assert_close(learn(turned, X * D, Y * turn), predictions * turn, scale=10)
    assert_close(turned.W, turn * real.W * D.conj(), scale=10)
    assert_close(turned.P, D[:, None] * real.P * D.conj(), scale=10)
    assert_close(turned.variance(X * D), real.variance(X), scale=10)
    assert_hermitian(turned)
    assert (turned.resets, turned.updates) == (0, samples)


@pytest.mark.parametrize("dtype", FIELDS)
def test_sample_by_sample_equals_run_and_history_shows_every_step(dtype):
    X, Y = series(24, 70, 2, dtype)
    one, bulk, path = (RLSFilter(24, 2, 0.97, dtype=dtype) for _ in range(3))
    predictions, weights = [], []
    for x, y in zip(X, Y, strict=True):
        predictions.append(one.update(x, y))
        weights.append(one.W.copy())
    assert_close(bulk.run(X, Y), predictions, dtype)
    again, shown = path.run(X, Y, history=True)
    assert_close(again, predictions, dtype)
    assert_close(shown, weights, dtype)
    assert_close(path.P, one.P, dtype)


def test_window_is_regression_on_its_samples():
    X, Y = series(5, 90, 2)
    f = RLSFilter(5, 2, initial_scale=10.0, window=25, dtype=complex)
    f.run(X[:50], Y[:50])
    for x, y in zip(X[50:], Y[50:], strict=True):
        f.update(x, y)
    W, P = least_squares(X[65:], Y[65:], np.ones(25), np.eye(5) / 10)
    assert_close(f.W, W)
    assert_close(f.P, P)


@pytest.mark.parametrize("dtype", FIELDS)
def test_narrowband_input_does_not_wind_up(dtype):
    t = np.arange(20_000)
    tone = np.exp(0.7j * t).astype(dtype)
    X, Y = sliding_window_view(tone, 8), (0.5j * tone[7:]).astype(dtype)
    f = RLSFilter(8, forgetting=0.95, dtype=dtype)
    errors = Y - f.run(X, Y)
    assert f.resets == 0 and np.abs(f.P).max() < 1e3
    assert np.abs(errors[-100:]).max() < 1e-3
    assert_hermitian(f)
    assert np.linalg.eigvalsh(f.P)[0] > 0


@pytest.mark.parametrize("dtype", FIELDS)
def test_stays_hermitian_and_positive_definite(dtype):
    f = RLSFilter(33, forgetting=0.98, initial_scale=100.0, dtype=dtype)
    X, Y = series(33, 3000, dtype=dtype)
    for part in range(0, 3000, 500):
        f.run(X[part : part + 500], Y[part : part + 500])
        assert_hermitian(f)
        assert np.linalg.eigvalsh(f.P)[0] > 0
    assert f.resets == 0


def test_variance_and_predict():
    X, Y = series(9, 50, 2)
    f = RLSFilter(9, 2, 0.98, dtype=complex)
    f.run(X, Y)
    variance = f.variance(X[:5])  # before P is brought up to date
    P = f.P
    assert variance.dtype == np.float64
    np.testing.assert_allclose(variance, np.einsum("ti,ij,tj->t", X[:5].conj(), P, X[:5]).real)
    assert isinstance(f.variance(X[0]), float)
    np.testing.assert_allclose(f.predict(X[:5]), X[:5] @ f.W.T)


def test_weight_zero_and_silence_leave_everything():
    X, Y = series(4, 10)
    f = RLSFilter(4, forgetting=0.9, dtype=complex)
    f.run(np.zeros((50, 4)), np.zeros(50))
    np.testing.assert_array_equal(f.P, np.eye(4))
    f.run(X, Y)
    P, W = f.P.copy(), f.W.copy()
    prediction = f.update(X[0], Y[0], weight=0.0)
    np.testing.assert_array_equal(f.P, P)
    np.testing.assert_array_equal(f.W, W)
    np.testing.assert_allclose(prediction, W @ X[0])


@pytest.mark.parametrize("bad", [np.nan, complex(0, np.nan), complex(1, np.inf)])
def test_missing_samples(bad):
    X, Y = series(3, 30)
    holes, gaps = X.copy(), Y[:, 0].copy()
    holes[4, 1], gaps[11] = bad, bad
    f = RLSFilter(3, dtype=complex)
    with pytest.raises(ValueError, match="X must be finite, got NaN or inf in sample 4"):
        f.run(holes, Y)
    with pytest.raises(ValueError, match="Y must be finite, got NaN or inf in sample 11"):
        f.run(X, gaps)
    with pytest.raises(ValueError, match="must be finite"):
        f.update(holes[4], 1j)
    assert f.updates == 0 and not f.W.any()
    f.missing = "skip"
    masked = np.ma.array(gaps.copy(), mask=np.arange(30) == 20)
    predictions = f.run(holes, masked)
    keep = np.delete(np.arange(30), [4, 11, 20])
    plain = RLSFilter(3, dtype=complex)
    assert_close(predictions[keep], plain.run(X[keep], Y[keep, 0]))
    assert_close(f.P, plain.P)
    assert f.updates == 27 and np.isnan(predictions[4]) and np.isfinite(predictions[11])


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))]
)
def test_copies_go_on_to_the_same_bits(clone):
    X, Y = series(30, 100, 2, np.complex64)
    f = RLSFilter(30, 2, 0.98, dtype=np.complex64)
    f.run(X[:53], Y[:53])
    twin = clone(f)
    np.testing.assert_array_equal(f.run(X[53:], Y[53:]), twin.run(X[53:], Y[53:]))
    np.testing.assert_array_equal(f.P, twin.P)
    assert repr(f) == repr(twin) and "complex64" in repr(f)
    twin.reset()
    assert not twin.W.any() and f.W.any()


def test_state_can_be_set_and_two_filters_merged():
    X, Y = series(6, 80)
    parts = [RLSFilter(6, initial_scale=4.0, dtype=complex) for _ in range(2)]
    both, merged = (RLSFilter(6, initial_scale=4.0, dtype=complex) for _ in range(2))
    parts[0].run(X[:30], Y[:30]), parts[1].run(X[30:60], Y[30:60]), both.run(X[:60], Y[:60])
    R = [np.linalg.inv(f.P) for f in parts]
    merged.P = np.linalg.inv(R[0] + R[1] - np.eye(6) / 4)
    merged.W = (parts[0].W @ R[0] + parts[1].W @ R[1]) @ merged.P
    assert_close(merged.W, both.W)
    assert_close(merged.run(X[60:], Y[60:]), both.run(X[60:], Y[60:]))
    assert_close(merged.P, both.P)
    assert_hermitian(merged)
    P = both.P.copy()
    for wrong in (P.T * [1, 1, 1, 1, 1, 1j], P.real + 1e-3j, -P):
        with pytest.raises(ValueError, match="P must be Hermitian and positive definite"):
            both.P = wrong
    np.testing.assert_array_equal(both.P, P)


def test_numbers_and_arrays_of_other_kinds():
    f, same = RLSFilter(2, dtype=complex), RLSFilter(2, dtype=complex)
    for y in (1.5 - 2j, 1.5, 2, True, np.complex64(1 - 1j), np.complex128(2j), np.float32(3)):
        assert f.update([1 + 1j, 2], y) == same.update(np.array([1 + 1j, 2]), np.array([y]))[0]
        np.testing.assert_array_equal(f.W, same.W)
    assert isinstance(f.update([1, 2], 1j), np.complex128)
    small = RLSFilter(2, dtype=np.complex64)
    assert isinstance(small.update(np.ones(2, np.complex64), np.complex64(1j)), np.complex64)
    assert f.run(np.ones((3, 2)), np.arange(3)).dtype == np.complex128
    for y in (1j, np.complex64(1j), np.array([1j])):
        with pytest.raises(TypeError, match="y must be float64 or convertible to it, got complex"):
            RLSFilter(2).update([1.0, 2.0], y)
    with pytest.raises(TypeError, match="X must be float32 or convertible to it, got complex128"):
        RLSFilter(2, dtype=np.float32).run(np.ones((3, 2)) * 1j, np.ones(3))


def views(dtype):
    base = draw(4, 40, 24, dtype=dtype)
    size = base.itemsize
    half = np.zeros(40 * 10 * size + size, np.uint8)[size // 2 :][: 400 * size]
    unaligned = np.zeros(400 * size + 1, np.uint8)[1:]
    moved = [memory.view(dtype).reshape(40, 10) for memory in (half, unaligned)]
    for values in moved:
        values[...] = base[:, :10]
    return [
        sliding_window_view(base.ravel()[:49], 10), np.asfortranarray(base[:, :10]),
        base[39::-1, 20:0:-2], np.broadcast_to(base[0, :10], (40, 10)), base.T[:10, :24].T, *moved,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", FIELDS)
def test_strided_arrays(dtype):
    for X in views(dtype):
        Y = draw(6, 2, len(X), dtype=dtype).T[::-1]
        strided, dense = (RLSFilter(10, 2, dtype=dtype) for _ in range(2))
        np.testing.assert_array_equal(strided.run(X, Y), dense.run(X.copy("C"), Y.copy("C")))
        np.testing.assert_array_equal(strided.P, dense.P)


@pytest.mark.parametrize("place", [0, 3, 20])
def test_sample_that_is_too_large_is_left_out(place):
    X, Y = series(7, 30)
    X[place] *= 1e200j
    f, plain = (RLSFilter(7, forgetting=0.99, dtype=complex) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="a sample is too large"):
        f.run(X, Y)
    keep = np.delete(np.arange(30), place)
    plain.run(X[keep], Y[keep])
    assert_close(f.W, plain.W)
    assert (f.updates, f.resets) == (29, 1)


def test_indefinite_matrix_is_repaired():
    f = RLSFilter(3, dtype=complex)
    f.P  # noqa: B018 - brings it up to date
    memory = f._core.P
    memory[...] = [[1, 2j, 0], [-2j, 1, 0], [0, 0, 1]]  # eigenvalues 3, 1 and -1
    with pytest.warns(RuntimeWarning, match="indefinite, which was repaired"):
        f.update([1, 1j, 0], 1.0)
    assert f.resets == 1 and f.updates == 1
    assert_hermitian(f)
    assert np.linalg.eigvalsh(f.P)[0] > 0
