"""RLSFilterBank against loops of filters, a plain LinUCB, and its own contract."""

import copy
import pickle

import numpy as np
import pytest
import torch

from rlscuda import RLSFilter, RLSFilterBank
from rlscuda.reference import rls_filter_bank
from rlscuda.reference.banks import Stabilised

RNG = np.random.default_rng(0)


def samples(b, n, n_out=1, dtype=np.float64):
    return (RNG.standard_normal(s).astype(dtype) for s in ((b, n), (b, n_out)))


def assert_equal(first, second):
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def snapshot(bank):
    return {name: tensor.clone() for name, tensor in bank.state_dict().items()}


def assert_unchanged(bank, before):
    for name, tensor in bank.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("ridge", [None, 0.2, 0.0])
@pytest.mark.parametrize("n, n_out", [(1, 1), (6, 3), (20, 1)])
def test_equals_loops_of_one_filter(n, n_out, ridge):
    b = 5
    forgetting, gain, scale = RNG.uniform(0.95, 1, b), RNG.uniform(0.2, 2, b), RNG.uniform(1, 9, b)
    bank = RLSFilterBank(b, n, n_out, forgetting, gain, scale, ridge)
    filters = [
        Stabilised(d * np.eye(n), np.zeros((n_out, n)), f, g, ridge, d)
        for f, g, d in zip(forgetting, gain, scale)
    ]
    for step in range(60):
        x, y = samples(b, n, n_out)
        mask, weights = RNG.random(b) < 0.7, RNG.uniform(0, 2, b)
        wanted = rls_filter_bank(filters, x, y, weights, mask)
        got = bank.update(x, y, mask=mask, weights=weights)
        assert np.abs(got - wanted).max() <= 1e-12 * max(1, np.abs(wanted).max())
        index = RNG.permutation(b)[: 1 + step % 3]
        wanted = rls_filter_bank(filters, x[index], y[index], index=index)
        got = bank.update(x[index], y[index], index=index)
        assert np.abs(got - wanted).max() <= 1e-12 * max(1, np.abs(wanted).max())
    for name in "PW":
        wanted = np.stack([getattr(f, name) for f in filters])
        assert np.abs(getattr(bank, name) - wanted).max() <= 1e-12 * np.abs(wanted).max()
    np.testing.assert_array_equal(bank.P, bank.P.transpose(0, 2, 1))
    assert bank.updates.tolist() == [f.updates for f in filters] and not bank.resets.any()


@pytest.mark.parametrize("forgetting", [1.0, 0.98, 0.6])
def test_equals_RLSFilter(forgetting):
    b, n = 4, 7
    bank = RLSFilterBank(b, n, forgetting=forgetting, gain=0.5, initial_scale=3.0)
    filters = [RLSFilter(n, 1, forgetting, 0.5, 3.0) for _ in range(b)]
    for _ in range(80):
        x, y = samples(b, n)
        wanted = [f.update(*row) for f, *row in zip(filters, x, y[:, 0])]
        np.testing.assert_allclose(bank.update(x, y[:, 0]), wanted, 1e-10, 1e-10)
    for k, f in enumerate(filters):
        np.testing.assert_allclose(bank.P[k], f.P, 1e-10, 1e-10)
        np.testing.assert_allclose(bank.W[k], f.W, 1e-10, 1e-10)


def test_linear_bandit_equals_plain_LinUCB():
    arms, n, alpha = 12, 4, 0.7
    truth = RNG.standard_normal((arms, n))
    bank = RLSFilterBank(arms, n)
    A, c = np.stack([np.eye(n)] * arms), np.zeros((arms, n))
    for _ in range(200):
        x = RNG.standard_normal(n)
        plain = [
            x @ np.linalg.solve(A[k], c[k]) + alpha * np.sqrt(x @ np.linalg.solve(A[k], x))
            for k in range(arms)
        ]
        bound = bank.predict(x)[:, 0] + alpha * np.sqrt(bank.variance(x))
        np.testing.assert_allclose(bound, plain, rtol=1e-10, atol=1e-10)
        best = int(np.argmax(bound))
        reward = truth[best] @ x + 0.1 * RNG.standard_normal()
        bank.update(x, [reward], index=[best])
        A[best] += np.outer(x, x)
        c[best] += reward * x
    assert bank.updates.sum() == 200


