"""HeldMatrix: plain updates to rounding, copies to the bit, no drift, the choice of K, errors."""

import copy
import io
import pickle

import pytest
import torch
from support.compare import assert_exact, assert_same_by_any_threads, random_spd

import rlscuda.functional as RF
from rlscuda import HeldMatrix
from rlscuda.streaming.held import updates_to_hold


@pytest.mark.parametrize("hold", [0, 2, 5, None])
@pytest.mark.parametrize("rank", [1, 3])
def test_matrix_equals_plain_updates(hold, rank):
    P = random_spd(11)
    memory = P.clone()
    matrix, plain = HeldMatrix(memory, rank, hold, ridge=0), P
    for step in range(12):
        S = torch.randn(rank, 11).double()
        options = {"decay": 0.99, "diffusion": 0.01}
        u, h = matrix.update(S, 0.98, 0.5, **options)
        v, g = RF.rls_update_(plain, S, 0.98, 0.5, **options)
        assert_exact(u, v)
        assert_exact(h, g)
        if step % 4 == 1:
            assert_exact(matrix.P, plain)
    assert_exact(matrix.P, plain)
    assert matrix.P is memory


def through_bytes(matrix):
    file = io.BytesIO()
    torch.save(matrix.state_dict(), file)
    file.seek(0)
    other = HeldMatrix(torch.zeros(9, 9), 2, hold=4)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("clone", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_bytes,
], ids=["deepcopy", "pickle", "state_dict"])  # fmt: skip
def test_copies_of_a_matrix_go_on_to_the_same_bits(clone):
    matrix = HeldMatrix(random_spd(9, dtype=torch.float32), 2, hold=4)
    for _ in range(6):
        matrix.update(torch.randn(2, 9), 0.97)
    twin = clone(matrix)
    for _ in range(7):
        S = torch.randn(2, 9)
        results = [m.update(S, 0.97) for m in (matrix, twin)]
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert torch.equal(matrix.P, twin.P)
    assert repr(twin) == repr(matrix) == "HeldMatrix([9, 9], torch.float32, rank=2, hold=4)"


def test_hold_is_chosen_by_size():
    assert updates_to_hold(64, 4) == updates_to_hold(512, 4) == 0
    assert updates_to_hold(4096, 4) == updates_to_hold(4096, 8) == 16
    assert updates_to_hold(512, 4, cuda=True) == 0 < updates_to_hold(1000, 4, cuda=True)
    assert updates_to_hold(4096, 4, rank=16) == 4
    assert updates_to_hold(4096, 4, rank=33) == 0
    assert HeldMatrix(torch.eye(8)).hold == 0
    assert HeldMatrix(torch.eye(1024)).hold == updates_to_hold(1024, 4)


@pytest.mark.parametrize("call, message", [
    (lambda: HeldMatrix(torch.eye(4), rank=0), "rank must be at least 1, got 0"),
    (lambda: HeldMatrix(torch.eye(4), hold=1), "hold must be 0, or at least 2 with"),
    (lambda: HeldMatrix(torch.eye(4), rank=16, hold=5), "got 5 for rank 16"),
    (lambda: HeldMatrix(torch.eye(4), hold=2).update(torch.ones(2, 4)),
     "s must have 1 rows, got [2, 4]"),
    (lambda: HeldMatrix(torch.eye(4), hold=2).load_state_dict({"P": torch.eye(4)}),
     "held must be [2, 1, 4], torch.float32, got none"),
    (lambda: HeldMatrix(torch.eye(4), hold=2).load_state_dict({"P": torch.eye(5)}),
     "P must be [4, 4], torch.float32, got [5, 5], torch.float32"),
])  # fmt: skip
def test_errors_of_a_matrix(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize("rank", [1, 4])
def test_threads_change_nothing_of_a_large_matrix(rank):
    def run(matrix):
        for _ in range(8):
            matrix.update(torch.randn(rank, 601), 0.98, 0.5)
        return [matrix.P]

    assert_same_by_any_threads(
        lambda: HeldMatrix(random_spd(601, dtype=torch.float32), rank, hold=5), run
    )


@pytest.mark.parametrize("options", [
    {"forgetting": 0.999, "decay": 0.998, "diffusion": 0.002},
    {"gain": 0.05, "decay": 0.985, "diffusion": 0.05},
    {"gain": 1.0},
], ids=["forgetting", "drift", "plain"])  # fmt: skip
def test_float32_does_not_drift_in_10000_steps(options):
    n = 24
    single = HeldMatrix(torch.eye(n), hold=16, ridge=0)
    double = torch.eye(n).double()
    for _ in range(10_000):
        s = torch.randn(n)
        s[-4:] = 0  # directions that the input never excites
        single.update(s, **options)
        RF.rls_update_(double, s.double(), **options)
    P = single.P
    assert torch.equal(P, P.T)
    assert torch.linalg.eigvalsh(P.double()).min() > 0
    assert_exact(P.double(), double, 2e-4)
