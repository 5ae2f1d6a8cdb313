"""RLSRegressor as scikit-learn users meet it."""

import copy
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import RegressorMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import (
    check_dataframe_column_names_consistency,
    check_estimator,
)

from rlscuda import RLSRegressor

# With forgetting, the order of the rows counts, which this check shuffles, and a repeated row is
# forgotten at twice.
WEIGHTS = "check_sample_weight_equivalence_on_dense_data"


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 5))
    return X, X @ rng.standard_normal((5, 2)) + [3.0, -1.0] + 0.1 * rng.standard_normal((200, 2))


@pytest.fixture
def frame(data):
    return pd.DataFrame(data[0], columns=list("abcde"))


@pytest.mark.parametrize("options", [{}, {"forgetting": 0.999, "fit_intercept": False}])
def test_scikit_learn_contract(options):
    expected = {WEIGHTS: "rows are forgotten in their order"} if options else {}
    results = check_estimator(
        RLSRegressor(**options), expected_failed_checks=expected, on_skip=None, on_fail=None
    )
    failed = {r["check_name"]: repr(r["exception"]) for r in results if r["status"] == "failed"}
    assert not failed
    assert sum(r["status"] == "passed" for r in results) >= 50
    assert [r["check_name"] for r in results if r["status"] == "xfail"] == list(expected)


def test_names_of_columns(data, frame):
    check_dataframe_column_names_consistency("RLSRegressor", RLSRegressor())
    model = RLSRegressor().fit(frame, data[1])
    assert list(model.feature_names_in_) == list("abcde")
    with pytest.raises(ValueError, match="same order"):
        model.predict(frame[list("edcba")])
    with pytest.raises(ValueError, match="unseen at fit time"):
        model.partial_fit(frame.rename(columns={"a": "z"}), data[1])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        model.predict(data[0])
    assert not hasattr(model.fit(*data), "feature_names_in_")


def test_partial_fit_goes_on_where_it_ended(data):
    X, Y = data
    whole = RLSRegressor(forgetting=0.99).fit(X, Y)
    parts = RLSRegressor(forgetting=0.99).partial_fit(X[:70], Y[:70])
    coefficients = parts.coef_.copy()
    parts = pickle.loads(pickle.dumps(parts)).partial_fit(X[70:], Y[70:])
    np.testing.assert_allclose(parts.coef_, whole.coef_, atol=1e-12)
    np.testing.assert_allclose(parts.P_, whole.P_, atol=1e-12)
    assert not np.allclose(parts.coef_, coefficients)
    np.testing.assert_array_equal(parts.fit(X[:70], Y[:70]).coef_, coefficients)


def test_parameters_count_from_the_next_partial_fit_on(data):
    X, Y = data
    model = RLSRegressor(fit_intercept=False, ridge=0).fit(X[:100], Y[:100])
    changed = model.set_params(forgetting=0.9, gain=2.0).partial_fit(X[100:], Y[100:])
    weights = np.where(np.arange(200) < 100, 1.0, 2.0) * 0.9 ** (
        199 - np.maximum(np.arange(200), 99)
    )
    R = (X.T * weights) @ X + 0.9**100 * np.eye(5)
    np.testing.assert_allclose(changed.coef_, np.linalg.solve(R, (X.T * weights) @ Y).T, rtol=1e-8)
    with pytest.raises(ValueError, match=r"forgetting must be in \(0, 1\], got 2"):
        model.set_params(gain=3.0, forgetting=2.0).partial_fit(X, Y)
    assert (model.filter_.gain, model.filter_.forgetting) == (2.0, 0.9)


def test_in_a_pipeline_and_a_grid_search(data):
    X, Y = data
    pipeline = make_pipeline(StandardScaler(), RLSRegressor())
    search = GridSearchCV(pipeline, {"rlsregressor__initial_scale": [1e-3, 10.0]}, cv=3)
    search.fit(X, Y[:, 0])
    assert search.best_params_ == {"rlsregressor__initial_scale": 10.0}
    assert search.best_score_ > 0.98


def test_clone_and_parameters():
    model = clone(RLSRegressor(forgetting=0.9, ridge=0.1))
    assert model.get_params() == {
        "forgetting": 0.9,
        "gain": 1.0,
        "initial_scale": 1.0,
        "ridge": 0.1,
        "fit_intercept": True,
        "form": "square-root",
        "dtype": np.float64,
    }
    assert repr(model) == "RLSRegressor(forgetting=0.9, ridge=0.1)"
    assert "RLSRegressor" in model._repr_html_()
    with config_context(enable_metadata_routing=True):
        routing = model.set_fit_request(sample_weight=True).get_metadata_routing()
    assert routing.fit.requests == {"sample_weight": True}