def test_what_comes_out_is_what_went_in():
    x, y = samples(3, 2, dtype=np.float32)
    arrays = RLSFilterBank(3, 2, dtype=np.float32)
    tensors = RLSFilterBank(3, 2, dtype=torch.float32)
    on_device = RLSFilterBank(3, 2, dtype=np.float32, device="cpu")
    first = arrays.update(x, y[:, 0])
    second = tensors.update(torch.from_numpy(x), torch.from_numpy(y))
    third = on_device.update(x, y)
    assert isinstance(first, np.ndarray) and first.dtype == np.float32 and first.shape == (3,)
    assert isinstance(second, torch.Tensor) and second.shape == (3, 1)
    assert isinstance(third, np.ndarray) and third.shape == (3, 1)
    assert isinstance(tensors.update(x, y), np.ndarray)
    assert isinstance(arrays.variance(torch.from_numpy(x)), torch.Tensor)
    for name in ("P", "W", "updates", "resets", "refused", "forgetting", "gain", "initial_scale"):
        assert isinstance(getattr(arrays, name), np.ndarray), name
        assert isinstance(getattr(tensors, name), torch.Tensor), name
        assert isinstance(getattr(on_device, name), torch.Tensor), name
    with pytest.raises(ValueError, match="read-only"):
        arrays.W[0] = 1


def test_lists_views_and_read_only_arrays():
    first, second = RLSFilterBank(3, 2), RLSFilterBank(3, 2)
    x, y = samples(3, 2)
    frozen = x.copy()
    frozen.flags.writeable = False
    first.update(frozen, y[:, 0])
    second.update(x[::-1, ::-1].tolist(), y[::-1, 0].tolist(), index=[2, 1, 0])
    second.reset()
    second.update(np.flip(np.flip(x).copy()), list(y[:, 0]))
    assert_equal(first, second)


def test_predictions_and_variances():
    bank = RLSFilterBank(5, 3, 2, forgetting=0.9)
    for _ in range(20):
        bank.update(*samples(5, 3, 2))
    x, _ = samples(5, 3)
    index = np.array([4, 1], np.int32)
    for given, rows in ((x, x), (x[0], np.tile(x[0], (5, 1)))):
        outputs = np.stack([W @ row for W, row in zip(bank.W, rows)])
        variances = np.array([row @ P @ row for P, row in zip(bank.P, rows)])
        np.testing.assert_allclose(bank.predict(given), outputs, atol=1e-13)
        np.testing.assert_allclose(bank.variance(given), variances, rtol=1e-12)
        some = given if given.ndim == 1 else given[index]
        np.testing.assert_allclose(bank.predict(some, index), outputs[index], atol=1e-13)
        np.testing.assert_allclose(bank.variance(some, index), variances[index], rtol=1e-12)


def test_reset_of_all_and_of_some():
    bank = RLSFilterBank(4, 3, initial_scale=[1.0, 2.0, 3.0, 4.0], forgetting=0.9)
    for _ in range(5):
        bank.update(*samples(4, 3))
    before, W = snapshot(bank), bank.W.copy()
    bank.reset([2, 0], keep_weights=True)
    for k, scale in ((0, 1.0), (2, 3.0)):
        np.testing.assert_array_equal(bank.P[k], scale * np.eye(3))
    np.testing.assert_array_equal(bank.W, W)
    assert bank.updates.tolist() == [0, 5, 0, 5]
    for name, tensor in bank.state_dict().items():
        assert torch.equal(tensor[[1, 3]], before[name][[1, 3]])
    bank.reset()
    fresh = RLSFilterBank(4, 3, initial_scale=[1.0, 2.0, 3.0, 4.0], forgetting=0.9)
    assert_equal(bank, fresh)


