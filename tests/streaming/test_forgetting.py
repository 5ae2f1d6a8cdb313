"""Forgetting, on the defaults: the textbook's noise floor, units, wind-up, and the explicit R."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from rlscuda import RLSFilter
from rlscuda.reference.filter import RidgeTurn, raises

# excess error over noise of the default before this one, which pulled P towards its start
FORMER = {
    (4, 0.9): 0.742, (4, 0.99): 0.273, (4, 0.999): 0.0840, (4, 0.9999): 0.0289,
    (64, 0.9): 1.184, (64, 0.99): 1.525, (64, 0.999): 1.071, (64, 0.9999): 0.435,
    (256, 0.9): 1.851, (256, 0.99): 1.384, (256, 0.999): 1.624, (256, 0.9999): 1.234,
}  # fmt: skip


def excess(n, forgetting, scale=1.0, seed=0, **options):
    """The excess error over the noise, of white inputs, once the filter has settled."""
    rng = np.random.default_rng(seed)
    samples = int(max(6 / (1 - forgetting), 3000, 30 * n))
    X, true = rng.standard_normal((samples, n)), rng.standard_normal(n)
    clean = X @ true
    f = RLSFilter(n, forgetting=forgetting, **options)
    wrong = f.run(scale * X, clean + 0.1 * rng.standard_normal(samples)) - clean
    assert f.resets == 0
    return np.square(wrong[samples // 2 :]).mean() / 0.01


@pytest.mark.parametrize(("n", "forgetting"), FORMER)
def test_noise_floor(n, forgetting):
    ours = excess(n, forgetting)
    assert ours < FORMER[n, forgetting]
    if n * (1 - forgetting) < 0.5:
        assert ours == pytest.approx(excess(n, forgetting, ridge=0), rel=0.05)


@pytest.mark.filterwarnings("ignore:RLSFilter. rounding has made P indefinite")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_units_of_the_input_do_not_matter(dtype):
    rng = np.random.default_rng(1)
    X = rng.standard_normal((30_000, 16))
    y = X @ rng.standard_normal(16) + 0.1 * rng.standard_normal(30_000)
    X, y = X.astype(dtype), y.astype(dtype)
    predictions = {}
    for scale in (1e-3, 1.0, 1e3):
        f = RLSFilter(16, forgetting=0.999, dtype=dtype)
        predictions[scale] = f.run(dtype(scale) * X, y)[-5000:]
    rms = np.sqrt(np.square(predictions[1.0]).mean())
    for scale in (1e-3, 1e3):
        assert np.abs(predictions[scale] - predictions[1.0]).max() < 0.01 * rms


def test_units_of_one_input_do_not_matter():
    rng = np.random.default_rng(2)
    X = rng.standard_normal((20_000, 4))
    y = X @ rng.standard_normal(4) + 0.1 * rng.standard_normal(20_000)
    plain = RLSFilter(4, forgetting=0.999).run(X, y)[-5000:]
    mixed = RLSFilter(4, forgetting=0.999).run(X * [1, 1e3, 1e-2, 30], y)[-5000:]
    assert np.abs(mixed - plain).max() < 0.01 * np.abs(plain).max()


def explicit(X, Y, forgetting, gain, ridge, initial_scale, h):
    """R and W from R alone, with the leverage of each sample taken from `h`."""
    n = X.shape[1]
    R, W = np.eye(n) / initial_scale, np.zeros((Y.shape[1], n))
    turn, squares = RidgeTurn(n), np.zeros(n)
    for t, (x, y) in enumerate(zip(X, Y)):
        R = forgetting * R + gain * np.outer(x, x)
        W += gain * np.outer(y - W @ x, np.linalg.solve(R, x))
        squares += gain * x * x
        eps = float(np.finfo(np.float64).eps)
        for j in turn.after(forgetting, h[t]):
            R[j, j] += raises(squares / (t + 1), forgetting, turn.leverage, eps, ridge)[j]
    return R, W


@pytest.mark.parametrize("ridge", [None, 0.3])
@pytest.mark.parametrize("forgetting", [0.999, 0.95, 0.4])
@pytest.mark.parametrize(("n", "n_out"), [(1, 1), (7, 2), (40, 1)])
def test_is_the_explicit_R(n, n_out, forgetting, ridge):
    rng = np.random.default_rng(3)
    X, Y = rng.standard_normal((150, n)), rng.standard_normal((150, n_out))
    f = RLSFilter(n, n_out, forgetting, 0.7, 2.0, ridge)
    h = []
    for x, y in zip(X, Y):
        h.append(forgetting + 0.7 * f.variance(x))
        f.update(x, y)
    R, W = explicit(X, Y, forgetting, 0.7, ridge, 2.0, h)
    np.testing.assert_allclose(f.P, np.linalg.inv(R), atol=1e-10 * np.abs(f.P).max())
    np.testing.assert_allclose(f.W, W, atol=1e-9 * np.abs(W).max())


def hard(kind, samples, n, rng):
    X = rng.standard_normal((samples, n))
    if kind == "dead":
        X[100:] = 0
    elif kind == "never":
        X[:] = 0
    elif kind == "border":
        X[:, ::2] = 0
    elif kind == "narrow-band":
        X = np.sin(0.3 * np.arange(samples)[:, None] + 0.3 * np.arange(n))
    elif kind == "low-rank":
        X = X[:, :2] @ rng.standard_normal((2, n))
    elif kind == "bursts":
        X[(np.arange(samples) // 5000) % 2 == 1] = 0
    return X


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("forgetting", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("kind", ["dead", "never", "border", "narrow-band", "low-rank", "bursts"])
def test_windup_is_bounded(kind, forgetting, dtype):
    n, samples = 8, 50_000  # a million samples of each: benchmarks/streaming/filter_windup.py
    rng = np.random.default_rng(4)
    X = hard(kind, samples, n, rng).astype(dtype)
    y = (X @ rng.standard_normal(n)).astype(dtype)
    f = RLSFilter(n, forgetting=forgetting, dtype=dtype)
    predictions = f.run(X, y)
    powers = np.square(X.astype(np.float64)).mean(0)
    least = np.maximum(powers, np.sqrt(np.finfo(dtype).eps) * powers.mean()).min()
    eigenvalues = np.linalg.eigvalsh(f.P.astype(np.float64))
    assert f.resets == 0
    assert np.isfinite(predictions).all() and np.isfinite(f.W).all()
    assert eigenvalues[0] > 0
    assert eigenvalues[-1] <= (1.01 / (1e-2 * least) if least else 1.0)
    if kind not in ("dead", "never"):
        assert np.abs(predictions - y)[-100:].max() < 1e-2 * max(np.abs(y).max(), 1e-3)


def test_no_forgetting_needs_no_ridge():
    X = np.random.default_rng(5).standard_normal((100, 6))
    results = [RLSFilter(6, ridge=ridge).run(X, X[:, 0]) for ridge in (None, 0.0, 5.0)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def speech(samples, rng):
    """Coloured noise that swells and fades, of unit power."""
    noise = rng.standard_normal(samples) * np.abs(np.sin(np.arange(samples) * np.pi / 2000))
    impulse = np.zeros(200)
    impulse[0] = 1
    for t in range(2, 200):
        impulse[t] = 1.6 * impulse[t - 1] - 0.8 * impulse[t - 2] + (t == 0)
    signal = np.convolve(noise, impulse)[:samples]
    return signal / signal.std()


@pytest.mark.parametrize("rms", [0.005, 0.05, 0.5])
def test_echo_canceller_is_the_textbooks(rms):
    rng = np.random.default_rng(6)
    n, samples = 256, 16_000
    far = np.concatenate([np.zeros(n - 1), rms * speech(samples, rng)])
    X = sliding_window_view(far, n)[:, ::-1]
    echo = X @ (rng.standard_normal(n) * np.exp(-np.arange(n) / 40))
    y = echo + 10 ** (-50 / 20) * echo.std() * rng.standard_normal(samples)
    loss = {}
    for ridge in (None, 0.0):
        left = echo - RLSFilter(n, forgetting=0.999, initial_scale=1e4, ridge=ridge).run(X, y)
        last = slice(3 * samples // 4, None)
        loss[ridge] = 10 * np.log10(np.square(echo[last]).mean() / np.square(left[last]).mean())
    assert loss[None] > loss[0.0] - 1
    assert loss[None] > 40


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_force_learning(seed):
    """A chaotic network of 300 neurons whose read-out is fed back learns two sines."""
    rng = np.random.default_rng(seed)
    n, samples, dt = 300, 10_000, 0.1
    J = rng.standard_normal((n, n)) * (rng.random((n, n)) < 0.1) * 1.3 / np.sqrt(0.1 * n)
    back = 2 * rng.random(n) - 1
    time = np.arange(samples + 1000) * dt
    target = np.sin(2 * np.pi * time / 30) + 0.5 * np.sin(4 * np.pi * time / 30)
    target *= 0.375 / target.std()
    f = RLSFilter(n, forgetting=0.999)
    state, z, wrong = 0.5 * rng.standard_normal(n), 0.0, []
    for t, wanted in enumerate(target):
        state += dt * (-state + J @ np.tanh(state) + back * z)
        rates = np.tanh(state)
        if t < samples:
            f.update(rates, wanted)
        z = float(f.W[0] @ rates)
        wrong.append(z - wanted)
    assert np.sqrt(np.square(wrong[samples:]).mean()) < 0.03
