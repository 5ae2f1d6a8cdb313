"""`RLSFilterBank` against `torch.bmm` and `numpy.einsum` on stacks, and a loop of filters.

10,000 filters of n = 10: every one by a sample of its own, and 64 of them by index, where the
others gather and scatter. bmm and einsum are the textbook formula, which gains no ridge; the loop
is of `RLSFilter` objects, of which it takes a tenth and is scaled up.
"""

import numpy as np
import pytest
import torch

from rlscuda import RLSFilter, RLSFilterBank

B, N, SOME = 10_000, 10, 64
DTYPES = {"float32": np.float32, "float64": np.float64}
FORGETTING = 0.99


class Stack:
    """The formula on stacked matrices, for all rows or for some."""

    def __init__(self, dtype):
        self.P = np.tile(np.eye(N, dtype=dtype), (B, 1, 1))
        self.W = np.zeros((B, N), dtype)

    def bmm(self, x, y, index=None):
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        P, W = torch.from_numpy(self.P), torch.from_numpy(self.W)
        p, w = (P, W) if index is None else (P[index], W[index])
        u = torch.bmm(p, x[..., None])
        h = FORGETTING + torch.bmm(x[:, None], u)
        error = y - (w * x).sum(1)
        w += (error / h[:, 0, 0])[:, None] * u[..., 0]
        p.baddbmm_(u, u.mT / h, alpha=-1).div_(FORGETTING)
        if index is not None:
            P[index], W[index] = p, w

    def einsum(self, x, y, index=None):
        p, w = (self.P, self.W) if index is None else (self.P[index], self.W[index])
        u = np.einsum("bij,bj->bi", p, x)
        h = FORGETTING + np.einsum("bi,bi->b", x, u)
        error = y - np.einsum("bi,bi->b", w, x)
        w += (error / h)[:, None] * u
        p -= np.einsum("bi,bj->bij", u, u / h[:, None])
        p /= FORGETTING
        if index is not None:
            self.P[index], self.W[index] = p, w


def samples(rows, dtype):
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, N)).astype(dtype), rng.standard_normal(rows).astype(dtype)


def check(dtype, index, x, y):
    """Without a ridge, the bank is the formula."""
    bank, bmm, einsum = RLSFilterBank(B, N, 1, FORGETTING, ridge=0, dtype=dtype), *two(dtype)
    tolerance = 1e-12 if dtype == np.float64 else 2e-4
    for _ in range(3):
        bank.update(x, y, index=index)
        bmm.bmm(x, y, index)
        einsum.einsum(x, y, index)
    for other in (bmm, einsum):
        np.testing.assert_allclose(bank.P, other.P, tolerance, tolerance)
        np.testing.assert_allclose(bank.W[:, 0], other.W, tolerance, tolerance)


def two(dtype):
    return Stack(dtype), Stack(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_update(race, some, dtype):
    """A sample for each of 10,000 filters, or for 64 of them."""
    rows, kind = SOME if some else B, DTYPES[dtype]
    index = np.random.default_rng(1).permutation(B)[:SOME] if some else None
    x, y = samples(rows, kind)
    check(kind, index, x, y)
    bank, (bmm, einsum) = RLSFilterBank(B, N, 1, FORGETTING, dtype=kind), two(kind)
    part = 1.0 if some else 0.1
    targets = y.tolist()  # which RLSFilter takes fastest
    filters = [RLSFilter(N, 1, FORGETTING, dtype=kind) for _ in range(int(rows * part))]

    def loop():
        for f, row, target in zip(filters, x, targets, strict=False):
            f.update(row, target)

    race(
        f"{rows:,} of {B:,} filters, n = {N}, {dtype}",
        {
            "ours": lambda: bank.update(x, y, index=index),
            "bmm": lambda: bmm.bmm(x, y, index),
            "einsum": lambda: einsum.einsum(x, y, index),
            "loop": loop,
        },
        targets={"ours / bmm": 0.5},
        facts={"filters": rows},
        work={"loop": part},
        rounds=20,
        every={"loop": 4},
    )
