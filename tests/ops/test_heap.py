"""No call leaves memory behind: live heap bytes and Python objects over quarters of a loop."""

import ctypes
import gc
import sys

import numpy as np
import pytest
import torch
from support.op_cases import VALID, registered
from support.operators import adaptive_weight_step_, factors_agree, nonfinite, weight_step_
from support.training import batch, cnn, mlp

import rlscuda.functional as RF
from rlscuda import HeldMatrix, RLSFilter, RLSOptimizer

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
X, ROWS = torch.randn(2, 4, 6, 6), torch.randn(5, 6)


class Mallinfo(ctypes.Structure):
    """What glibc knows of its heap."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


libc = ctypes.CDLL(None)
pytestmark = pytest.mark.skipif(
    not hasattr(libc, "mallinfo2"), reason="mallinfo2 needs glibc 2.33 or newer"
)


def live() -> tuple[int, int]:
    """Bytes that malloc has given out, and blocks that Python's own allocator has."""
    gc.collect()
    libc.mallinfo2.restype = Mallinfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


def left_behind(call, calls: int = 50) -> tuple[float, float]:
    """Bytes and blocks a call, in the window where that is least: a leak is in every one.

    There are more windows as long as each had some: caches below torch fill for 500 steps.
    """
    for _ in range(calls):
        call()
    gc.freeze()  # what there is already need not be looked at again and again
    windows = []
    try:
        while len(windows) < 4 or len(windows) < 24 and max(_least(windows)) >= calls:
            before = live()
            for _ in range(calls):
                call()
            windows.append([after - start for after, start in zip(live(), before)])
    finally:
        gc.unfreeze()
    return tuple(least / calls for least in _least(windows))


def _least(windows: list[list[int]]) -> list[int]:
    return [min(column) for column in zip(*windows)]


def check(call, calls: int = 50) -> None:
    bytes_each, blocks_each = left_behind(call, calls)
    assert bytes_each < 4 and blocks_each < 1  # the least that malloc gives out is 24 bytes


def test_a_leak_is_seen():
    kept = []
    assert left_behind(lambda: kept.append(torch.empty(3)))[0] > 12
    assert left_behind(lambda: kept.append([1.5, object()]))[1] >= 2


def test_every_operator_has_arguments():
    assert sorted(VALID) == registered()


@pytest.mark.parametrize("name", VALID)
def test_operator(name):
    operator, arguments = getattr(torch.ops.rlscuda, name).default, VALID[name]()
    check(lambda: operator(*arguments))


@pytest.mark.parametrize("name", VALID)
def test_refusing_operator(name):
    operator, arguments = getattr(torch.ops.rlscuda, name).default, VALID[name]()
    first = arguments[0]
    wrong = [t.to(torch.int32) for t in first] if isinstance(first, list) else first.int()

    def call():
        try:
            operator(wrong, *arguments[1:])
        except RuntimeError:
            return
        raise AssertionError("accepted")

    check(call)


OF_TESTS = ["weight_step_", "adaptive_weight_step_", "nonfinite", "factors_agree"]


def _functions():
    P, s = torch.eye(6), torch.randn(6)
    held, state = torch.zeros(4, 1, 6), torch.tensor([1.0, 0.0, 0.0]).double()
    bank = (
        torch.eye(6).repeat(2, 1, 1), torch.zeros(2, 1, 6), torch.zeros(2, 7).double(),
        torch.zeros(2, 6).double(), torch.tensor([0.9, 1.0, -1.0, 1.0]).double().repeat(2, 1),
    )  # fmt: skip
    W, D, M, v = torch.randn(3, 6), torch.randn(3, 6), torch.zeros(3, 6), torch.zeros(3)
    return {
        "adaptive_weight_step_": lambda: adaptive_weight_step_(W, D, D.clone(), M, v, 0.1, 1),
        "factors_agree": lambda: factors_agree(D, ROWS, torch.ones(5, 3)),
        "nonfinite": lambda: nonfinite([s, P]),
        "patch_mean": lambda: RF.patch_mean(X, 3, padding_mode="reflect", padding=1),
        "patch_sample": lambda: RF.patch_sample(X, 3, rank=2, seed=1),
        "patch_sketch": lambda: RF.patch_sketch(X, 3, rank=2, seed=1),
        "rls_filter_bank_": lambda: RF.rls_filter_bank_(*bank, ROWS[:2], torch.ones(2, 1)),
        "rls_flush_": lambda: RF.rls_flush_(P, held, state),
        "rls_ridge_": lambda: RF.rls_ridge_(P, 0.1, 2, 3),
        "rls_update_": lambda: RF.rls_update_(P, s),
        "rls_update_held_": lambda: RF.rls_update_held_(P, held, state, s),
        "weight_step_": lambda: weight_step_(W, D, 0.1),
    }


def test_every_function_has_a_call():
    assert set(_functions()) == {*RF.__all__, *OF_TESTS}


@pytest.mark.parametrize("name", [*RF.__all__, *OF_TESTS])
def test_function(name):
    check(_functions()[name])


def test_held_matrix():
    matrix = HeldMatrix(torch.eye(6), hold=4)
    check(lambda: (matrix.update(ROWS[0]), matrix.P))


@pytest.mark.parametrize("n", [6, 800])  # the large one holds its updates back
def test_filter(n):
    f, x, y = RLSFilter(n, forgetting=0.99, dtype=np.float32), np.ones(n, np.float32), np.float32(1)
    series = np.ones((5, n), np.float32), np.ones(5, np.float32)
    check(lambda: (f.update(x, y), f.run(*series)), 20)


@pytest.mark.parametrize("form", ["adaptive", "natural", "paper", "spectral"])
@pytest.mark.parametrize("model", [mlp, cnn])
def test_step(model, form):
    net = model()
    optimizer = RLSOptimizer(net, form=form, lr=1e-3)
    x = batch(net)

    def step():
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    check(step, 25)
