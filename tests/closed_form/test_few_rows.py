"""P as the few rows that it is made of: the same numbers as those of the dense matrix."""

from __future__ import annotations

import pytest
import torch

from rlscuda.closed_form import few_rows, formulas
from rlscuda.closed_form.few_rows import FewRows
from rlscuda.closed_form.greedy import Consumer, greedy_path

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
SHAPES = [(5, 12, 3), (9, 10, 1), (1, 8, 2), (20, 12, 3)]  # rows, units, columns a unit


def made(rows, units, width, ones=True, seed=0):
    """Few rows, the dense matrix of them, a weight and the columns of units in any order."""
    generator = torch.Generator().manual_seed(seed)
    n = units * width + ones
    X = torch.randn(rows, n, generator=generator, dtype=torch.float64) + 0.3
    X[:, -1] = 1.0
    X /= rows**0.5
    damping = 1e-3 * X.square().sum() / n
    P = torch.linalg.inv(X.mT @ X + damping * torch.eye(n))
    W = torch.randn(4, n, generator=generator, dtype=torch.float64)
    blocks = torch.randperm(units * width, generator=generator).view(units, width)
    return FewRows(X, damping), (P + P.mT) / 2, W, blocks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_forms_are_those_of_the_dense_matrix(shape):
    few, P, W, blocks = made(*shape)
    assert few.shape == P.shape and len(few) == len(P)
    for formula, columns in [
        (formulas.block_saliency, blocks),
        (formulas.compensate, blocks[:5].flatten()),
        (formulas.compensate, blocks[:0].flatten()),
        (formulas.output_energy, blocks.flatten()),
        (formulas.output_energy, blocks[:2].flatten()),
    ]:
        found, expected = formula(few, W, columns), formula(P, W, columns)
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), **CLOSE)
    assert not formulas.compensate(few, W, blocks[0])[:, blocks[0]].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("slack", "window"), [(0.0, 2), (0.75, 2), (1.1, 1), (0.75, 100)])
def test_greedy_goes_the_way_of_the_dense_matrix(shape, slack, window, monkeypatch):
    monkeypatch.setattr(few_rows, "_SLACK", slack)
    monkeypatch.setattr("rlscuda.closed_form.greedy._WINDOW", window * shape[2])
    few, P, W, blocks = made(*shape)
    found = greedy_path([Consumer(few, W, blocks)], shape[1])
    expected = greedy_path([Consumer(P, W, blocks)], shape[1])
    torch.testing.assert_close(found.cost, expected.cost, **CLOSE)
    assert torch.equal(found.order, expected.order)


def test_greedy_over_few_rows_beside_a_dense_matrix():
    few, P, W, blocks = made(6, 7, 3)
    _, other, V, columns = made(30, 7, 1, seed=1)
    rest = Consumer(other, V, columns, 0.4)
    found = greedy_path([Consumer(few, W, blocks, 2.0), rest], 5)
    expected = greedy_path([Consumer(P, W, blocks, 2.0), rest], 5)
    assert torch.equal(found.order, expected.order)
    torch.testing.assert_close(found.cost, expected.cost, **CLOSE)


def test_groups_are_gone_through_one_by_one():
    rows, damping = torch.randn(3, 2, 5).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    few = FewRows(rows, damping)
    assert few.shape == (3, 5, 5) and len(few) == 3
    for part, X, d in zip(few, rows, damping):
        assert torch.equal(part.rows, X) and part.damping == d


def test_wrong_arguments():
    few, _, W, blocks = made(5, 4, 2)
    with pytest.raises(ValueError, match=r"W must be \[c, n\] with n=9"):
        formulas.compensate(few, W[:, 1:], blocks[0])
    with pytest.raises(ValueError, match="columns from 0 to 8, got 0 to 9"):
        formulas.block_saliency(few, W, torch.tensor([[0], [9]]))
    with pytest.raises(ValueError, match="W must be"):
        greedy_path([Consumer(few, W[:, 1:], blocks)], 1)
