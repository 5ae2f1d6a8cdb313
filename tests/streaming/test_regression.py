"""What RLSRegressor computes, against closed forms: intercept, weights, forgetting, deviations."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from rlscuda import RLSRegressor
from rlscuda.streaming.regression.centring import Means, longest

STD = {"tame": [1, 2, 0.5, 1], "unix time": [1, 10, 0.1, 1e5]}


@pytest.fixture
def rng():
    return np.random.default_rng()


def problem(rng, mean=0.0, columns="tame", samples=300):
    """Inputs with means of 0, 10³ and 10⁹, two prices and a constant, and a target."""
    X = rng.standard_normal((samples, 4)) * STD[columns] + [1e3, -5, 250, 1.7e9]
    y = (X - X.mean(0)) @ (rng.standard_normal(4) / STD[columns]) + mean
    return np.hstack([X, np.full((samples, 1), 0.1)]), y + 0.3 * rng.standard_normal(samples)


def closed_form(X, Y, weights, penalty):
    """Weighted ridge regression with a free intercept, in long double as far as it cancels."""
    X, Y, weights = (np.asarray(a, np.longdouble) for a in (X, Y, weights))
    x, y = (weights @ a / weights.sum() for a in (X, Y))
    scatter = ((X - x).T * weights) @ (X - x)
    moment = ((X - x).T * weights) @ (Y - y)
    root = np.sqrt(np.diag(scatter) + penalty).astype(float)
    R = (scatter + penalty * np.eye(len(root))).astype(float) / np.outer(root, root)
    W = np.linalg.solve(R, (moment.T / root).T.astype(float)).T / root
    return W, (y - W @ x).astype(float)


def in_chunks(model, X, y, weights, rng):
    cuts = np.sort(rng.integers(2, len(X), 9))
    for rows in np.split(np.arange(len(X)), cuts):
        model.partial_fit(X[rows], y[rows], weights[rows]) if len(rows) else None
    return model


@pytest.mark.parametrize("columns", list(STD))
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_is_ridge(rng, columns, mean, scale):
    X, y = problem(rng, mean, columns)
    for target in (y, np.stack([y, 2 * y[::-1]], 1)):
        model = RLSRegressor(gain=2.0, initial_scale=scale / 2).fit(X, target)
        ridge = Ridge(alpha=1 / scale, solver="svd").fit(X, target)
        for ours, theirs in ((model.coef_, ridge.coef_), (model.intercept_, ridge.intercept_)):
            assert ours.shape == np.shape(theirs)
            np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-8 * np.abs(theirs).max())
        np.testing.assert_allclose(
            model.predict(X), ridge.predict(X), atol=1e-5
        )  # sklearn's rounding
        assert model.score(X, target) == pytest.approx(ridge.score(X, target), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"fit_intercept": False}])
def test_defaults_are_ridge_in_either_form(rng, options):
    X, y = rng.standard_normal((50, 3)) + 2, rng.standard_normal(50) + 1000
    ridge = Ridge(**options).fit(X, y)
    for model in (RLSRegressor(**options), RLSRegressor(form="covariance", **options)):
        model.fit(X, y)
        np.testing.assert_allclose(model.coef_, ridge.coef_, rtol=1e-9)
        assert model.intercept_ == pytest.approx(ridge.intercept_, rel=1e-10, abs=0)


@pytest.mark.parametrize("forgetting", [1.0, 0.97])
@pytest.mark.parametrize("intercept", [True, False])
def test_minimises_what_it_says_however_it_is_cut(rng, forgetting, intercept):
    X, y = problem(rng, 1e4, samples=600)
    X, Y = X[:, :3] + [0, 0, 1e6], np.stack([y, y**2 / 1e4], 1)
    if not intercept:
        X = X - X.mean(0)
    weights = rng.uniform(0.1, 3, 600) * (rng.random(600) > 0.2)
    options = {
        "forgetting": forgetting,
        "initial_scale": 7.0,
        "fit_intercept": intercept,
        "ridge": 0,
    }
    for first, stop in ((0, 9), (0, 600), (0.5, 9), (0.5, 600)):
        weights[:2] = first, 1.0
        x, Z, w = X[:stop], Y[:stop], weights[:stop]
        ages = np.cumsum((w > 0)[::-1])[::-1] - 1
        effective = np.longdouble(forgetting) ** ages * w
        penalty = forgetting ** (np.count_nonzero(w) - intercept) / 7
        if intercept:
            W, b = closed_form(x, Z, effective, penalty)
        else:
            scaled = (x.T * effective).astype(float)
            W, b = np.linalg.solve(scaled @ x + penalty * np.eye(3), scaled @ Z).T, np.zeros(2)
        whole = RLSRegressor(**options).fit(x, Z, w)
        parts = in_chunks(RLSRegressor(**options), x, Z, w, rng)
        for model in (whole, parts):
            np.testing.assert_allclose(model.coef_, W, rtol=1e-8, atol=1e-8 * np.abs(W).max())
            np.testing.assert_allclose(model.intercept_, b, rtol=1e-8)
        pairs = zip(parts.predict(x, return_std=True), whole.predict(x, return_std=True))
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=1e-7)


@pytest.mark.parametrize("forgetting", [1.0, 0.97, 0.3, 1e-3, 1e-300])
def test_means_and_scatter_are_those_of_the_weighted_rows(rng, forgetting):
    Z = rng.standard_normal((700, 3)) * [1, 1e-3, 1e5] + [1e9, 0, -1.7e9]
    weights, gain = rng.uniform(0.1, 3, 700), 1.5
    means, scatter, start = Means.none(3), np.zeros((3, 3)), 0
    while start < len(Z):
        stop = start + min(int(rng.integers(1, 400)), longest(forgetting))
        part = slice(start, stop)
        means, rows, counts = means.after(Z[part], weights[part], forgetting, gain)
        for row, count in zip(rows, counts):
            scatter = forgetting * scatter + gain * count * np.outer(row, row)
        start = stop
    effective = gain * np.longdouble(forgetting) ** np.arange(699, -1, -1) * weights
    away = np.asarray(Z, np.longdouble) - Z[-1]
    away -= effective @ away / effective.sum()
    exact = (away.T * effective) @ away
    assert means.mass == pytest.approx(float(effective.sum()), rel=1e-12)
    assert (np.abs(means.relative(Z) - away) <= 1e-13 * Z.std(0)).all()
    sizes = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(scatter - exact) <= 1e-11 * sizes).all()
    assert means.squares == pytest.approx(float(effective**2 @ (1 / weights)), rel=1e-12)


def ordinary(X, y, weights, new):
    """The standard deviation of a new target by ordinary least squares with repeated rows."""
    D = np.hstack([X, np.ones((len(X), 1))])
    D, y = np.repeat(D, weights, axis=0), np.repeat(y, weights, axis=0)
    Q, R = np.linalg.qr(D)
    W = np.linalg.solve(R, Q.T @ y)
    variance = np.sum((y - D @ W) ** 2, axis=0) / (len(D) - D.shape[1])
    leverage = np.sum(np.linalg.solve(R.T, np.hstack([new, np.ones((len(new), 1))]).T) ** 2, 0)
    return np.sqrt(np.multiply.outer(1 + leverage, variance))


@pytest.mark.parametrize("gain", [1.0, 0.2])
def test_deviation_is_that_of_ordinary_least_squares(rng, gain):
    X, new = rng.standard_normal((2, 40, 4))
    y = X @ rng.standard_normal((4, 2)) + [1e3, 2] + rng.standard_normal((40, 2)) * [1, 30]
    weights = rng.integers(0, 4, 40)
    model = RLSRegressor(initial_scale=1e9, gain=gain).fit(X, y, weights)
    mean, deviation = model.predict(new, return_std=True)
    np.testing.assert_array_equal(mean, model.predict(new))
    np.testing.assert_allclose(deviation, ordinary(X, y, weights, new), rtol=1e-6)
    flat = RLSRegressor(initial_scale=1e9, gain=gain).fit(X, y[:, 1], weights)
    np.testing.assert_allclose(flat.predict(new, return_std=True)[1], deviation[:, 1], rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"forgetting": 0.98}, {"fit_intercept": False}])
def test_deviation_is_calibrated(rng, options):
    """A priori, sample by sample: the errors in units of their deviations have variance 1."""
    W, errors = rng.standard_normal(5), []
    X = rng.standard_normal((3000, 5))
    y = X @ W + rng.standard_normal(3000)
    model = RLSRegressor(initial_scale=10.0, **options).fit(X[:100], y[:100])
    for start in range(100, 3000, 10):
        rows = slice(start, start + 10)
        mean, deviation = model.predict(X[rows], return_std=True)
        errors.extend((y[rows] - mean) / deviation)
        model.partial_fit(X[rows], y[rows])
    assert np.mean(np.square(errors)) == pytest.approx(1, abs=0.15)


def test_deviation_where_little_is_known(rng):
    X, y = rng.standard_normal((30, 8)), rng.standard_normal(30)
    model = RLSRegressor().partial_fit(X[:1], y[:1])
    np.testing.assert_array_equal(model.predict(X[:3]), np.full(3, y[0]))
    assert np.isinf(model.predict(X[:3], return_std=True)[1]).all()
    few = model.partial_fit(X[1:4], y[1:4]).predict(X, return_std=True)[1]  # the penalty helps out
    assert np.isfinite(few).all() and (few > 0).all()
    short = RLSRegressor(forgetting=0.5).fit(X, y)  # remembers 3 samples, for 9 parameters
    assert np.isinf(short.predict(X, return_std=True)[1]).all()


def test_weights_repeat_rows_and_zero_leaves_them_out(rng):
    X, y = problem(rng, 1e3, samples=60)
    weights = rng.integers(0, 4, 60)
    weights[0] = 0
    weighted = RLSRegressor().fit(X, y, sample_weight=weights)
    repeated = RLSRegressor().fit(np.repeat(X, weights, axis=0), np.repeat(y, weights))
    for ours, theirs in zip(weighted.predict(X, True), repeated.predict(X, True)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    model = RLSRegressor(forgetting=0.9).fit(X, y, np.sign(weights))
    rows = weights > 0
    same = RLSRegressor(forgetting=0.9).fit(X[rows], y[rows])
    np.testing.assert_array_equal(model.coef_, same.coef_)
    coefficients = model.coef_.copy()
    np.testing.assert_array_equal(model.partial_fit(X, y, 0).coef_, coefficients)
    np.testing.assert_array_equal(
        model.partial_fit(X, y, 2.0).coef_, same.partial_fit(X, y, np.full(60, 2)).coef_
    )


def test_a_penalty_for_each_column(rng):
    X, y = rng.standard_normal((50, 3)), rng.standard_normal(50)
    scales = np.array([1e-3, 1.0, 1e3])
    model = RLSRegressor(initial_scale=scales).fit(X, y)
    ridge = Ridge(alpha=1).fit(X * np.sqrt(scales), y)
    np.testing.assert_allclose(model.coef_, ridge.coef_ * np.sqrt(scales), rtol=1e-9)
    assert np.isfinite(model.predict(X, return_std=True)[1]).all()
