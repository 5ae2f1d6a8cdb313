"""rls_update_ against its specification, its bit symmetry, its guards and its errors."""

import itertools
import math

import pytest
import torch
from support.compare import assert_close, assert_same_by_any_threads, random_spd, wide

import rlscuda.functional as RF
from rlscuda import _C, RLSFilter, reference

COMPLEX = [torch.complex64, torch.complex128]
ON_CPU = torch.get_default_device().type == "cpu"
DTYPES = [torch.float32, torch.float64, *(COMPLEX if ON_CPU else [])]
only_on_cpu = pytest.mark.skipif(not ON_CPU, reason="complex matrices are on the CPU alone")
OPTIONS = {
    "plain": {},
    "forgetting": {"forgetting": 0.95, "gain": 0.3},
    "shrinkage": {"forgetting": 0.9, "decay": 0.8, "diffusion": 0.2},
    "drift": {"gain": 0.05, "decay": 0.985, "diffusion": 0.05},
    "to_the_start": {"decay": 0.0, "diffusion": 2.0},
}
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 47, 63, 64, 65, 71, 100]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 16, 33, 64])
def test_equals_the_specification(dtype, name, batch, rank):
    for n in (1, 2, 9, 26, 47):
        shape = (n,) if batch is None else (batch, n)
        P, S = random_spd(*shape, dtype=dtype), torch.randn(*shape[:-1], rank, n, dtype=dtype)
        exact = [
            reference.rls_update(wide(p), wide(s), **OPTIONS[name])
            for p, s in zip(P.reshape(-1, n, n), S.reshape(-1, rank, n))
        ]
        u, h = RF.rls_update_(P, S, **OPTIONS[name])
        assert u.shape == S.shape and h.shape == P.shape[:-2]
        assert u.dtype == dtype and h.dtype == dtype.to_real()
        for index, value in enumerate((P, u, h)):
            assert_close(value, torch.stack([e[index] for e in exact]).view(value.shape), scale=20)


def test_one_row_may_come_as_a_vector():
    P, s = random_spd(5), torch.randn(5).double()
    other = P.clone()
    u, h = RF.rls_update_(P, s, 0.9, 0.5)
    v, g = RF.rls_update_(other, s[None], 0.9, 0.5)
    assert u.shape == (5,) and h.shape == ()
    assert torch.equal(P, other) and torch.equal(u, v[0]) and torch.equal(h, g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5, 16, 61])
def test_symmetric_to_the_bit(dtype, rank):
    for n in SIZES:
        P = random_spd(2, n, dtype=dtype)
        for _ in range(4):
            RF.rls_update_(P, torch.randn(2, rank, n, dtype=dtype), 0.97, 0.7, decay=0.99,
                           diffusion=0.01)  # fmt: skip
            assert torch.equal(P, P.mH), n


@pytest.mark.parametrize("n, rank", [
    *itertools.product([300, 601], [1, 4, 39, 64]),
    (1500, 1),  # beyond the near caches half of P is read
])  # fmt: skip
def test_threads_change_nothing_of_a_large_matrix(n, rank):
    def make():
        A = torch.randn(n, 8) / 3
        P = torch.eye(n) + A @ A.T
        return (P + P.T) / 2, torch.randn(rank, n)

    def run(given):
        P, S = given
        exact = reference.rls_update(P.double(), S.double(), 0.98, 0.5)[0]
        RF.rls_update_(P, S, 0.98, 0.5)
        assert_close(P, exact, scale=50)
        assert torch.equal(P, P.T)
        return [P]

    assert_same_by_any_threads(make, run)


def test_rows_need_not_be_contiguous():
    P, S = random_spd(6), torch.randn(6, 3).double()
    other = P.clone()
    RF.rls_update_(P, S.T)
    RF.rls_update_(other, S.T.contiguous())
    assert torch.equal(P, other)


def test_empty_batch():
    u, h = RF.rls_update_(torch.empty(0, 4, 4), torch.empty(0, 2, 4))
    assert u.shape == (0, 2, 4) and h.shape == (0,)


def test_nothing_is_recorded_for_autograd():
    P, s = random_spd(4), torch.randn(4, requires_grad=True, dtype=torch.float64)
    u, h = RF.rls_update_(P, s)
    assert not (P.requires_grad or u.requires_grad or h.requires_grad)


