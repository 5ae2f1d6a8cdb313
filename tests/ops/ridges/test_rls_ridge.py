"""The ridge of `rls_update_`, and `rls_ridge_`: against explicit R, and in turns."""

import pytest
import torch
from support.compare import assert_exact, random_spd

import rlscuda.functional as RF
from rlscuda import _C, reference
from rlscuda.functional.ridges import turns_of
from rlscuda.reference.ridge import coordinates_due

CASES = [(5, 0.9, 1), (7, 0.99, 2), (130, 0.3, 3), (9, 0.999, 1), (3, 0.6, 1), (200, 0.8, 2)]


def counters():
    return torch.zeros(len(_C.health_slots)).double()


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
