"""`RLSFilter` against other streaming filters, and against copy bandwidth where P leaves the cache.

The bar of one sample a call is what a reader would write: five lines of SciPy's BLAS on a triangle
of P. That of a series is the fastest packaged filter; padasip is always there, river, reservoirpy,
statsmodels and pyroomacoustics where they are installed. A slow one learns a part of the series and
is scaled up. The floor is the 3 n² numbers that the plain formula reads and writes a sample: the
filter may be below it, since it takes samples in blocks and keeps to a triangle.
"""

from functools import partial

import numpy as np
import padasip
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from scipy.linalg import blas

from benchmarks.common import shapes
from rlscuda import RLSFilter

DTYPES = {"float32": np.float32, "float64": np.float64}
RATE = 16_000  # samples a second of speech


def series(n, samples, dtype=np.float64):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((samples, n))
    y = X @ rng.standard_normal(n) + 0.01 * rng.standard_normal(samples)
    return X.astype(dtype), y.astype(dtype)


def one_by_one(update, X, y):
    for x, target in zip(X, y, strict=True):
        update(x, target)


class FiveLines:
    """Recursive least squares by symmetric BLAS calls."""

    def __init__(self, n):
        self.P, self.w = np.asfortranarray(np.eye(n)), np.zeros(n)

    def update(self, x, target):
        u = blas.dsymv(1.0, self.P, x, lower=1)
        h = 1 + x @ u
        self.w += u * ((target - self.w @ x) / h)
        self.P = blas.dsyr(-1 / h, u, a=self.P, lower=1, overwrite_a=1)


@pytest.mark.parametrize("n", [4, 16, 64, 128, 256])
def test_update(race, n):
    """One sample a call from Python, float64; the figures are for 300 of them."""
    X, y = series(n, 300)
    ours, theirs = RLSFilter(n), FiveLines(n)
    one_by_one(ours.update, X, y)
    one_by_one(theirs.update, X, y)
    np.testing.assert_allclose(ours.W[0], theirs.w, atol=1e-9)
    race(
        f"300 × update, n = {n}, float64",
        {
            "ours": partial(one_by_one, ours.update, X, y),
            "five lines of BLAS": partial(one_by_one, theirs.update, X, y),
        },
        targets={"ours / five lines of BLAS": 0.9},
        facts={"samples": 300},
        rounds=8,
    )


@pytest.mark.parametrize("call", ["run", "update"])
@pytest.mark.parametrize("n", [64, 256])
def test_square_root(race, n, call):
    """The form by a root of P against P itself: 1000 samples, in one call or one a call."""
    X, y = series(n, 1000)
    root, whole = RLSFilter(n, 1, 0.999, form="square-root"), RLSFilter(n, 1, 0.999)

    def learn(f):
        f.run(X, y) if call == "run" else one_by_one(f.update, X, y)

    learn(root), learn(whole)
    np.testing.assert_allclose(root.P, whole.P, 0, 1e-8 * np.abs(whole.P).max())
    race(
        f"1000 × {call}, n = {n}, float64, λ = 0.999",
        {"square-root": partial(learn, root), "covariance": partial(learn, whole)},
        targets={"square-root / covariance": 3},
        facts={"samples": 1000},
        rounds=6,
    )


def _padasip(n, X, y):
    return padasip.filters.FilterRLS(n, mu=1.0, eps=1.0, w="zeros").run(y, X)


def _river(n, X, y):
    from pandas import DataFrame, Series
    from river.linear_model import BayesianLinearRegression

    BayesianLinearRegression().learn_many(DataFrame(X), Series(y))


def _reservoirpy(n, X, y):
    from reservoirpy.nodes import RLS

    RLS(alpha=1.0, fit_bias=False).partial_fit(X, y[:, None])


def _statsmodels(n, X, y):
    from statsmodels.regression.recursive_ls import RecursiveLS

    RecursiveLS(y, X).filter()


def _pyroomacoustics(n, X, y):
    from pyroomacoustics.adaptive import RLS

    one_by_one(RLS(n, lmbd=1.0, delta=1.0).update, X[:, 0], y)  # of a tapped delay line


