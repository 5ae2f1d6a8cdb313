"""`RLSFilter` against padasip's `FilterRLS`, and against copy bandwidth where P leaves the cache.

padasip, the usual Python filter, learns a tenth of the series and is scaled up. The floor is the
3 n² numbers that the plain formula reads and writes a sample: the filter may be below it, since it
takes samples in blocks and reads a triangle where it can.
"""

import numpy as np
import padasip
import pytest

from benchmarks.common import shapes
from rlscuda import RLSFilter

DTYPES = {"float32": np.float32, "float64": np.float64}


def series(n, samples, dtype):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((samples, n))
    y = X @ rng.standard_normal(n) + 0.01 * rng.standard_normal(samples)
    return X.astype(dtype), y.astype(dtype)


def padasip_filter(n):
    return padasip.filters.FilterRLS(n, mu=0.999, eps=1.0, w="zeros")


@pytest.mark.parametrize("dtype", DTYPES)
def test_run(race, dtype):
    """A series of 100,000 samples of n = 64 inputs in one call."""
    n, samples, part = 64, 100_000, 0.1
    X, y = series(n, samples, DTYPES[dtype])
    options = {"forgetting": 0.999, "shrinkage": 0, "dtype": DTYPES[dtype]}
    wanted, _, _ = padasip_filter(n).run(y[:2000].astype(float), X[:2000].astype(float))
    tolerance = 1e-10 if dtype == "float64" else 1e-3
    np.testing.assert_allclose(
        RLSFilter(n, **options).run(X[:2000], y[:2000]), wanted, 0, tolerance
    )

    head = int(samples * part)
    X64, y64 = X[:head].astype(float), y[:head].astype(float)
    race(
        f"run, n = {n}, {samples:,} samples, {dtype}",
        {
            "ours": lambda: RLSFilter(n, **options).run(X, y),
            "padasip": lambda: padasip_filter(n).run(y64, X64),
        },
        targets={"ours / padasip": 0.02},
        facts={"samples": samples},
        work={"padasip": part},
        rounds=6,
        every={"padasip": 2},
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_large(race, dtype):
    """A series of 64 samples of n = 4096 inputs in one call."""
    n, samples = 4096, 64
    X, y = series(n, samples, DTYPES[dtype])
    options = {"forgetting": 0.999, "initial_scale": 1e-4, "dtype": DTYPES[dtype]}
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
    """16 samples, one a call from Python, float32: their updates of P are held back."""
    samples = 16
    X, y = series(n, samples, np.float32)
    options = {"forgetting": 0.999, "initial_scale": 1e-4, "dtype": np.float32}
    single, block = RLSFilter(n, **options), RLSFilter(n, **options)

    def learn():
        for x, target in zip(X, y, strict=True):
            single.update(x, target)

    learn()
    block.run(X, y)
    np.testing.assert_allclose(single.P, block.P, 0, 1e-8)
    race(
        f"{samples} × update, n = {n}, float32",
        {"ours": learn},
        targets={"ours / copy floor": 0.5},
        traffic=3 * n**2 * 4,
        facts={"samples": samples},
        work={shapes.FLOOR: 1 / samples},
        rounds=5,
    )


@pytest.mark.parametrize("n", [4, 64, 256])
def test_update(race, n):
    """One sample a call from Python, float64; the figures are for 500 of them."""
    X, y = series(n, 500, np.float64)
    ours, oracle = RLSFilter(n, forgetting=0.999, shrinkage=0), padasip_filter(n)

    def learn(update):
        for x, target in zip(X, y, strict=True):
            update(x, target)

    learn(ours.update)
    learn(lambda x, target: oracle.adapt(target, x))
    np.testing.assert_allclose(ours.W[0], oracle.w, atol=1e-10)
    race(
        f"500 × update, n = {n}, float64",
        {
            "ours": lambda: learn(ours.update),
            "padasip": lambda: learn(lambda x, target: oracle.adapt(target, x)),
        },
        facts={"samples": 500},
        rounds=6,
    )
