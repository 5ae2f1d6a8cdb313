"""rls_filter_bank_ against the specification, filter by filter; its refusals and errors."""

import math

import numpy as np
import pytest
import torch
from support.compare import assert_close, assert_exact, assert_same_by_any_threads, random_spd

import rlscuda.functional as RF
from rlscuda import _C
from rlscuda.reference import rls_filter_bank
from rlscuda.reference.banks import Stabilised

# where rows are refused one by one; cuda_on_cpu says 0
ON_GPU = torch.get_default_device().type == "cuda" or _C.cuda_runtime == 0
SIZES = [(1, 1, 1), (3, 1, 2), (4, 10, 1), (3, 17, 1), (2, 33, 3), (1, 65, 3), (2, 129, 1)]
RULES = {  # forgetting, gain, ridge; of each filter in turn
    "plain": ([1.0], [1.0], [-1.0]),
    "forgetting": ([0.99, 0.9, 1.0, 0.8], [1.0, 0.3, 2.0], [-1.0]),
    "forgetful": ([0.4, 0.6], [1.0], [-1.0]),
    "ridges": ([0.95, 0.9], [0.5], [0.3, 0.0, -1.0]),
}
UPDATES, RESETS, REFUSED = -3, -2, -1


class Bank:
    """The tensors of a bank, and its filters as the specification has them."""

    def __init__(self, b, n, n_out=1, rule="plain", dtype=torch.float64):
        columns = [[c[i % len(c)] for i in range(b)] for c in RULES[rule]]
        self.P, self.W = random_spd(b, n, dtype=dtype), torch.randn(b, n_out, n, dtype=dtype)
        self.state, self.squares = torch.zeros(b, 7).double(), torch.zeros(b, n).double()
        self.rule = torch.tensor([*columns, [2.0] * b], dtype=torch.float64).T.contiguous()
        epsilon = torch.finfo(dtype).eps
        self.filters = [
            Stabilised(P, W, forgetting, gain, None if ridge < 0 else ridge, 2.0, epsilon)
            for P, W, forgetting, gain, ridge in zip(
                self.P.cpu().numpy(), self.W.cpu().numpy(), *columns
            )
        ]

    def tensors(self):
        return self.P, self.W, self.state, self.squares

    def clones(self):
        return [t.clone() for t in self.tensors()]

    def sample(self, rows=None):
        b, n_out, n = self.W.shape
        rows = b if rows is None else rows
        return torch.randn(rows, n, dtype=self.P.dtype), torch.randn(rows, n_out).to(self.P.dtype)

    def update(self, x, y, **options):
        """Both: what they predict."""
        given = {k: v.cpu().numpy() for k, v in options.items()}
        wanted = rls_filter_bank(self.filters, x.cpu().numpy(), y.cpu().numpy(), **given)
        return self.apply(x, y, **options), torch.from_numpy(wanted).to(x.device)

    def apply(self, x, y, **options):
        return RF.rls_filter_bank_(*self.tensors(), self.rule, x, y, **options)

    def check(self, compare):
        assert torch.equal(self.P, self.P.mT)
        P, W = (torch.from_numpy(np.stack([getattr(f, k) for f in self.filters])) for k in "PW")
        compare(self.P.cpu(), P)
        compare(self.W.cpu(), W)
        counts = [[f.updates, f.resets, 0] for f in self.filters]
        assert self.state[:, UPDATES:].tolist() == counts


def comparison(dtype):
    return assert_exact if dtype == torch.float64 else lambda a, b: assert_close(a, b, 200)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("b, n, n_out", SIZES)
def test_equals_the_specification(b, n, n_out, rule, dtype):
    bank, compare = Bank(b, n, n_out, rule, dtype), comparison(dtype)
    for _ in range(35):
        x, y = bank.sample()
        compare(*bank.update(x, y))
    bank.check(compare)


