"""RLSRegressor as scikit-learn users meet it."""

import pickle
import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from rlscuda import RLSRegressor


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 5))
    return X, X @ rng.standard_normal((5, 2)) + [3.0, -1.0] + 0.1 * rng.standard_normal((200, 2))


@pytest.mark.filterwarnings("ignore:Estimator RLSRegressor does not inherit")
@pytest.mark.parametrize("options", [{}, {"forgetting": 0.999, "fit_intercept": False}])
def test_scikit_learn_contract(options):
    results = check_estimator(RLSRegressor(**options), on_skip=None, on_fail=None)
    failed = {r["check_name"]: repr(r["exception"]) for r in results if r["status"] == "failed"}
    assert not failed
    assert sum(r["status"] == "passed" for r in results) >= 40


@pytest.mark.parametrize("targets", [1, 2])
def test_is_ridge_regression(data, targets):
    X, Y = data
    y = Y if targets == 2 else Y[:, 0]
    model = RLSRegressor(gain=2.0, initial_scale=5.0).fit(X, y)
    ones = np.hstack([X, np.ones((200, 1))])
    ridge = Ridge(alpha=1 / 10.0, fit_intercept=False).fit(ones, y)
    np.testing.assert_allclose(model.coef_, ridge.coef_[..., :5], atol=1e-10)
    np.testing.assert_allclose(model.intercept_, ridge.coef_[..., 5], atol=1e-10)
    np.testing.assert_allclose(model.predict(X), ridge.predict(ones), atol=1e-9)
    assert model.score(X, y) == pytest.approx(r2_score(y, ridge.predict(ones)))


def test_partial_fit_goes_on_where_it_ended(data):
    X, Y = data
    whole = RLSRegressor(forgetting=0.99).fit(X, Y)
    parts = RLSRegressor(forgetting=0.99).partial_fit(X[:70], Y[:70])
    coefficients = parts.coef_
    parts = pickle.loads(pickle.dumps(parts)).partial_fit(X[70:], Y[70:])
    np.testing.assert_allclose(parts.coef_, whole.coef_, atol=1e-12)
    np.testing.assert_allclose(parts.P_, whole.P_, atol=1e-12)
    assert not np.allclose(parts.coef_, coefficients)
    assert parts.filter_.updates == 200
    assert parts.fit(X[:10], Y[:10]).filter_.updates == 10


def test_in_a_pipeline_and_a_grid_search(data):
    X, Y = data
    pipeline = make_pipeline(StandardScaler(), RLSRegressor())
    search = GridSearchCV(pipeline, {"rlsregressor__initial_scale": [1e-3, 10.0]}, cv=3)
    search.fit(X, Y[:, 0])
    assert search.best_params_ == {"rlsregressor__initial_scale": 10.0}
    assert search.best_score_ > 0.98


def test_clone_and_parameters():
    model = clone(RLSRegressor(forgetting=0.9, shrinkage=0.1))
    assert model.get_params() == {
        "forgetting": 0.9,
        "gain": 1.0,
        "initial_scale": 1.0,
        "shrinkage": 0.1,
        "fit_intercept": True,
    }
    with pytest.raises(ValueError, match="Invalid parameter 'lr': expected one of"):
        model.set_params(gain=3.0, lr=1.0)
    assert model.gain == 1.0
    assert model.set_params(gain=3.0).gain == 3.0


def test_float32_stays_float32(data):
    X, Y = data
    model = RLSRegressor().fit(X.astype(np.float32), Y)
    assert model.predict(X).dtype == model.coef_.dtype == model.P_.dtype == np.float32


@pytest.mark.parametrize("sklearn_there", [True, False])
def test_not_fitted(monkeypatch, sklearn_there):
    if not sklearn_there:
        monkeypatch.setitem(sys.modules, "sklearn.exceptions", None)
    with pytest.raises(NotFittedError if sklearn_there else ValueError, match="not fitted yet"):
        RLSRegressor().predict([[1.0]])
    assert not hasattr(RLSRegressor(), "coef_")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, Y: (X[:, :4], Y), "X has 4 features, but RLSRegressor is expecting 5"),
        (lambda X, Y: (X[0], Y), "Expected 2D array"),
        (lambda X, Y: (X, Y[:10]), r"y must be \[200\] or \[200, n_targets\], got \[10, 2\]"),
        (lambda X, Y: (X, Y[:, 0]), r"Y must be \[200, 2\]"),
        (lambda X, Y: (X, None), "requires y to be passed"),
        (lambda X, Y: (X, Y * np.nan), "Y must be finite, got NaN or inf in sample 0"),
        (lambda X, Y: (X + 1j, Y), "Complex data not supported"),
    ],
)
def test_errors_change_nothing(data, change, message):
    model = RLSRegressor().fit(*data)
    before = pickle.dumps(model)
    with pytest.raises(ValueError, match=message):
        model.partial_fit(*change(*data))
    assert pickle.dumps(model) == before
