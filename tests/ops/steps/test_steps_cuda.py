"""The operators of a step of many layers on a GPU and the CPU; see `tests/ops/test_cuda.py`."""

import os

import pytest
import torch
from support.compare import assert_close

import rlscuda.functional  # noqa: F401  (its import registers the operators)

_ops = torch.ops.rlscuda
DEVICE = torch.device(os.environ.get("RLSCUDA_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)


@pytest.mark.parametrize("c, n", [(5, 7), (64, 128), (300, 784)])
def test_momentum_of_gradients(c, n):
    shapes = [(2 * c, n), (2 * c,), (2 * c, n + 1)]
    given = [torch.randn(*shape, device="cpu") for shape in shapes]
    given.append(torch.tensor([1, torch.nan], device="cpu"))

    def call(device):
        grad, bias, average, (h,) = ([t.to(device, copy=True)] for t in given)
        ahead = _ops.foreach_nesterov_(grad, bias, average, h, [0], [2], [c + 1], 0.9)
        return [t.cpu() for t in (*ahead, *average)]

    for actual, expected in zip(call(DEVICE), call("cpu")):
        assert_close(actual, expected, 4)


@pytest.mark.parametrize("c, n", [(5, 7), (64, 128), (300, 784)])
def test_completed_products(c, n):
    shapes = [(c, n + 1), (c, n), (c,), (n + 1,)]
    given = [torch.randn(*shape, device="cpu") for shape in shapes]

    def call(device):
        product, weight, bias, row = ([t.to(device, copy=True)] for t in given)
        norms = _ops.foreach_complete_products_(product, weight, bias, row, bias, [1])
        return [norms.cpu(), product[0].cpu()]

    for actual, expected in zip(call(DEVICE), call("cpu")):
        assert_close(actual, expected, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_roots_of_grams(dtype):
    sizes = [(2, 5, 5), (6, 17, 40), (2, 64, 64), (4, 33, 9)]  # blocks, rows and columns of each
    factors = [torch.randn(*size, dtype=dtype, device="cpu") for size in sizes]
    given = [N @ N.mT if N.shape[1] <= N.shape[2] else N.mT @ N for N in factors]
    ones = [torch.ones(2, dtype=dtype, device="cpu") for _ in sizes]
    m, n = ([size[d] for size in sizes] for d in (1, 2))

    def call(device):
        grams, one = ([t.to(device, copy=True) for t in ts] for ts in (given, ones))
        numbers = [3.0, -4.0, 2.0, 2.0, -1.5, 0.5]
        _ops.foreach_spectral_root_(grams, one, one, one, m, m, n, numbers, 1e-3)
        return [t.cpu() for t in grams]

    for actual, expected in zip(call(DEVICE), call("cpu")):
        assert_close(actual, expected, 50)