def test_zero_rows_leave_the_matrix():
    P = random_spd(5)
    before = P.clone()
    u, h = RF.rls_update_(P, torch.zeros(2, 5).double())
    assert torch.equal(P, before) and h.item() == 1 and not u.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_row_is_refused_for_its_own_matrix(bad):
    P, S = random_spd(3, 4), torch.randn(3, 2, 4).double()
    S[1, 0, 2] = bad
    before, health = P.clone(), torch.zeros(len(_C.health_slots)).double()
    power = torch.ones(3).double()
    u, h = RF.rls_update_(P, S, health=health, power=power)
    assert torch.equal(P[1], before[1]) and not u[1].any() and h[1].isnan()
    assert power[1] == 1 and (power[[0, 2]] != 1).all()
    for k in (0, 2):
        expected = reference.rls_update(before[k], S[k] / power[k].sqrt())[0]
        torch.testing.assert_close(P[k], expected)
    assert health[:3].tolist() == [2, 1, 0]


def test_found_inf_refuses_everything():
    P, S = random_spd(2, 4), torch.randn(2, 1, 4).double()
    before, health = P.clone(), torch.zeros(len(_C.health_slots)).double()
    power = torch.full((2,), 0.5).double()
    u, h = RF.rls_update_(P, S, health=health, power=power, found_inf=torch.tensor(True))
    assert torch.equal(P, before) and h.isnan().all() and not u.any()
    assert power.tolist() == [0.5, 0.5] and health[:6].tolist() == [0, 2, 0, 0, 0, 0]
    RF.rls_update_(P, S, found_inf=torch.tensor(False))
    assert not torch.equal(P, before)


def test_indefinite_matrix_is_reset_and_counted():
    P = torch.stack([random_spd(3), -10 * torch.eye(3).double()])
    S, health = torch.ones(2, 1, 3).double(), torch.zeros(len(_C.health_slots)).double()
    expected = reference.rls_update(P[0], S[0], 0.9)[0]
    _, h = RF.rls_update_(P, S, 0.9, initial_scale=3.0, health=health)
    torch.testing.assert_close(P[0], expected)
    assert torch.equal(P[1], 3 * torch.eye(3).double()) and h[1].isnan()
    assert health[:3].tolist() == [1, 0, 1]


def test_nonfinite_matrix_is_reset():
    P = torch.full((3, 3), math.nan)
    _, h = RF.rls_update_(P, torch.ones(3), initial_scale=2.0)
    assert torch.equal(P, 2 * torch.eye(3)) and h.isnan()


def test_overflowing_rows_reset_or_are_refused_and_never_leave_nan():
    P, health = torch.eye(3), torch.zeros(len(_C.health_slots)).double()
    RF.rls_update_(P, torch.full((3,), 1e30), health=health)
    assert torch.isfinite(P).all() and torch.equal(P, P.T) and health[:3].sum() == 1


def test_health_counts_updates_and_the_largest_gain():
    P, health = random_spd(4), torch.zeros(len(_C.health_slots)).double()
    gains = []
    for _ in range(5):
        _, h = RF.rls_update_(P, torch.randn(3, 4).double(), 0.9, 0.5, health=health)
        gains.append(h.item() - 0.9)
    assert health[:3].tolist() == [5, 0, 0]
    assert health[3].item() == pytest.approx(max(gains))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_normalises_the_rows(dtype):
    n, rank, gain = 6, 3, 0.25
    P, power = random_spd(2, n, dtype=dtype), torch.zeros(2, dtype=dtype.to_real())
    exact, seen = wide(P).clone(), [0.0, 0.0]
    for step in range(3):
        S = torch.randn(2, rank, n, dtype=dtype) * 10 ** (step - 1)
        RF.rls_update_(P, S, gain=gain, power=power)
        for k in range(2):
            square = wide(S[k]).abs().square().mean().item()
            now, seen[k] = reference.running_power(seen[k], square, gain)
            exact[k] = reference.rls_update(exact[k], wide(S[k]) / now**0.5, gain=gain)[0]
    assert_close(power, torch.tensor(seen, dtype=torch.float64), scale=10)
    assert_close(P, exact, scale=100)


