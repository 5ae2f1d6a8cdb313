"""Stabilised forgetting of `rls_update_`, `rls_ridge_` and `HeldMatrix`, against explicit R."""

import copy
import io

import pytest
import torch
from support.compare import assert_exact, random_spd

import rlscuda.functional as RF
from rlscuda import _C, HeldMatrix, reference
from rlscuda.functional.ridges import turns_of
from rlscuda.reference.ridge import coordinates_due

EPS = torch.finfo(torch.float64).eps
CASES = [(5, 0.9, 1), (7, 0.99, 2), (130, 0.3, 3), (9, 0.999, 1), (3, 0.6, 1), (200, 0.8, 2)]


def counters():
    return torch.zeros(len(_C.health_slots)).double()


# -- functions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("n, forgetting, rank", CASES)
def test_updates_with_a_ridge_are_those_of_the_information(n, forgetting, rank, batch, tensors):
    P = random_spd(*batch, n)
    R = torch.linalg.inv(P)
    rho = 0.1 + torch.rand(*batch, n).double() if tensors else 0.3
    for t in range(40):
        S = torch.randn(*batch, rank, n).double()
        S[..., n // 2 :] = 0  # nothing but the ridge excites these
        turn = torch.tensor(t) if tensors else t
        RF.rls_update_(P, S, forgetting, 0.7, ridge=rho, turn=turn)
        each = rho if batch and tensors else [rho] * 2
        rows = [(R, S, rho)] if not batch else zip(R, S, each)
        news = [reference.information_update(r, s, forgetting, 0.7, p, t) for r, s, p in rows]
        R = torch.stack(news) if batch else news[0]
    assert torch.equal(P, P.mT)
    assert_exact(P, torch.linalg.inv(R), 1e-10)


@pytest.mark.parametrize("n, forgetting", [(1, 0.9), (4, 0.999), (6, 0.7), (9, 0.5), (10, 0.83)])
def test_a_dead_coordinate_stays_between_one_and_two_ridges(n, forgetting):
    rho, turns = 0.8, turns_of(forgetting)
    assert forgetting**turns >= 0.5 > forgetting ** (turns + 1)
    wait = torch.zeros(n).double()
    for t in range(turns):
        wait[list(coordinates_due(t, n, forgetting))] = t + 1
    P = (forgetting**wait / rho).diag()  # as if it had always been so
    seen = []
    for t in range(2 * turns + 3):
        RF.rls_update_(P, torch.zeros(n).double(), forgetting, ridge=rho, turn=torch.tensor(t))
        seen.append(1 / P.diagonal())
    least, most = torch.stack(seen).aminmax(dim=0)
    after = rho * forgetting**-turns
    assert after <= 2 * rho + 1e-12 and (wait > 0).all()
    assert_exact(most, after * torch.ones(n).double())
    assert_exact(least, rho / forgetting * torch.ones(n).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_ridge_is_raised_for_some_coordinates_in_turn(batch, dtype):
    P = random_spd(*batch, 70, dtype=dtype)
    for first, count in ((0, None), (67, 5), (3, 0), (torch.tensor(69), 66)):
        ridge = torch.rand(*batch, 70).double()
        R, places = torch.linalg.inv(P.double()), (first + torch.arange(70)) % 70
        chosen = torch.zeros(70).double()
        chosen[places[:count]] = 1
        expected = 1 + (P.double() * ridge[..., None, :])[..., places[:count], places[:count]]
        R.diagonal(dim1=-2, dim2=-1).add_(chosen * ridge)
        h = RF.rls_ridge_(P, ridge, first, count)
        assert torch.equal(P, P.mT)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        assert_exact(P.double(), torch.linalg.inv(R), tolerance)
        if count and count <= 64:
            assert_exact(h.double(), expected.mean(-1), tolerance)


@pytest.mark.parametrize("turn", [3, torch.tensor(3)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_what_is_refused_or_reset_is_not_raised(batch, turn):
    P = random_spd(*batch, 9, dtype=torch.float32)
    s = torch.randn(*batch, 1, 9)
    options = {"forgetting": 0.5, "ridge": 2.0, "turn": turn}
    before, health = P.clone(), counters()
    RF.rls_ridge_(P, 0.0)
    assert torch.equal(P, before)
    RF.rls_ridge_(P, 1.0, found_inf=torch.tensor(True))
    assert torch.equal(P, before)
    _, h = RF.rls_update_(P, s, found_inf=torch.tensor(True), health=health, **options)
    assert h.isnan().all() and torch.equal(P, before)
    s[..., 0] = float("nan")
    _, h = RF.rls_update_(P, s, health=health, **options)
    assert h.isnan().all() and torch.equal(P, before)
    indefinite = -torch.eye(9).expand_as(P).contiguous()
    RF.rls_update_(indefinite, torch.ones_like(s), initial_scale=3.0, health=health, **options)
    assert torch.equal(indefinite, 3 * torch.eye(9).expand_as(P))
    each = 2 if batch else 1
    assert health[:3].tolist() == [0, 2 * each, each]


def test_a_reset_by_a_raise_is_counted():
    P, health = torch.diag(torch.tensor([1.0, -1.0])), counters()
    _, h = RF.rls_update_(P, torch.tensor([1.0, 0.0]), 0.5, ridge=4.0, health=health)
    assert h.isnan() and torch.equal(P, torch.eye(2))
    assert health[:3].tolist() == [1, 0, 1]


def test_nothing_is_raised_where_nothing_is_forgotten():
    P = random_spd(6)
    Q, s = P.clone(), torch.randn(6).double()
    RF.rls_update_(P, s, ridge=3.0, turn=torch.tensor(5))
    RF.rls_update_(Q, s)
    assert torch.equal(P, Q)


@pytest.mark.parametrize("options, kind, message", [
    ({"ridge": -1.0}, ValueError, "ridge must be >= 0 and finite, got -1.0"),
    ({"ridge": float("nan")}, ValueError, "ridge must be >= 0 and finite, got nan"),
    ({"ridge": True}, TypeError, "ridge must be a number or a torch.Tensor, got bool"),
    ({"ridge": torch.ones(2)}, ValueError, "ridge must expand to [3], floating point on cpu"),
    ({"ridge": torch.ones(3).int()}, ValueError, "got [3], torch.int32 on cpu"),
    ({"ridge": 1.0, "turn": -1}, ValueError, "turn must be >= 0, got -1"),
    ({"ridge": 1.0, "turn": 1.0}, TypeError, "turn must be an int or a torch.Tensor, got float"),
    ({"ridge": 1.0, "turn": torch.ones(())}, ValueError, "turn must be an int or int64 []"),
])  # fmt: skip
def test_errors_of_a_ridge(options, kind, message):
    P = torch.eye(3)
    with pytest.raises(kind) as caught:
        RF.rls_update_(P, torch.ones(3), 0.5, **options)
    assert message in str(caught.value) and torch.equal(P, torch.eye(3))


@pytest.mark.parametrize("call, kind, message", [
    (lambda: RF.rls_ridge_([1.0], 1.0), TypeError, "P must be a torch.Tensor, got list"),
    (lambda: RF.rls_ridge_(torch.ones(3), 1.0), ValueError, "P must be [n, n] or [b, n, n]"),
    (lambda: RF.rls_ridge_(torch.eye(3), 1.0, count=4), ValueError, "at most n=3, got 4"),
    (lambda: RF.rls_ridge_(torch.eye(3), 1.0, first=-2), ValueError, "first must be >= 0, got -2"),
    (lambda: RF.rls_ridge_(torch.ones(3, 2), 1.0), ValueError, "P must be"),
])  # fmt: skip
def test_errors_of_a_raise(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


# -- HeldMatrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [None, 0.2])
@pytest.mark.parametrize("n, forgetting, rank, hold", [
    (5, 0.9, 1, 0), (7, 0.99, 2, 4), (130, 0.3, 3, 0), (9, 0.999, 1, 16), (3, 0.6, 1, 2),
    (70, 0.98, 2, 5),
])  # fmt: skip
def test_held_matrix_is_the_inverse_of_the_information(n, forgetting, rank, hold, ridge):
    matrix = HeldMatrix(torch.eye(n).double(), rank, hold, ridge)
    exact = reference.HeldRidge(torch.eye(n).double(), EPS, ridge)
    for t in range(100):
        S = torch.randn(rank, n).double()
        S[:, n // 2 :] *= 1e-9
        S *= t > 4  # at first, nothing at all
        one = forgetting ** (1 + t % 2)
        matrix.update(S, one, 0.7)
        exact.update(S, one, 0.7)
    assert_exact(matrix.P, torch.linalg.inv(exact.R), 1e-10)


def test_matrices_of_a_batch_have_ridges_of_their_own():
    scales = torch.tensor([1.0, 1e-4, 1e3]).double()
    together = HeldMatrix(torch.eye(6).double().repeat(3, 1, 1), 2, 4)
    alone = [HeldMatrix(torch.eye(6).double(), 2, 4) for _ in scales]
    for t in range(50):
        S = scales[:, None, None] * torch.randn(3, 2, 6).double()
        if t == 20:
            S[1, 0, 0] = torch.nan  # one of them refuses
        together.update(S, 0.9)
        for matrix, rows in zip(alone, S):
            matrix.update(rows, 0.9)
    assert_exact(together.P, torch.stack([matrix.P for matrix in alone]), 1e-10)


def test_a_ridge_leaves_plain_updates_as_they_were():
    matrices = [HeldMatrix(random_spd(6), hold=3, ridge=ridge) for ridge in (None, 0, 0.5)]
    P = matrices[0].P.clone()
    for matrix in matrices:
        matrix.P.copy_(P)
    for _ in range(7):
        s = torch.randn(6).double()
        for matrix in matrices:
            matrix.update(s)
    assert all(torch.equal(matrix.P, matrices[1].P) for matrix in matrices)
    assert matrices[1].state_dict().keys() == {"P", "held", "state"}


def saved(matrix):
    file = io.BytesIO()
    torch.save(matrix.state_dict(), file)
    file.seek(0)
    other = HeldMatrix(torch.zeros(9, 9), 2, 4, matrix.ridge)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("ridge", [None, 0.2])
@pytest.mark.parametrize("clone", [copy.deepcopy, saved])
def test_copies_have_the_turn_and_the_power(clone, ridge):
    matrix = HeldMatrix(torch.eye(9), 2, 4, ridge)
    for _ in range(21):
        matrix.update(torch.randn(2, 9), 0.97)
    twin = clone(matrix)
    for _ in range(40):
        S = torch.randn(2, 9)
        results = [m.update(S, 0.97) for m in (matrix, twin)]
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert torch.equal(matrix.P, twin.P)


def test_refused_updates_leave_a_held_matrix_as_it_is():
    matrix = HeldMatrix(torch.eye(8), hold=4)
    for _ in range(30):
        matrix.update(torch.randn(8), 0.9)
    before, power = matrix.P.clone(), matrix.state_dict()["power"].clone()
    for _ in range(40):
        matrix.update(torch.randn(8), 0.9, found_inf=torch.tensor(True))
        matrix.update(torch.full((8,), torch.inf), 0.9)
    assert torch.equal(matrix.P, before) and torch.equal(matrix.state_dict()["power"], power)


@pytest.mark.parametrize("ridge, kind, message", [
    (-1, ValueError, "ridge must be >= 0 and finite, got -1"),
    ("1", TypeError, "ridge must be a number"),
])  # fmt: skip
def test_errors_of_the_ridge_of_a_matrix(ridge, kind, message):
    with pytest.raises(kind) as caught:
        HeldMatrix(torch.eye(2), ridge=ridge)
    assert message in str(caught.value)
    small = HeldMatrix(torch.eye(2), hold=2)
    with pytest.raises(ValueError, match="turn must be"):
        small.load_state_dict(HeldMatrix(torch.eye(2), hold=2, ridge=0).state_dict())
