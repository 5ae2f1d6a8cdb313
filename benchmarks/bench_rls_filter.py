"""RLSFilter.run against padasip's FilterRLS, and against copy bandwidth where P leaves the cache.

Run with `pytest benchmarks/bench_rls_filter.py`. Each benchmark first asserts that the filter is
right; what it reports in `extra_info` are ratios of times taken in the same run.
"""

import time

import numpy as np
import padasip
import pytest
import torch

from rlscuda import RLSFilter

DTYPES = [np.float32, np.float64]


def series(n, samples, dtype):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((samples, n))
    y = X @ rng.standard_normal(n) + 0.01 * rng.standard_normal(samples)
    return X.astype(dtype), y.astype(dtype)


def seconds(call, repeats):
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def padasip_filter(n):
    return padasip.filters.FilterRLS(n, mu=0.999, eps=1.0, w="zeros")


@pytest.fixture(scope="module")
def padasip_seconds():
    """Seconds a sample of padasip at n = 64, float64, the faster of two runs of 10k samples."""
    X, y = series(64, 10_000, np.float64)
    return seconds(lambda: padasip_filter(64).run(y, X), 2) / len(X)


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_against_padasip(benchmark, padasip_seconds, dtype):
    """Inputs n = 64, 100k samples: at most 0.02 of padasip's time."""
    X, y = series(64, 100_000, dtype)
    options = {"forgetting": 0.999, "shrinkage": 0, "dtype": dtype}
    wanted, _, _ = padasip_filter(64).run(y[:2000].astype(float), X[:2000].astype(float))
    tolerance = 1e-10 if dtype == np.float64 else 1e-3
    np.testing.assert_allclose(
        RLSFilter(64, **options).run(X[:2000], y[:2000]), wanted, 0, tolerance
    )

    benchmark.pedantic(
        lambda f: f.run(X, y), setup=lambda: ((RLSFilter(64, **options),), {}), rounds=5
    )
    ours = benchmark.stats.stats.min / len(X)
    benchmark.extra_info["microseconds a sample"] = ours * 1e6
    benchmark.extra_info["padasip microseconds a sample"] = padasip_seconds * 1e6
    benchmark.extra_info["time / padasip"] = ours / padasip_seconds
    assert ours <= 0.02 * padasip_seconds


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_against_copy_bandwidth(benchmark, dtype):
    """Inputs n = 4096: the time a sample over that of the 3 n² numbers the plain formula moves."""
    n, samples = 4096, 64
    X, y = series(n, samples, dtype)
    options = {"forgetting": 0.999, "initial_scale": 1e-4, "dtype": dtype}
    block, single = RLSFilter(n, **options), RLSFilter(n, **options)
    predictions = np.array([single.update(x, t) for x, t in zip(X[:20], y[:20], strict=True)])
    np.testing.assert_allclose(block.run(X[:20], y[:20]), predictions, 0, 1e-3)

    P = torch.from_numpy(np.eye(n, dtype=dtype))
    target = torch.empty_like(P)
    copy_bandwidth = 2 * P.nbytes / seconds(lambda: target.copy_(P), 10)

    benchmark.pedantic(lambda: block.run(X, y), rounds=5, warmup_rounds=1)
    ours = benchmark.stats.stats.min / samples
    benchmark.extra_info["milliseconds a sample"] = ours * 1e3
    benchmark.extra_info["copy GB/s"] = copy_bandwidth / 1e9
    benchmark.extra_info["time / (3 n² numbers at copy bandwidth)"] = (
        ours * copy_bandwidth / (3 * P.nbytes)
    )


@pytest.mark.parametrize("n", [4, 64, 256])
def test_update_against_padasip_adapt(benchmark, n):
    """One sample a call from Python, float64."""
    X, y = series(n, 500, np.float64)
    filter_, oracle = RLSFilter(n, forgetting=0.999, shrinkage=0), padasip_filter(n)

    def learn(update):
        for x, target in zip(X, y, strict=True):
            update(x, target)

    learn(filter_.update)
    learn(lambda x, target: oracle.adapt(target, x))
    np.testing.assert_allclose(filter_.W[0], oracle.w, atol=1e-10)

    padasip_seconds = seconds(lambda: learn(lambda x, target: oracle.adapt(target, x)), 3)
    benchmark.pedantic(lambda: learn(filter_.update), rounds=5)
    ours = benchmark.stats.stats.min
    benchmark.extra_info["microseconds a sample"] = ours / len(X) * 1e6
    benchmark.extra_info["time / padasip"] = ours / padasip_seconds
