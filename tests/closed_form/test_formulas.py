"""The closed forms of pruning against least-squares refits on data, in float64."""

import pytest
import torch
from support.compare import random_spd
from support.pruning_data import SHAPES, layer_data, others, relative
from torch import Tensor

from rlscuda.closed_form import formulas
from rlscuda.closed_form.formulas import block_saliency, invert_
from rlscuda.closed_form.greedy import Consumer, greedy_path
from rlscuda.pruning.matrices.own import adaptive_to_inverse

EXACT = {"rtol": 1e-10, "atol": 1e-10}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
def test_saliency_is_the_error_after_a_refit(shape):
    data = layer_data(*shape)
    saliency = block_saliency(data.P, data.W, data.blocks)
    errors = [data.refit(block)[1] for block in data.blocks]
    errors = torch.tensor(errors, dtype=torch.float64)
    torch.testing.assert_close(saliency, errors, **EXACT)


@shapes
def test_compensated_weight_is_the_refit(shape):
    data = layer_data(*shape)
    for removed in (data.blocks[0], data.blocks[: 1 + len(data.blocks) // 2].flatten()):
        W = formulas.compensate(data.P, data.W, removed)
        assert (W[:, removed] == 0).all()
        scale = float(W.abs().max())  # nearly dead columns take weights of 1e4
        torch.testing.assert_close(
            W / scale, data.refit(removed)[0] / scale, rtol=1e-10, atol=1e-10
        )


@shapes
def test_downdated_matrix_is_the_inverse_of_the_remaining(shape):
    data = layer_data(*shape)
    removed = data.blocks[: 1 + len(data.blocks) // 2].flatten()
    kept = others(len(data.P), removed)
    X = data.X[:, kept]
    expected = torch.linalg.inv(X.T @ X / len(X))
    P = formulas.downdate(data.P, removed)
    assert relative(P, expected) < 1e-10
    assert torch.equal(P, P.T)


def test_a_slice_of_the_matrix_is_not_its_downdate():
    data = layer_data(6, 4, 5, True)
    removed = data.blocks[:3].flatten()
    kept = others(len(data.P), removed)
    X = data.X[:, kept]
    expected = torch.linalg.inv(X.T @ X / len(X))
    assert relative(formulas.downdate(data.P, removed), expected) < 1e-10
    assert relative(data.P[kept][:, kept], expected) > 10 * 1e-10
    assert relative(data.P[kept][:, kept], expected) > 1  # more than by rounding: it is wrong


def test_removing_twice_is_removing_the_union():
    data = layer_data(7, 3, 4, True)
    first, second = data.blocks[:2].flatten(), data.blocks[4:].flatten()
    kept = others(len(data.P), first)
    P, W = formulas.downdate(data.P, first), formulas.compensate(data.P, data.W, first)[:, kept]
    place = torch.searchsorted(kept, second)
    left = others(len(kept), place)
    both = torch.cat([second, first])
    union = formulas.compensate(data.P, data.W, both)[:, kept[left]]
    torch.testing.assert_close(formulas.compensate(P, W, place)[:, left], union, **EXACT)
    assert relative(formulas.downdate(P, place), formulas.downdate(data.P, both)) < 1e-12


def test_output_energy_is_the_error_without_any_unit():
    data = layer_data(5, 2, 3, True)
    error = data.refit(data.blocks.flatten())[1]
    energy = formulas.output_energy(data.P, data.W, data.blocks.flatten())
    assert energy == pytest.approx(error, rel=1e-10)
    every = torch.arange(len(data.P))  # nothing left to compensate: the whole output
    output = float((data.X @ data.W.T).square().sum() / len(data.X))
    assert formulas.output_energy(data.P, data.W, every) == pytest.approx(output, rel=1e-10)
    assert formulas.output_energy(data.P, data.W, every[:0]) == 0.0


def test_nothing_removed_changes_nothing():
    data, none = layer_data(3, 2, 2, True), torch.empty(0, dtype=torch.int64)
    W = formulas.compensate(data.P, data.W, none)
    assert torch.equal(W, data.W)
    assert W.data_ptr() != data.W.data_ptr()
    torch.testing.assert_close(formulas.downdate(data.P, none), data.P, **EXACT)


def test_arguments_are_left_as_they_were():
    data = layer_data(4, 2, 3, True)
    before = data.P, data.W.clone(), data.blocks.clone()
    P, W, blocks = before[0].clone(), data.W, data.blocks
    formulas.compensate(P, W, blocks[0])
    formulas.downdate(P, blocks[0])
    formulas.damped_inverse(P, 0.1)
    adaptive_to_inverse(P / P.norm(), 0.1, 1e-3)
    greedy_path([Consumer(P, W, blocks)], 3)
    assert all(torch.equal(a, b) for a, b in zip(before, (P, W, blocks)))


def test_float32_is_computed_in_float64():
    data = layer_data(4, 2, 3, True)
    P, W = data.P.float(), data.W.float()
    assert torch.equal(
        formulas.compensate(P, W, data.blocks[0]),
        formulas.compensate(P.double(), W.double(), data.blocks[0]),
    )


# -- damping, and matrices that are nearly singular ------------------------------------------------


def test_damped_inverse():
    A = random_spd(5)
    damped = A + 0.01 * A.diagonal().mean() * torch.eye(5).double()
    P = formulas.damped_inverse(A, 0.01)
    torch.testing.assert_close(P, torch.linalg.inv(damped), **EXACT)
    assert torch.equal(P, P.T)


def test_damping_of_dead_inputs():
    """Zero autocorrelation is an inverse of 1 / (damping * mean), free to remove, never NaN."""
    A = torch.diag(torch.tensor([3.0, 0.0, 3.0])).double()
    P = formulas.damped_inverse(A, 1e-3)
    torch.testing.assert_close(
        P.diagonal(), torch.tensor([1 / 3.002, 500.0, 1 / 3.002], dtype=torch.float64), **EXACT
    )
    costs = block_saliency(P, torch.ones(1, 3), torch.tensor([[0], [1], [2]]))
    assert costs.argmin() == 1
    assert costs[1] == pytest.approx(2e-3)


def test_damping_grows_where_rounding_made_the_matrix_indefinite():
    A = torch.diag(torch.tensor([1.0, 1.0, -1e-5])).double()
    P = formulas.damped_inverse(A, 1e-6)  # 1e-5 is not enough either (2/3 of it), 1e-4 is
    damped = A + 1e-4 * A.diagonal().mean() * torch.eye(3).double()
    torch.testing.assert_close(P, torch.linalg.inv(damped), **EXACT)
    singular = torch.ones(3, 3).double()
    assert torch.linalg.cholesky_ex(formulas.damped_inverse(singular, 0.0)).info == 0


def test_a_finite_matrix_may_have_a_sum_that_is_not():
    P = torch.eye(2) * 3e38
    assert block_saliency(P, torch.ones(1, 2), torch.tensor([[0], [1]])).min() > 0
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="P must be finite"):
            formulas.downdate(torch.diag(torch.tensor([bad, 1.0])), torch.tensor([1]))
    with pytest.raises(ValueError, match="P must be finite"):
        formulas.downdate(torch.diag(torch.tensor([torch.inf, -torch.inf])), torch.tensor([1]))


def test_nearly_singular_blocks_are_finite_and_expensive():
    """Columns of enormous power: P_gg is singular to rounding."""
    P = torch.ones(4, 4).double() + torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0])).double()
    W, blocks = torch.tensor([[1.0, -2.0, 1.0, 1.0]]), torch.tensor([[0, 1], [2, 3]])
    costs = block_saliency(P, W, blocks)
    assert torch.isfinite(costs).all()
    assert costs[0] > 1e9 > costs[1]  # two copies of one column, and an ordinary block
    expected = block_saliency(P[2:, 2:], W[:, 2:], blocks[:1])
    assert costs[1] == expected[0]  # the sound block has no jitter
    assert torch.isfinite(formulas.compensate(P, W, blocks[0])).all()
    assert torch.isfinite(formulas.downdate(P, blocks[0])).all()
    path = greedy_path([Consumer(P, W, blocks)], 2)
    assert path.order.tolist() == [1, 0]
    assert torch.isfinite(path.cost).all()