def test_P_and_W_and_the_rule_may_be_set():
    bank, other = RLSFilterBank(2, 3), RLSFilterBank(2, 3)
    for _ in range(4):
        other.update(*samples(2, 3))
    bank.P, bank.W = other.P, other.W
    np.testing.assert_array_equal(bank.P, other.P)
    np.testing.assert_array_equal(bank.W, other.W)
    bank.forgetting, bank.gain, bank.ridge = [0.5, 0.9], 2.0, 0.1
    bank.initial_scale = torch.tensor([4.0, 5.0])
    assert bank.forgetting.tolist() == [0.5, 0.9] and bank.gain.tolist() == [2.0, 2.0]
    assert bank.ridge == 0.1 and bank.initial_scale.tolist() == [4.0, 5.0]
    bank.ridge = None
    assert bank.ridge is None
    skew = np.eye(3) + np.array([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]])
    before = snapshot(bank)
    for name, value, message in (
        ("P", np.stack([skew] * 2), "P must be symmetric"),
        ("P", np.stack([-np.eye(3)] * 2), "P must be positive definite"),
        ("P", np.eye(3), r"P must be \[2, 3, 3\], got \[3, 3\]"),
        ("W", np.full((2, 1, 3), np.nan), "W must be finite"),
        ("forgetting", 0.0, r"forgetting must be in \(0, 1\], got 0.0 to 0.0"),
        ("forgetting", [0.5, np.nan], "forgetting must be"),
        ("forgetting", [0.5] * 3, r"forgetting must be a number or \[2\], got \[3\]"),
        ("gain", -1, "gain must be > 0"),
        ("initial_scale", np.inf, "initial_scale must be > 0 and finite"),
        ("ridge", -0.1, "ridge must be >= 0 and finite, or None, got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(bank, name, value)
        assert_unchanged(bank, before)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
}


@pytest.mark.parametrize("name", [*COPIES, "state_dict"])
def test_copies_go_on_to_the_same_bits_alone(name):
    bank = RLSFilterBank(3, 4, forgetting=[0.9, 0.99, 1.0], ridge=0.3)
    for _ in range(20):
        bank.update(*samples(3, 4))
    if name == "state_dict":
        twin = RLSFilterBank(3, 4)
        twin.load_state_dict(bank.state_dict())
    else:
        twin = COPIES[name](bank)
    assert twin.ridge == 0.3
    before = snapshot(bank)
    later = [tuple(samples(3, 4)) for _ in range(20)]
    wanted = [twin.update(x, y) for x, y in later]
    assert_unchanged(bank, before)
    for (x, y), prediction in zip(later, wanted):
        np.testing.assert_array_equal(bank.update(x, y), prediction)
    assert_equal(bank, twin)


def test_a_state_of_another_bank_is_refused():
    bank, before = RLSFilterBank(3, 4), RLSFilterBank(3, 4)
    wrong = RLSFilterBank(3, 5).state_dict()
    for state in ({}, wrong, {**bank.state_dict(), "rule": torch.ones(3, 4)}):
        with pytest.raises(ValueError, match="must be"):
            bank.load_state_dict(state)
        assert_equal(bank, before)


X, Y = np.ones((3, 2)), np.ones(3)
WRONG = [
    (TypeError, "x must be float64, got float32", {"x": X.astype(np.float32)}),
    (TypeError, "y must be float64, got int64", {"y": np.ones(3, int)}),
    (TypeError, "mask must be bool", {"mask": [1, 0, 1]}),
    (TypeError, "index must be whole numbers, got bool", {"index": Y == 1}),
    (TypeError, "index must be whole numbers", {"index": [0.5, 1, 2]}),
    (ValueError, "x must be finite, got NaN or inf in row 2", {"x": X * [[1], [1], [np.inf]]}),
    (ValueError, "y must be finite, got NaN or inf in row 0", {"y": Y * np.nan}),
    (ValueError, r"x must be \[3, 2\], got \[3, 3\]", {"x": np.ones((3, 3))}),
    (ValueError, r"y must be \[3, 1\], got \[4, 1\]", {"y": np.ones(4)}),
    (ValueError, r"y must be \[3, 1\], got \[\]", {"y": 1.0}),
    (ValueError, "weights must be >= 0 and finite, got -1", {"weights": -Y}),
    (ValueError, r"index must be in \[0, 3\), got 3", {"index": [0, 1, 3]}),
    (ValueError, "index must name no filter twice, got 1 again", {"index": [0, 1, 1]}),
]


@pytest.mark.parametrize("error, message, change", WRONG, ids=[w[1] for w in WRONG])
def test_a_wrong_call_leaves_the_bank_as_it_was(error, message, change):
    bank = RLSFilterBank(3, 2, forgetting=0.9)
    bank.update(X, Y)
    before = snapshot(bank)
    with pytest.raises(error, match=message):
        bank.update(**{"x": X, "y": Y, **change})
    assert_unchanged(bank, before)


def test_wrong_sizes_and_inputs():
    for sizes in ((0, 1), (1, 0), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            RLSFilterBank(*sizes)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got"):
        RLSFilterBank(1, 1, dtype=torch.float16)
    with pytest.raises(TypeError):
        RLSFilterBank(1.5, 1)
    bank = RLSFilterBank(3, 2)
    with pytest.raises(ValueError, match=r"x must be \[2\] or \[3, 2\], got \[4\]"):
        bank.predict(np.ones(4))
    with pytest.raises(ValueError, match="x must be finite"):
        bank.variance([np.nan, 1.0])
    for index in ([-1], [3], 0):
        with pytest.raises(ValueError, match="index must be"):
            bank.predict(np.ones(2), index)
        with pytest.raises(ValueError, match="index must be"):
            bank.reset(index)
    assert "b=3, n=2" in repr(bank)
