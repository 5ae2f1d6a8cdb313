"""rls_update_held_ and rls_flush_ against updates applied at once, their guards and errors."""

import math

import pytest
import torch
from support.compare import assert_close, assert_exact, random_spd

import rlscuda.functional as RF
from rlscuda import _C, reference

OPTIONS = {
    "plain": {},
    "forgetting": {"forgetting": 0.95, "gain": 0.3},
    "shrinkage": {"forgetting": 0.9, "decay": 0.8, "diffusion": 0.2},
    "drift": {"gain": 0.05, "decay": 0.985, "diffusion": 0.05},
    "forgetful": {"forgetting": 0.3, "decay": 0.5, "diffusion": 0.5},  # scale leaves its range
    "to_the_start": {"decay": 0.0, "diffusion": 2.0},
}
SIZES = [  # shape of P, updates held, rows of each
    ((1,), 2, 1), ((2,), 5, 1), ((9,), 16, 1), ((9,), 2, 3), ((64,), 3, 2), ((131,), 5, 1),
    ((1, 5), 7, 2), ((3, 17), 5, 1), ((2, 130), 2, 3), ((140,), 2, 32),
    ((261,), 3, 2),
]  # fmt: skip


def held_back(P, hold, rank):
    """The factors and the state of a matrix of which nothing is held; their contents are NaN."""
    held = torch.full((*P.shape[:-2], hold, rank, P.shape[-1]), math.nan, dtype=P.dtype)
    state = torch.zeros(*P.shape[:-2], 3, dtype=torch.float64)
    state[..., 0] = 1
    return held, state


def rows(P, rank):
    return torch.randn(*P.shape[:-2], rank, P.shape[-1], dtype=P.dtype)


class Pair:
    """A matrix whose updates are held back, and its twin that applies each at once."""

    def __init__(self, shape, hold, rank, dtype=torch.float64):
        self.P = random_spd(*shape, dtype=dtype)
        self.twin = self.P.clone()
        self.rank, self.hold = rank, hold
        self.held, self.state = held_back(self.P, hold, rank)
        lead = shape[:-1]
        self.health = [torch.zeros(len(_C.health_slots)).double() for _ in range(2)]
        self.power = [torch.ones(lead or (1,), dtype=dtype) for _ in range(2)]

    def update(self, S, found_inf=None, power=False, **options):
        """Both updates; what they return is compared."""
        flag = None if found_inf is None else torch.tensor(found_inf)
        more = [{"health": h, "found_inf": flag, **({"power": p} if power else {})}
                for h, p in zip(self.health, self.power)]  # fmt: skip
        u, h = RF.rls_update_held_(self.P, self.held, self.state, S, **options, **more[0])
        v, g = RF.rls_update_(self.twin, S, **options, **more[1])
        assert u.shape == v.shape and h.shape == g.shape
        assert torch.equal(h.isnan(), g.isnan())
        assert_exact(u[~h.isnan()] if h.dim() else u.nan_to_num(),
                     v[~g.isnan()] if g.dim() else v.nan_to_num())  # fmt: skip
        assert_exact(h.nan_to_num(), g.nan_to_num())
        return h

    def check(self, tolerance=1e-12):
        """Flushes and compares the matrices, the counters and the power."""
        RF.rls_flush_(self.P, self.held, self.state)
        assert torch.equal(self.P, self.P.mT)
        assert_exact(self.P, self.twin, tolerance)
        assert (self.state.view(-1, 3) == torch.tensor([1.0, 0.0, 0.0]).double()).all()
        torch.testing.assert_close(*self.health, rtol=1e-10, atol=1e-12)
        assert_exact(self.power[0], self.power[1])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape, hold, rank", SIZES)
def test_equals_updates_applied_at_once(shape, hold, rank, name):
    pair = Pair(shape, hold, rank)
    for _ in range(min(2 * hold, hold + 3)):
        pair.update(rows(pair.P, rank), **OPTIONS[name])
    pair.check()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("hold, rank", [(4, 1), (3, 4)])
