"""Redundancy from P: against least squares by numpy, at its ends, and under rescaling."""

import numpy as np
import pytest
import torch
from torch import nn

from rlscuda.closed_form.redundancy import redundancy
from rlscuda.pruning import calibrate, redundancies

COLUMNS = torch.arange(6)[:, None]


def rows(count=200, n=6, ones=False):
    X = torch.randn(count, n).double() @ torch.randn(n, n).double()
    return torch.cat([X, torch.ones(count, 1).double()], 1) if ones else X


def inverse(X):
    P = torch.linalg.inv(X.mT @ X / len(X))
    return (P + P.mT) / 2


@pytest.mark.parametrize("ones", [False, True], ids=["plain", "bias"])
def test_of_single_columns_is_that_of_lstsq(ones):
    X = rows(ones=ones)
    found = redundancy(inverse(X), COLUMNS)
    for j in range(6):
        others, x = np.delete(X.numpy(), j, 1), X[:, j].numpy()
        rest = x - others @ np.linalg.lstsq(others, x, rcond=None)[0]
        assert abs(float(found[j]) - (1 - (rest @ rest) / (x @ x))) < 1e-8
    assert ((found >= 0) & (found < 1)).all()


def test_of_blocks_is_that_of_lstsq():
    X = rows(n=7)
    blocks = torch.tensor([[0, 1], [2, 3], [4, 6]])
    for block, found in zip(blocks.numpy(), redundancy(inverse(X), blocks)):
        others, x = np.delete(X.numpy(), block, 1), X[:, block].numpy()
        rest = x - others @ np.linalg.lstsq(others, x, rcond=None)[0]
        assert abs(float(found) - (1 - (rest**2).sum() / (x**2).sum())) < 1e-8


def test_independent_inputs_explain_nothing_of_each_other():
    P = torch.diag(torch.rand(6).double() + 0.1)
    torch.testing.assert_close(redundancy(P, COLUMNS), torch.zeros(6).double(), atol=1e-14, rtol=0)


def test_a_sum_of_others_is_explained_up_to_the_damping():
    X = rows()
    X[:, 5] = X[:, 0] - 2 * X[:, 3]
    A = X.mT @ X / len(X)
    for damping in (1e-4, 1e-8):
        P = torch.linalg.inv(A + damping * A.diagonal().mean() * torch.eye(6).double())
        left = 1 - redundancy((P + P.mT) / 2, COLUMNS)[[0, 3, 5]]
        assert (left > 0).all() and (left < 100 * damping).all()


def test_scales_do_not_matter():
    X, scales = rows(), torch.rand(6).double() + 0.1
    whole = redundancy(inverse(X), COLUMNS)
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(redundancy(inverse(X * scales), COLUMNS), whole, **exact)
    torch.testing.assert_close(redundancy(37 * inverse(X), COLUMNS), whole, **exact)


def test_by_layer_and_channel():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ).double()
    x = torch.randn(50, 4, 4, 4).double()
    x[:, 1] = 2 * x[:, 0]
    found = redundancies(model, calibrate(model, [x], damping=1e-9))
    assert {name: list(r.shape) for name, r in found.items()} == {"0": [4], "3": [24]}
    assert (found["0"][:2] > 0.999).all() and (found["0"][2:] < 0.5).all()
    with pytest.raises(ValueError, match=r"'0' must be a layer with the inputs of its matrix"):
        redundancies(model, {"0": torch.eye(3).double()[None]})
    with pytest.raises(ValueError, match=r"got 0 columns"):
        redundancies(model, {"1": torch.eye(3).double()[None]})


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(ValueError, match="positive definite"):
        redundancy(torch.diag(torch.tensor([1.0, -1.0])), torch.tensor([[0], [1]]))