# -- the adaptive form -----------------------------------------------------------------------------


def fixed_point(A: Tensor, drift: float) -> Tensor:
    """The P of drift P + P A P = I."""
    values, vectors = torch.linalg.eigh(A)
    values = values.clamp(min=0)
    p = 2 / (drift + (drift**2 + 4 * values).sqrt())
    return vectors @ torch.diag(p) @ vectors.T


@pytest.mark.parametrize("drift", [0.1, 0.3])
@pytest.mark.parametrize("damping", [1e-5, 1e-3])
def test_adaptive_matrix_turns_into_the_inverse(drift, damping):
    A = random_spd(6)
    P = fixed_point(A, drift)
    damped = A + damping / drift * torch.linalg.inv(P)
    result = adaptive_to_inverse(P, drift, damping)
    torch.testing.assert_close(result @ damped, torch.eye(6).double(), rtol=0, atol=1e-9)
    assert torch.equal(result, result.T)


def test_adaptive_matrix_of_dead_inputs():
    """Eigenvalues at the cap 1 / drift are zero autocorrelation: the damping alone is left."""
    A = torch.zeros(6, 6).double()
    A[:4, :4] = random_spd(4)
    P = fixed_point(A, 0.3)
    result = adaptive_to_inverse(P, 0.3, 1e-3)
    torch.testing.assert_close(result[4:, 4:], 1000 * torch.eye(2).double(), **EXACT)
    assert relative(adaptive_to_inverse(P.float(), 0.3, 1e-3), result) < 1e-3