def test_masks_weights_and_an_input_that_is_shared():
    bank = Bank(5, 6, 2, "forgetting")
    for step in range(40):
        x, y = bank.sample()
        options = [
            {"mask": torch.rand(5) < 0.5},
            {"weights": torch.rand(5).double() * (torch.rand(5) < 0.6)},
            {"mask": torch.rand(5) < 0.5, "weights": 3 * torch.rand(5).double()},
        ][step % 3]
        assert_exact(*bank.update(x[0] if step % 4 == 1 else x, y, **options))
    bank.check(assert_exact)


@pytest.mark.parametrize("n", [3, 40])
def test_an_index_touches_those_that_it_names_alone(n):
    bank = Bank(9, n, 1, "forgetting")
    for step in range(30):
        before = bank.clones()
        index = torch.randperm(9)[: step % 5]
        x, y = bank.sample(len(index))
        if len(index):
            assert_exact(*bank.update(x, y, index=index))
        else:
            assert bank.apply(x, y, index=index).shape == (0, 1)
        others = torch.ones(9, dtype=torch.bool)
        others[index] = False
        for now, old in zip(bank.tensors(), before):
            assert torch.equal(now[others], old[others])
            assert not len(index) or not torch.equal(now, old)
    bank.check(assert_exact)


def test_an_index_of_all_and_a_mask_are_the_same_bits():
    first, second, third = (Bank(6, 8, rule="forgetting") for _ in range(3))
    for a, *others in zip(first.tensors(), second.tensors(), third.tensors()):
        for other in others:
            other.copy_(a)
    order, mask = torch.tensor([4, 2, 0, 5]), torch.tensor([1, 0, 1, 0, 1, 1]).bool()
    for _ in range(20):
        x, y = first.sample()
        first.apply(x, y, mask=mask)
        second.apply(x[order], y[order], index=order)
        third.apply(x, y, weights=mask.double())
    for a, b, c in zip(first.tensors(), second.tensors(), third.tensors()):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_what_learns_nothing_may_be_anything():
    bank = Bank(3, 4)
    before = bank.clones()
    x, y = bank.sample()
    x[1], y[2] = math.nan, math.inf
    mask, weights = torch.tensor([True, False, True]), torch.tensor([1.0, 1.0, 0.0]).double()
    predictions = bank.apply(x, y, mask=mask, weights=weights)
    assert predictions[1].isnan() and predictions[[0, 2]].isfinite().all()
    for now, old in zip(bank.tensors(), before):
        assert torch.equal(now[1:], old[1:]) and not torch.equal(now, old)


def test_zeros_are_forgotten_once_there_was_energy():
    bank = Bank(2, 3, rule="forgetting")
    zero, (x, y) = torch.zeros(3).double(), bank.sample()
    before = bank.clones()
    for _ in range(20):
        bank.update(zero, y)
    assert torch.equal(bank.P, before[0]) and torch.equal(bank.W, before[1])
    bank.update(x, y)
    for _ in range(300):
        bank.update(zero, y)
    bank.check(assert_exact)
    assert bank.P.isfinite().all() and not bank.state[:, RESETS].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_direction_that_is_never_excited_stays_bounded(dtype):
    bank = Bank(3, 5, 1, "forgetful", dtype)
    for _ in range(400):
        x, y = bank.sample()
        x[:, 3] = 0
        bank.apply(x, y)
    assert bank.P.isfinite().all() and not bank.state[:, RESETS].any()
    assert torch.equal(bank.P, bank.P.mT)


@pytest.mark.parametrize("n", [4, 50])
@pytest.mark.parametrize("how", ["negative", "overflow"])
def test_a_sample_that_would_break_P_resets_it_and_the_others_go_on(n, how):
    bank = Bank(3, n)
    x, y = bank.sample()
    if how == "negative":
        bank.P[1] *= -100 / (x[1] @ bank.P[1] @ x[1])
        bank.filters[1].P = bank.P[1].cpu().numpy().copy()
    else:
        y[1], bank.W[1] = 1e308, torch.sign(x[1]) * -1e308
        bank.filters[1].W = bank.W[1].cpu().numpy().copy()
    W = bank.W[1].clone()
    with np.errstate(over="ignore"):
        bank.update(x, y)
    assert torch.equal(bank.P[1], 2 * torch.eye(n).double()) and torch.equal(bank.W[1], W)
    assert bank.state[:, UPDATES:].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    for now, f in zip(bank.P, bank.filters):
        assert_exact(now.cpu(), torch.from_numpy(f.P))