def test_power_of_zero_rows_is_no_division_by_zero():
    P, power = torch.eye(3), torch.zeros(1)
    _, h = RF.rls_update_(P, torch.zeros(2, 3), power=power)
    assert torch.equal(P, torch.eye(3)) and h == 1 and power == 0


WRONG = {
    "P must be a torch.Tensor, got list": (TypeError, {"P": [[1.0]]}),
    "s must be a torch.Tensor, got float": (TypeError, {"s": 1.0}),
    "P must be [n, n] or [b, n, n], got [4]": (ValueError, {"P": torch.ones(4)}),
    "P must be square, got [4, 2]": (ValueError, {"P": torch.ones(4, 2)}),
    "s must have n=4 columns, got [3]": (ValueError,
        {"s": torch.ones(3)}),
    "s must have at least one row, got [0, 4]": (ValueError,
        {"s": torch.ones(0, 4)}),
    "s must be [n] or [r, n], got [1, 1, 4]": (ValueError,
        {"s": torch.ones(1, 1, 4)}),
    "s must be [b, r, n] for a batched P, got [3, 1, 4]": (ValueError,
        {"P": torch.eye(4).repeat(2, 1, 1), "s": torch.ones(3, 1, 4)}),
    "P must be float32, float64, complex64 or complex128, got float16": (ValueError,
        {"P": torch.eye(4).half(), "s": torch.ones(4).half()}),
    "s must have the dtype of P, float32, got float64": (ValueError,
        {"s": torch.ones(4).double()}),
    "all tensors must be on one device, got cpu, meta": (ValueError,
        {"s": torch.ones(4, device="meta")}),
    "P must be contiguous, got strides [1, 4]": (ValueError,
        {"P": torch.arange(16.0).view(4, 4).T}),
    "forgetting must be in (0, 1], got 0": (ValueError, {"forgetting": 0}),
    "forgetting must be in (0, 1], got 1.5": (ValueError, {"forgetting": 1.5}),
    "forgetting must be in (0, 1], got nan": (ValueError, {"forgetting": math.nan}),
    "gain must be > 0, got 0": (ValueError, {"gain": 0}),
    "gain must be > 0, got inf": (ValueError, {"gain": math.inf}),
    "decay must be >= 0, got -1": (ValueError, {"decay": -1}),
    "diffusion must be >= 0, got -0.5": (ValueError, {"diffusion": -0.5}),
    "initial_scale must be > 0, got 0": (ValueError, {"initial_scale": 0}),
    "power must have 1 elements, got [2]": (ValueError, {"power": torch.ones(2)}),
    "power must have the dtype of P": (ValueError, {"power": torch.ones(1).double()}),
    "power must have the real dtype of P, float32, got complex64": (ValueError,
        {"P": torch.eye(4).cfloat(), "s": torch.ones(4).cfloat(), "power": torch.ones(1).cfloat()}),
    "s must have the dtype of P, complex64, got float32": (ValueError,
        {"P": torch.eye(4).cfloat()}),
    "P must be in memory as it is, got a conjugated view": (ValueError,
        {"P": torch.eye(4).cfloat().conj(), "s": torch.ones(4).cfloat()}),
    "health must be [7], got [3]": (ValueError, {"health": torch.zeros(3).double()}),
    "health must be float64, got float32": (ValueError,
        {"health": torch.zeros(len(_C.health_slots))}),
    "found_inf must be one bool, got bool [2]": (ValueError,
        {"found_inf": torch.zeros(2, dtype=torch.bool)}),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument(message):
    error, changed = WRONG[message]
    arguments = {"P": torch.eye(4), "s": torch.ones(4), **changed}
    tensors = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error) as caught:
        RF.rls_update_(arguments.pop("P"), arguments.pop("s"), **arguments)
    assert message in str(caught.value)
    for name, before in tensors.items():
        value = changed.get(name, arguments.get(name, before))
        if value.device.type == "cpu":
            assert torch.equal(value, before)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_opcheck(batched, dtype):
    shape = (2, 5) if batched else (5,)
    P, S = random_spd(*shape, dtype=dtype), torch.randn(*shape[:-1], 3, 5, dtype=dtype)
    names = [a.name for a in torch.ops.rlscuda.rls_update_.default._schema.arguments]
    given = {
        "P": P, "s": S, "forgetting": 0.9, "gain": 0.5, "decay": 1.0, "diffusion": 0.0,
        "initial_scale": 1.0, "power": torch.ones(shape[:-1] or (1,)),
        "health": torch.zeros(len(_C.health_slots)).double(), "found_inf": torch.tensor(False),
    }  # fmt: skip
    assert given.keys() <= set(names)
    torch.library.opcheck(
        torch.ops.rlscuda.rls_update_.default, tuple(given.get(name) for name in names)
    )