def test_float32_follows_the_specification(hold, rank, name):
    for shape in ((131,), (2, 33)):
        P = random_spd(*shape, dtype=torch.float32)
        held, state = held_back(P, hold, rank)
        exact = P.double().reshape(-1, *P.shape[-2:]).clone()
        for _ in range(5):
            S = rows(P, rank)
            u, h = RF.rls_update_held_(P, held, state, S, **OPTIONS[name])
            steps = [
                reference.rls_update(p, s, **OPTIONS[name])
                for p, s in zip(exact, S.double().reshape(-1, rank, P.shape[-1]))
            ]
            exact = torch.stack([step[0] for step in steps])
            assert_close(u, torch.stack([step[1] for step in steps]).view_as(u), 100)
            assert_close(h.reshape(-1), torch.stack([step[2] for step in steps]), 100)
        RF.rls_flush_(P, held, state)
        assert torch.equal(P, P.mT)
        assert_close(P, exact.view_as(P), 100)


@pytest.mark.parametrize("name", ["plain", "forgetting", "shrinkage", "drift"])
def test_specification_of_what_is_held_is_that_of_the_update(name):
    P = random_spd(6)
    held, exact = reference.HeldBack(P, P.new_empty(0, 6)), P
    for _ in range(5):
        S = torch.randn(3, 6).double()
        held, U, h = held.update(S, **OPTIONS[name])
        exact, V, g = reference.rls_update(exact, S, **OPTIONS[name])
        assert_exact(U, V)
        assert_exact(h, g)
        assert_exact(held.matrix(), exact)
    assert torch.equal(held.P, P) and len(held.V) == 15


@pytest.mark.parametrize("shape", [(12,), (2, 5)])
def test_the_operator_holds_what_the_specification_holds(shape):
    P, hold, rank = random_spd(*shape), 4, 2
    before, (held, state) = P.clone(), held_back(P, hold, rank)
    n = shape[-1]
    exact = [reference.HeldBack(p, p.new_empty(0, n)) for p in before.reshape(-1, n, n)]
    for count in range(1, hold):
        S = rows(P, rank)
        RF.rls_update_held_(P, held, state, S, 0.9, 0.4, decay=0.95, diffusion=0.1)
        exact = [e.update(s, 0.9, 0.4, 0.95, 0.1)[0]
                 for e, s in zip(exact, S.reshape(-1, rank, n))]  # fmt: skip
        assert torch.equal(P, before)  # not written
        for b, e in enumerate(exact):
            V = held.view(-1, hold * rank, n)[b, : count * rank]
            assert_exact(V.T @ V, e.V.T @ e.V)
            assert_exact(
                state.view(-1, 3)[b], torch.tensor([e.scale, e.shift, count], dtype=torch.float64)
            )
    RF.rls_update_held_(P, held, state, rows(P, rank))  # full: all of it is applied
    assert not torch.equal(P, before) and (state.view(-1, 3)[:, 2] == 0).all()


def test_power_gain_and_forgetting_may_change_from_update_to_update():
    pair = Pair((2, 11), 6, 2)
    for step in range(8):
        options = {"forgetting": 1 - 0.05 * (step % 4), "diffusion": 0.01 * step}
        S = rows(pair.P, 2) * 10 ** (step % 3)
        pair.update(S, power=True, gain=0.1 + 0.05 * step, **options)
    pair.check()


@pytest.mark.parametrize("shape", [(7,), (3, 30)])
@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_refused_update_in_the_middle_changes_nothing(shape, at, bad):
    pair = Pair(shape, 4, 1)
    for step in range(6):
        S = rows(pair.P, 1)
        if step != at:
            pair.update(S, found_inf=False, forgetting=0.9)
            continue
        before = [t.clone() for t in (pair.P, pair.held, pair.state)]
        if bad is not None:
            S.view(-1)[-2] = bad
        h = pair.update(S, found_inf=bad is None, forgetting=0.9)
        last = tuple(t[-1] if len(shape) > 1 else t for t in (pair.P, pair.held, pair.state))
        kept = tuple(t[-1] if len(shape) > 1 else t for t in before)
        for a, b in zip(last, kept):
            assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
        assert h.reshape(-1)[-1].isnan()
    pair.check()


@pytest.mark.parametrize("shape", [(7,), (3, 66)])
@pytest.mark.parametrize("at", [0, 1, 3, 5])
def test_reset_in_the_middle_drops_what_is_held(shape, at):
    pair = Pair(shape, 4, 1)
    for step in range(8):
        S = rows(pair.P, 1)
        if step != at:
            pair.update(S, forgetting=0.95)
            continue
        S.view(-1, shape[-1])[-1] *= 1e150  # whose square is finite, and h is not
        h = pair.update(S, gain=1e10, initial_scale=3.0)
        assert h.reshape(-1)[-1].isnan() and h.isnan().sum() == 1
        last = pair.P.view(-1, *pair.P.shape[-2:])[-1]
        assert torch.equal(last, 3 * torch.eye(shape[-1]).double())
        assert pair.state.view(-1, 3)[-1].tolist() == [1, 0, 0]
    pair.check()