def outcome(bank, x, y, message, **options):
    """Whether a row was refused alone, as on a GPU; on the CPU the call is, and nothing changes."""
    if ON_GPU:
        return bank.apply(x, y, **options)
    before = bank.clones()
    with pytest.raises(ValueError, match=message):
        bank.apply(x, y, **options)
    assert all(torch.equal(a, b) for a, b in zip(bank.tensors(), before))
    return None


@pytest.mark.parametrize("n", [4, 50])
@pytest.mark.parametrize("what, value, message", [
    ("x", math.nan, "x must be finite, got NaN or inf in row 1"),
    ("y", math.inf, "y must be finite, got NaN or inf in row 1"),
    ("weights", -1.0, "weights must be >= 0 and finite, got -1 in row 1"),
    ("weights", math.nan, "weights must be >= 0 and finite, got nan in row 1"),
    ("rule", 0.0, r"rule must have forgetting in \(0, 1\]"),
    ("rule", math.nan, r"rule must have forgetting in \(0, 1\]"),
])  # fmt: skip
def test_a_row_with_a_fault(n, what, value, message):
    bank = Bank(3, n, 2)
    x, y = bank.sample()
    weights = torch.ones(3).double()
    given = {"x": x, "y": y, "weights": weights, "rule": bank.rule}[what]
    given[1].view(-1)[-1 if what != "rule" else 0] = value
    before = bank.clones()
    if outcome(bank, x, y, message, weights=weights) is not None:
        assert bank.state[:, UPDATES:].tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
        for i in (0, 1, 3):
            now = bank.tensors()[i]
            assert torch.equal(now[1], before[i][1]) and not torch.equal(now[0], before[i][0])


@pytest.mark.parametrize("n", [4, 50])
def test_a_filter_that_is_named_twice_or_is_none(n):
    bank = Bank(3, n, 2)
    x, y = bank.sample(4)
    index = torch.tensor([2, 0, 2, 2])
    twin = Bank(3, n, 2)
    for own, other in zip(twin.tensors(), bank.tensors()):
        own.copy_(other)
    predictions = outcome(bank, x, y, "index must name no filter twice, got 2 again", index=index)
    if predictions is not None:
        twin.apply(x[:2], y[:2], index=index[:2])
        assert predictions[2:].isnan().all() and predictions[:2].isfinite().all()
        assert torch.equal(bank.P, twin.P) and torch.equal(bank.W, twin.W)
        assert bank.state[:, REFUSED].tolist() == [0, 0, 2]
    for wrong in (-1, 3, 2**62):
        before = bank.clones()
        index = torch.tensor([wrong])
        message = rf"index must be in \[0, 3\), got {wrong}"
        predictions = outcome(bank, x[:1], y[:1], message, index=index)
        if predictions is not None:
            assert predictions.isnan().all()
            assert all(torch.equal(a, b) for a, b in zip(bank.tensors(), before))


@pytest.mark.parametrize("turn", [[math.nan, math.nan, math.nan, math.nan], [1e300] * 4, [-1.0] * 4,
                                  [0, 100, 9, math.inf]])  # fmt: skip
def test_a_turn_that_is_none_reads_nothing_beyond_P(turn):
    bank = Bank(2, 6, rule="ridges")
    bank.state[:, :4] = torch.tensor(turn)
    for _ in range(20):
        bank.apply(*bank.sample())
    assert bank.P.isfinite().all() and not bank.state[:, RESETS].any()


