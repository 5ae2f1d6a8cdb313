"""The ridge of `HeldMatrix`: explicit R, copies, errors, wind-up, the noise floor, units."""

import copy
import io

import pytest
import torch
from support.compare import assert_exact, random_spd

from rlscuda import _C, HeldMatrix, reference
from rlscuda.reference.ridge import relative_ridge

EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("ridge", [None, 0.2])
@pytest.mark.parametrize("n, forgetting, rank, hold", [
    (5, 0.9, 1, 0), (7, 0.99, 2, 4), (130, 0.3, 3, 0), (9, 0.999, 1, 16), (3, 0.6, 1, 2),
    (70, 0.98, 2, 5),
])  # fmt: skip
def test_held_matrix_is_the_inverse_of_the_information(n, forgetting, rank, hold, ridge):
    matrix = HeldMatrix(torch.eye(n).double(), rank, hold, ridge)
    exact = reference.HeldRidge(torch.eye(n).double(), EPSILON[torch.float64], ridge)
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


# -- what it is for --------------------------------------------------------------------------------


@pytest.mark.parametrize("forgetting, dtype, steps", [
    (0.9, torch.float64, 8000), (0.99, torch.float32, 10_000),  # where plain P has overflowed
])  # fmt: skip
def test_what_nothing_excites_is_bounded(forgetting, dtype, steps):
    """Dead inputs, a border that fires once, two tones, two dimensions of eight, and small ones."""
    n, chunk = 8, 1000
    mixing = torch.randn(2, n, dtype=dtype)
    matrix = HeldMatrix(torch.eye(n, dtype=dtype).repeat(5, 1, 1), hold=4)
    health = torch.zeros(len(_C.health_slots)).double()
    for start in range(0, steps, chunk):
        X = torch.randn(chunk, 5, 1, n, dtype=dtype)
        X[:, 0, :, ::2] = 0
        X[:, 1, :, :3] = 0
        if not start:
            X[7, 1, :, :3] = 1
        time = torch.arange(start, start + chunk)[:, None] + torch.arange(n)
        X[:, 2, 0] = ((0.3 * time).sin() + (0.4 * time).sin()).to(dtype)
        X[:, 3] = X[:, 3, :, :2] @ mixing
        X[:, 4] = X[:, 3] * 1e-3
        for rows in X:
            matrix.update(rows, forgetting, health=health)
    assert health[:3].tolist() == [5 * steps, 0, 0]  # no reset
    P, power = matrix.P, matrix.state_dict()["power"]
    assert torch.equal(P, P.mT)
    eigenvalues = torch.linalg.eigvalsh(P.double())
    assert (eigenvalues > 0).all()
    for own, (*sums, count) in zip(eigenvalues, power):
        rho = relative_ridge(torch.stack(sums) / count, forgetting, EPSILON[dtype])
        assert own.max() <= 1.05 / rho.min()


def excess(forgetting, n, ridge, steps, count=200):
    """Mean squared error of the weights, over the power of the noise, on white inputs."""
    torch.manual_seed(1)
    matrix = HeldMatrix(torch.eye(n).repeat(count, 1, 1), ridge=ridge)
    error, total = torch.zeros(count, 1, n), 0.0
    for t in range(2 * steps):
        x = torch.randn(count, 1, n)
        e = 0.1 * torch.randn(count, 1, 1) - (error * x).sum(-1, keepdim=True)
        u, h = matrix.update(x, forgetting)
        error += e / h[:, None, None] * u
        total += error.square().sum().item() * (t >= steps)
    return total / (steps * count * 0.01)


@pytest.mark.parametrize("forgetting, n, steps, count", [
    (0.9, 4, 100, 2000), (0.99, 4, 500, 200), (0.999, 4, 2500, 40), (0.999, 64, 2500, 3),
])  # fmt: skip
def test_the_noise_floor_is_that_of_plain_rls(forgetting, n, steps, count):
    found, plain = (excess(forgetting, n, ridge, steps, count) for ridge in (None, 0))
    assert abs(found / plain - 1) < 0.05
    textbook = n * (1 - forgetting) / (1 + forgetting)
    assert abs(found / textbook - 1) < 0.05 + n * (1 - forgetting)  # a formula of small n (1 - λ)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_units_of_the_input_do_not_matter(scale):
    one, other = HeldMatrix(torch.eye(6), hold=3), HeldMatrix(torch.eye(6) / scale**2, hold=3)
    for _ in range(100):
        s = torch.randn(6)
        s[4:] = 0
        u, h = one.update(s, 0.95)
        v, g = other.update(scale * s, 0.95)
        assert torch.equal(u, scale * v) and torch.equal(h, g)
    assert torch.equal(one.P, other.P * scale**2)