PEERS = {
    "padasip": _padasip, "river": _river, "reservoirpy": _reservoirpy,
    "statsmodels": _statsmodels, "pyroomacoustics": _pyroomacoustics,
}  # fmt: skip
PARTS = {"padasip": 0.05, "reservoirpy": 0.1, "statsmodels": 0.02, "pyroomacoustics": 0.1}


@pytest.mark.parametrize("samples", [1000, 4000])
@pytest.mark.parametrize("n", [4, 16, 64, 256])
def test_run(race, n, samples):
    """A series in one call, float64, λ = 1; river inverts once a call, and predicts nothing."""
    X, y = series(n, samples)
    wanted, _, _ = _padasip(n, X[:300], y[:300])
    np.testing.assert_allclose(RLSFilter(n).run(X[:300], y[:300]), wanted, 0, 1e-9)
    peers = {}
    for name, run in PEERS.items():
        try:
            run(n, X[: 2 * n], y[: 2 * n])
        except ImportError:
            continue
        part = slice(int(samples * PARTS.get(name, 1)))
        peers[name] = partial(run, n, X[part], y[part])
    race(
        f"run, n = {n}, {samples:,} samples, float64",
        {"ours": lambda: RLSFilter(n).run(X, y), **peers},
        targets={f"ours / {name}": 0.8 for name in peers},
        facts={"samples": samples},
        work={name: part for name, part in PARTS.items() if name in peers},
        rounds=6,
        every={name: 3 for name in peers if name != "river"},
    )


@pytest.mark.parametrize("n", [512, 1024, 2048])
def test_real_time(race, n):
    """Speech through a tapped delay line, float32: `one second` is what 16,000 samples may take."""
    samples = 512
    signal = np.random.default_rng(0).standard_normal(samples + n - 1).astype(np.float32)
    X = sliding_window_view(signal, n)
    y = X @ np.linspace(1, 0, n, dtype=np.float32)
    f = RLSFilter(n, forgetting=0.9999, dtype=np.float32)
    race(
        f"run, n = {n}, {samples} samples, float32, delay line",
        {"ours": lambda: f.run(X, y)},
        facts={"samples": samples, "seconds of speech": samples / RATE},
        rounds=5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_large(race, dtype):
    """A series of 64 samples of n = 4096 inputs in one call."""
    n, samples = 4096, 64
    X, y = series(n, samples, DTYPES[dtype])
    options = {"forgetting": 0.9999, "initial_scale": 1e-4, "dtype": DTYPES[dtype]}
    block, single = RLSFilter(n, **options), RLSFilter(n, **options)
    predictions = np.array([single.update(x, t) for x, t in zip(X[:20], y[:20], strict=True)])
    np.testing.assert_allclose(block.run(X[:20], y[:20]), predictions, 0, 1e-3)
    race(
        f"run, n = {n}, {samples} samples, {dtype}",
        {"ours": lambda: block.run(X, y)},
        traffic=3 * n**2 * np.dtype(dtype).itemsize,
        facts={"samples": samples},
        work={shapes.FLOOR: 1 / samples},
        rounds=5,
    )


@pytest.mark.parametrize("n", [1024, 4096])
def test_update_large(race, n):
    """16 samples, one a call from Python, float32: they wait for one another."""
    samples = 16
    X, y = series(n, samples, np.float32)
    options = {"forgetting": 0.9999, "initial_scale": 1e-4, "dtype": np.float32}
    single, block = RLSFilter(n, **options), RLSFilter(n, **options)
    one_by_one(single.update, X, y)
    block.run(X, y)
    np.testing.assert_allclose(single.P, block.P, 0, 1e-8)
    race(
        f"{samples} × update, n = {n}, float32",
        {"ours": partial(one_by_one, single.update, X, y)},
        targets={"ours / copy floor": 0.5},
        traffic=3 * n**2 * 4,
        facts={"samples": samples},
        work={shapes.FLOOR: 1 / samples},
        rounds=5,
    )