def test_river_takes_it_for_a_regressor():
    assert isinstance(RLSRegressor(), RegressorMixin)  # what convert_sklearn_to_river looks at
    compat = pytest.importorskip("river.compat")
    model = compat.convert_sklearn_to_river(RLSRegressor(initial_scale=1e6))
    for x in range(20):
        model.learn_one({"x": x}, 3 * x + 100)
    assert model.predict_one({"x": 30}) == pytest.approx(190, abs=1e-3)


def test_a_copy_learns_for_itself(data):
    model = RLSRegressor().fit(*data)
    before = pickle.dumps(model)
    copy.copy(model).partial_fit(*data)
    assert pickle.dumps(model) == before


def test_float64_inside_unless_float32_is_asked_for(data):
    X, Y = data
    narrow = X.astype(np.float32)
    assert RLSRegressor().fit(narrow, Y).predict(narrow).dtype == np.float64
    model = RLSRegressor(dtype=np.float32).fit(X + 1e6, Y + 1e6)
    assert model.coef_.dtype == model.P_.dtype == model.predict(X).dtype == np.float32
    exact = RLSRegressor().fit(X + 1e6, Y + 1e6)
    np.testing.assert_allclose(model.coef_, exact.coef_, atol=1e-5)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got float16"):
        RLSRegressor(dtype=np.float16).fit(X, Y)


def without_scikit_learn(monkeypatch):
    """A RLSRegressor that was imported where there is no scikit-learn."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    import rlscuda.streaming.regression as package

    for name in ("estimator", "regressor"):
        monkeypatch.delitem(sys.modules, f"rlscuda.streaming.regression.{name}")
        monkeypatch.setattr(package, name, None)
    from rlscuda import RLSRegressor as Alone

    return Alone


def test_works_without_scikit_learn(monkeypatch, data, frame):
    X, Y = data
    weights = np.random.default_rng(1).uniform(0, 2, 200)
    model = RLSRegressor(gain=3.0).fit(X, Y, weights)
    score = r2_score(Y, model.predict(X), sample_weight=weights)
    Alone = without_scikit_learn(monkeypatch)
    alone = Alone().set_params(gain=3.0).fit(frame, Y, weights)
    assert not isinstance(alone, RegressorMixin)
    assert alone.get_params() == model.get_params()
    np.testing.assert_array_equal(alone.coef_, model.coef_)
    assert alone.score(X, Y, weights) == pytest.approx(score)
    assert repr(Alone(gain=2.0)).startswith("RLSRegressor(forgetting=1.0, gain=2.0, ")
    with pytest.raises(ValueError, match="Invalid parameter 'lr': expected one of"):
        alone.set_params(gain=1.0, lr=1.0)
    assert alone.gain == 3.0
    with pytest.raises(ValueError, match="X has 4 features, but RLSRegressor is expecting 5"):
        alone.predict(X[:, :4])
    with pytest.raises(ValueError, match="not fitted yet"):
        Alone().predict(X)


def test_not_fitted():
    with pytest.raises(NotFittedError, match="not fitted yet"):
        RLSRegressor().predict([[1.0]])
    assert not hasattr(RLSRegressor(), "coef_")
    assert not hasattr(RLSRegressor(), "intercept_")


WRONG = [
    (lambda X, Y: (X[0], Y), "Expected 2D array"),
    (lambda X, Y: (X, Y[:10]), r"y must be \[200\] or \[200, n_targets\], got \[10, 2\]"),
    (lambda X, Y: (X, None), "requires y to be passed"),
    (lambda X, Y: (X, Y * np.nan), r"y must be finite and within .* got nan at \[0, 0\]"),
    (lambda X, Y: (X + [0, 0, 0, 0, 1e308], Y), r"X must be finite and within .* at \[0, 4\]"),
    (lambda X, Y: (X + 1j, Y), "Complex data not supported"),
    (lambda X, Y: (np.ma.masked_less(X, 0), Y), "X must have no masked entry"),
    (lambda X, Y: (X, Y, -np.ones(200)), "sample_weight must be >= 0, got -1.0"),
    (lambda X, Y: (X, Y, np.ones(3)), r"sample_weight must be \[200\], got \[3\]"),
    (lambda X, Y: (X, Y, np.full(200, np.inf)), "sample_weight must be finite"),
]
WRONG_IN_FIT = [(lambda X, Y: (X, Y, 0), "sample_weight must not be zero throughout")]
WRONG_IN_PARTIAL_FIT = [
    (lambda X, Y: (X[:, :4], Y), "X has 4 features, but RLSRegressor is expecting 5"),
    (lambda X, Y: (X, Y[:, 0]), r"y must be \[200, 2\] as in fit, got \[200\]"),
]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [("fit", *case) for case in WRONG + WRONG_IN_FIT]
    + [("partial_fit", *case) for case in WRONG + WRONG_IN_PARTIAL_FIT],
)
def test_errors_change_nothing(data, frame, method, change, message):
    model = RLSRegressor().fit(frame, data[1]) if method == "fit" else RLSRegressor().fit(*data)
    before = pickle.dumps(model)
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(*change(*data))
    assert pickle.dumps(model) == before