def test_broken_matrix_is_reset_whatever_is_held():
    pair = Pair((40,), 8, 1, torch.float32)
    for _ in range(3):
        RF.rls_update_held_(pair.P, pair.held, pair.state, rows(pair.P, 1), health=pair.health[0])
    assert pair.state[2] == 3
    pair.P[0, 0] = math.nan
    _, h = RF.rls_update_held_(pair.P, pair.held, pair.state, rows(pair.P, 1), initial_scale=2.0,
                               health=pair.health[0])  # fmt: skip
    assert h.isnan() and torch.equal(pair.P, 2 * torch.eye(40))
    assert pair.state.tolist() == [1, 0, 0] and pair.health[0][:3].tolist() == [3, 0, 1]


@pytest.mark.parametrize("every", [1, 3, 5])
def test_flush_in_the_middle(every):
    pair = Pair((2, 21), 4, 2)
    for step in range(11):
        pair.update(rows(pair.P, 2), forgetting=0.97, decay=0.99, diffusion=0.01)
        if step % every == 0:
            pair.check()
    pair.check()


def test_flush_of_nothing_changes_no_bit():
    P = random_spd(3, 9)
    before, (held, state) = P.clone(), held_back(P, 3, 1)
    RF.rls_flush_(P, held, state)
    assert torch.equal(P, before)


@pytest.mark.parametrize("count", [math.nan, -1.0, 3.0, 1e300])
def test_a_state_that_is_none_reads_and_writes_nothing_beyond(count):
    P, memory = random_spd(5), torch.full((5, 1, 5), 7.0).double()
    held, state = memory[1:4], torch.tensor([1.0, 0.0, count]).double()
    exact = reference.rls_update(P, S := torch.randn(1, 5).double())[0]
    RF.rls_update_held_(P, held, state, S)
    assert (memory[[0, 4]] == 7).all() and state[2] == 1
    RF.rls_flush_(P, held, state)
    assert_exact(P, exact)


def test_empty():
    P = torch.empty(0, 4, 4)
    held, state = torch.empty(0, 3, 2, 4), torch.empty(0, 3).double()
    health = torch.zeros(len(_C.health_slots)).double()
    u, h = RF.rls_update_held_(P, held, state, torch.empty(0, 2, 4), health=health)
    assert u.shape == (0, 2, 4) and h.shape == (0,) and health.sum() == 1
    RF.rls_flush_(P, held, state)
    P = torch.empty(0, 0)
    u, h = RF.rls_update_held_(P, torch.empty(2, 1, 0), torch.tensor([1.0, 0, 0]).double(),
                               torch.empty(0), 0.5)  # fmt: skip
    assert u.shape == (0,) and h == 0.5


def test_rows_may_come_as_a_vector_or_by_strides():
    P, hold = random_spd(6), 3
    other, s = P.clone(), torch.randn(6, 2).double()
    first, second = held_back(P, hold, 1), held_back(P, hold, 1)
    u, _ = RF.rls_update_held_(P, *first, s[:, 0])
    v, _ = RF.rls_update_held_(other, *second, s[:, :1].T.contiguous())
    assert u.shape == (6,) and torch.equal(u, v[0]) and torch.equal(first[0][0], second[0][0])