def test_compiles_without_a_graph_break():
    def step(P, s):
        u, h = RF.rls_update_(P, s, 0.9, 0.5, health=None)
        return P * 2, u + h

    P, s = random_spd(5), torch.randn(2, 5).double()
    eager, compiled = P.clone(), P.clone()
    expected = step(eager, s)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, s)
    assert torch.equal(eager, compiled)
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)


def test_autograd_notices_the_change():
    P = random_spd(4).requires_grad_()
    s = torch.randn(4).double()
    energy = (s @ P @ P @ s).sum()
    RF.rls_update_(P, s)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        energy.backward()


# -- complex matrices -----------------------------------------------------------------------------


@only_on_cpu
def test_complex_matrix_is_the_inverse_of_its_rows_gram_matrix():
    P, S = random_spd(7, dtype=torch.complex128), torch.randn(3, 7, dtype=torch.complex128)
    expected = torch.linalg.inv(0.9 * torch.linalg.inv(P) + 0.5 / 3 * S.mH @ S)
    RF.rls_update_(P, S, 0.9, 0.5)
    torch.testing.assert_close(P, expected, rtol=1e-11, atol=1e-12)


@only_on_cpu
def test_conjugated_rows_count_as_they_are_and_those_of_a_filter_are_conjugated():
    x, f = torch.randn(6, dtype=torch.complex128), RLSFilter(6, dtype=complex)
    P, other = torch.eye(6).to(x), torch.eye(6).to(x)
    RF.rls_update_(P, x.conj())
    RF.rls_update_(other, x.conj().resolve_conj())
    f.update(x.numpy(), 1j)
    assert torch.equal(P, other)
    torch.testing.assert_close(P, torch.from_numpy(f.P.copy()))


@only_on_cpu
@pytest.mark.parametrize("part", [math.nan, complex(0, math.nan), complex(1, math.inf)])
def test_complex_rows_that_are_not_finite_are_refused_and_an_indefinite_matrix_is_reset(part):
    P, health = random_spd(4, dtype=torch.complex64), torch.zeros(len(_C.health_slots)).double()
    before, s = P.clone(), torch.ones(4, dtype=torch.complex64)
    s[2] = part
    u, h = RF.rls_update_(P, s, health=health)
    assert torch.equal(P, before) and h.isnan() and not u.any()
    RF.rls_update_(P, torch.ones_like(s), found_inf=torch.tensor(True), health=health)
    assert torch.equal(P, before)
    bad = -10 * torch.eye(4, dtype=torch.complex64)
    _, h = RF.rls_update_(bad, torch.ones_like(s), initial_scale=3.0, health=health)
    assert torch.equal(bad, 3 * torch.eye(4, dtype=torch.complex64)) and h.isnan()
    assert health[:3].tolist() == [0, 2, 1]


def test_other_operators_refuse_complex_matrices():
    ops, P, s = torch.ops.rlscuda, torch.eye(3).cfloat(), torch.ones(1, 3).cfloat()
    counters, state = torch.zeros(len(_C.health_slots)).double(), torch.tensor([1.0, 0, 0]).double()
    rule, held = (1.0, 1.0, 1.0, 0.0), torch.zeros(2, 1, 3).cfloat()
    lists = ([P], [s], [], [counters], None, [], [], [])
    for refused in (
        lambda: ops.foreach_rls_update_(*lists, *rule, 0.0, 1.0, False),
        lambda: ops.rls_update_held_(P, held, state, s, *rule, 1.0, None, None, None),
        lambda: ops.rls_flush_(P, held, state),
    ):
        with pytest.raises(RuntimeError, match="P must be float32 or float64, got complex64"):
            refused()