def test_threads_change_nothing():
    def make():
        bank = Bank(300, 20, rule="forgetting")
        return bank, [bank.sample() for _ in range(3)]

    def run(given):
        bank, samples = given
        for x, y in samples:
            bank.apply(x, y)
        return bank.tensors()

    assert_same_by_any_threads(make, run)


WRONG = {
    "P must be [b, n, n] with n > 0, got [4, 4]": {"P": torch.eye(4)},
    "P must be [b, n, n] with n > 0, got [3, 0, 0]": {"P": torch.zeros(3, 0, 0)},
    "P must be float32 or float64, got float16": {"P": torch.zeros(3, 4, 4).half()},
    "W must be [b, n_out, n] with n_out > 0, got [3, 4]": {"W": torch.zeros(3, 4)},
    "W must be [3, 2, 4], got [3, 2, 5]": {"W": torch.zeros(3, 2, 5)},
    "W must have the dtype of P, float32, got float64": {"W": torch.zeros(3, 2, 4).double()},
    "W must be contiguous": {"W": torch.zeros(3, 2, 8)[..., ::2]},
    "state must be [3, 7], got [3, 6]": {"state": torch.zeros(3, 6).double()},
    "state must be float64, got float32": {"state": torch.zeros(3, 7)},
    "squares must be [3, 4], got [4]": {"squares": torch.zeros(4).double()},
    "rule must be [3, 4], got [4]": {"rule": torch.ones(4).double()},
    "x must be [3, 4], got [2, 4]": {"x": torch.zeros(2, 4)},
    "x must be [4], got [3]": {"x": torch.zeros(3)},
    "x must have the dtype of P": {"x": torch.zeros(3, 4).double()},
    "y must be [3, 2], got [3]": {"y": torch.zeros(3)},
    "weights must be [3], got [3, 1]": {"weights": torch.ones(3, 1)},
    "weights must have the dtype of P": {"weights": torch.ones(3).double()},
    "mask must be [3], got [2]": {"mask": torch.ones(2).bool()},
    "mask must be bool, got float32": {"mask": torch.ones(3)},
    "index must be [k], got [3, 1]": {"index": torch.zeros(3, 1).long()},
    "index must be int64, got int32": {"index": torch.arange(3).int()},
    "x must be [2, 4], got [3, 4]": {"index": torch.arange(2)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument(message):
    given = {
        "P": torch.eye(4).repeat(3, 1, 1), "W": torch.zeros(3, 2, 4),
        "state": torch.zeros(3, 7).double(), "squares": torch.zeros(3, 4).double(),
        "rule": torch.ones(3, 4).double(), "x": torch.ones(3, 4), "y": torch.ones(3, 2),
        **WRONG[message],
    }  # fmt: skip
    before = {name: t.clone() for name, t in given.items()}
    with pytest.raises(ValueError) as caught:
        RF.rls_filter_bank_(**given)
    assert message in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in given.items())


def test_what_is_no_tensor_is_a_type_error():
    bank = Bank(2, 3)
    x, y = bank.sample()
    for given in ({"x": None}, {"y": "y"}, {"index": [0]}, {"mask": True}):
        with pytest.raises(TypeError):
            bank.apply(**{"x": x, "y": y, **given})


def test_samples_may_lie_by_strides():
    first, second = Bank(4, 5, 2), Bank(4, 5, 2)
    for own, other in zip(second.tensors(), first.tensors()):
        own.copy_(other)
    x, y = first.sample()
    first.apply(x, y)
    second.apply(x.T.contiguous().T, y.T.contiguous().T.requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors()))


def test_opcheck():
    bank = Bank(3, 5, 2, "forgetting")
    x, y = bank.sample()
    options = torch.ones(3).double(), torch.tensor([True, False, True]), torch.tensor([2, 0, 1])
    for weights, mask, index in (options, (None, None, None)):
        arguments = (*bank.clones(), bank.rule, x, y, weights, mask, index)
        torch.library.opcheck(torch.ops.rlscuda.rls_filter_bank_.default, arguments)