WRONG = {
    "held must be [K, r, n], got [3, 4]": {"held": torch.zeros(3, 4)},
    "held must be [b, K, r, n], got [3, 1, 4]": {
        "P": torch.eye(4).repeat(2, 1, 1), "s": torch.ones(2, 1, 4)},
    "held must be [3, 1, 4], got [3, 1, 5]": {"held": torch.zeros(3, 1, 5)},
    "held must be [3, 2, 4], got [3, 1, 4]": {"s": torch.ones(2, 4)},
    "held must have K >= 2 updates and at most 64 rows, got [1, 1, 4]": {
        "held": torch.zeros(1, 1, 4)},
    "held must have K >= 2 updates and at most 64 rows, got [65, 1, 4]": {
        "held": torch.zeros(65, 1, 4)},
    "held must have the dtype of P": {"held": torch.zeros(3, 1, 4).double()},
    "held must be contiguous": {"held": torch.zeros(3, 1, 8)[..., ::2]},
    "state must be [3], got [1, 3]": {"state": torch.zeros(1, 3).double()},
    "state must be float64": {"state": torch.zeros(3)},
    "state must be contiguous": {"state": torch.zeros(6).double()[::2]},
    "found_inf must be one bool": {"found_inf": torch.zeros(2, dtype=torch.bool)},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument(message):
    given = {"P": torch.eye(4), "held": torch.zeros(3, 1, 4), "s": torch.ones(1, 4),
             "state": torch.tensor([1.0, 0.0, 0.0]).double(), **WRONG[message]}  # fmt: skip
    before = {name: t.clone() for name, t in given.items()}
    with pytest.raises(ValueError) as caught:
        RF.rls_update_held_(**given)
    assert message in str(caught.value)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("given, message", [
    ({"s": torch.ones(3)}, "s must have n=4 columns, got [3]"),
    ({"P": torch.eye(4).double()}, "s must have the dtype of P, float64"),
    ({"forgetting": 0.0}, "forgetting must be in (0, 1], got 0"),
    ({"gain": -1.0}, "gain must be > 0, got -1"),
    ({"s": torch.ones(1, 4, device="meta")}, "all tensors must be on one device, got cpu, meta"),
])  # fmt: skip
def test_what_the_plain_update_refuses(given, message):
    P = given.pop("P", torch.eye(4))
    held, state = torch.zeros(3, 1, 4), torch.tensor([1.0, 0.0, 0.0]).double()
    with pytest.raises(ValueError) as caught:
        RF.rls_update_held_(P, held, state, given.pop("s", torch.ones(1, 4)), **given)
    assert message in str(caught.value)


@pytest.mark.parametrize("P, held, message", [
    (torch.eye(4), torch.zeros(4), "held must be [K, r, n], got [4]"),
    (torch.eye(4).half(), torch.zeros(3, 1, 4).half(), "P must be float32 or float64"),
    (torch.ones(4, 3), torch.zeros(3, 1, 4), "P must be square, got [4, 3]"),
])  # fmt: skip
def test_wrong_argument_of_a_flush(P, held, message):
    with pytest.raises(ValueError) as caught:
        RF.rls_flush_(P, held, torch.tensor([1.0, 0.0, 0.0]).double())
    assert message in str(caught.value)


@pytest.mark.parametrize("batched", [False, True])
def test_opcheck(batched):
    shape = (2, 5) if batched else (5,)
    P = random_spd(*shape, dtype=torch.float32)
    state = torch.tensor([1.0, 0.0, 0.0]).double().repeat(2, 1) if batched else torch.tensor(
        [1.0, 0.0, 0.0]).double()  # fmt: skip
    held = torch.zeros(*shape[:-1], 3, 2, 5)
    arguments = (P, held, state, torch.randn(*shape[:-1], 2, 5), 0.9, 0.5, 1.0, 0.0, 1.0,
                 torch.ones(shape[:-1] or (1,)), torch.zeros(len(_C.health_slots)).double(),
                 torch.tensor(False))  # fmt: skip
    torch.library.opcheck(torch.ops.rlscuda.rls_update_held_.default, arguments)
    torch.library.opcheck(torch.ops.rlscuda.rls_flush_.default, (P, held, state))


def test_compiles_without_a_graph_break():
    def step(P, held, state, s):
        u, h = RF.rls_update_held_(P, held, state, s, 0.9, 0.5)
        RF.rls_flush_(P, held, state)
        return P * 2, u + h

    P, s = random_spd(5), torch.randn(2, 5).double()
    eager, compiled = P.clone(), P.clone()
    expected = step(eager, *held_back(P, 3, 2), s)
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, *held_back(P, 3, 2), s), expected):
        assert torch.equal(a, b)
    assert torch.equal(eager, compiled)


def test_autograd_notices_the_change():
    P = random_spd(4).requires_grad_()
    held, state = held_back(P.detach(), 2, 1)
    s = torch.randn(4).double()
    energy = (s @ P @ P @ s).sum()
    RF.rls_update_held_(P, held, state, s)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        energy.backward()