def test_adaptive_matrix_above_the_cap_takes_more_damping():
    P = torch.diag(torch.tensor([0.1, 1.0, 1.05 / 0.3])).double()
    result = adaptive_to_inverse(P, 0.3, 1e-3)
    d = 0.3 - 1e-2 / 0.3
    expected = P.diagonal().square() / (1 - d * P.diagonal())
    torch.testing.assert_close(result, torch.diag(expected), **EXACT)


@pytest.mark.parametrize("n", [1, 2, 7, 769, 1601])
def test_inversion_by_blocks(n):
    A = random_spd(n)
    torch.testing.assert_close(invert_(A.clone()) @ A, torch.eye(n).double(), rtol=0, atol=1e-9)
    A[n // 2, n // 2] = -1
    with pytest.raises(torch.linalg.LinAlgError):
        invert_(A)


# -- errors ----------------------------------------------------------------------------------------

eye, ones = torch.eye(3), torch.ones(2, 3)
column = torch.tensor([0])
block = column[None]
nan = torch.full((3, 3), float("nan"))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: block_saliency([1.0], ones, block), TypeError, "P must be a floating"),
        (lambda: block_saliency(eye.long(), ones, block), TypeError, "torch.int64"),
        (lambda: block_saliency(ones, ones, block), ValueError, r"P must be .*2, 3"),
        (lambda: block_saliency(eye[:0, :0], ones, block), ValueError, "n >= 1"),
        (lambda: block_saliency(nan, ones, block), ValueError, "P must be finite"),
        (lambda: block_saliency(eye, ones.T, block), ValueError, r"n=3.*\[3, 2\]"),
        (lambda: block_saliency(eye, nan, block), ValueError, "W must be finite"),
        (lambda: block_saliency(eye, ones.int(), block), TypeError, "W must be a floating"),
        (lambda: block_saliency(eye, ones, column), ValueError, r"blocks must be \[m, b\]"),
        (lambda: block_saliency(eye, ones, block.int()), TypeError, "int64"),
        (lambda: block_saliency(eye, ones, block + 3), ValueError, "from 0 to 2, got 3"),
        (lambda: block_saliency(eye, ones, block - 1), ValueError, "got -1"),
        (lambda: block_saliency(eye, ones, torch.tensor([[1], [1]])), ValueError,
         "distinct"),
        (lambda: block_saliency(-eye, ones, block), ValueError, "positive definite"),
        (lambda: formulas.compensate(eye, ones, block), ValueError, r"removed must be \[k\]"),
        (lambda: formulas.compensate(eye, ones, column + 7), ValueError, "got 7"),
        (lambda: formulas.compensate(-eye, ones, column), ValueError, "positive definite"),
        (lambda: formulas.downdate(eye, torch.arange(3)), ValueError, "all of them"),
        (lambda: formulas.downdate(eye, [0]), TypeError, "list"),
        (lambda: formulas.downdate(-eye, column), ValueError, "positive definite"),
        (lambda: formulas.output_energy(eye, ones, block), ValueError, r"\[k\]"),
        (lambda: formulas.damped_inverse(eye, -1.0), ValueError, "damping must be >= 0"),
        (lambda: formulas.damped_inverse(-eye, 0.0), ValueError, "positive mean diagonal"),
        (lambda: formulas.damped_inverse(torch.diag(torch.tensor([9.0, -8.0])), 0.0), ValueError,
         "semidefinite"),
        (lambda: adaptive_to_inverse(eye, 0.0, 0.0), ValueError, "drift must be > 0"),
        (lambda: adaptive_to_inverse(eye, 0.1, 0.1), ValueError, "damping must be in"),
        (lambda: adaptive_to_inverse(-eye, 0.1, 1e-3), ValueError, "positive diagonal"),
        (lambda: adaptive_to_inverse(1e4 * eye, 0.1, 5e-3), ValueError, "up to 1 / drift"),
        (lambda: greedy_path([], 0), ValueError, "at least one consumer"),
        (lambda: greedy(eye, ones, block, count=2), ValueError, "from 0 to 1.*got 2"),
        (lambda: greedy(eye, ones, block, count=-1), ValueError, "got -1"),
        (lambda: greedy(eye, ones, block, count=0.5), ValueError, "integer"),
        (lambda: greedy(eye, ones, block, weight=-1.0), ValueError, "weight must be >= 0"),
        (lambda: greedy(eye, ones, block, weight=float("nan")), ValueError, "got nan"),
        (lambda: greedy(-eye, ones, block), ValueError, "positive definite"),
        (lambda: greedy(nan, ones, block), ValueError, "P must be finite"),
        (lambda: greedy(eye, ones.T, block), ValueError, "W must be"),
        (lambda: greedy_path([Consumer(eye, ones, block),
                                      Consumer(eye, ones, torch.tensor([[0], [1]]))], 1),
         ValueError, "the 1 units of the first, got 2"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def greedy(P, W, blocks, weight=1.0, count=1):
    return greedy_path([Consumer(P, W, blocks, weight)], count)
