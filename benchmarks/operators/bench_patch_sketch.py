"""`patch_sketch` against the eager sketch of `F.unfold(x)`, and copy bandwidth.

`unfold` draws the signs and multiplies the im2col matrix by them. `eager` is the best eager form:
the sketch is the weight gradient of a convolution whose output gradient is the signs.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from benchmarks.common import shapes
from benchmarks.operators import patches
from rlscuda import functional, reference

SEED = 7


def draw(shape):
    return torch.randint(0, 2, shape).float().mul_(2).sub_(1)


def unfold_sketch(x, case, rank):
    columns = F.unfold(x, case.kernel, padding=case.padding)  # [N, n, L]
    signs = draw((columns.shape[0], rank, columns.shape[2])).to(x.dtype)
    return torch.einsum("nrl,ncl->rc", signs, columns) / (signs[:, 0].numel()) ** 0.5


def eager_sketch(x, case, rank):
    if case.kernel == 1:
        return draw((rank, x.shape[0])) @ x.flatten(1) / x.shape[0] ** 0.5
    size = [d + 2 * case.padding - case.kernel + 1 for d in x.shape[2:]]
    signs = draw((x.shape[0], rank, *size)).to(x.dtype)
    shape = (rank, x.shape[1], case.kernel, case.kernel)
    sketch = conv2d_weight(x, shape, signs, padding=case.padding)
    return sketch.flatten(1) / (signs[:, 0].numel()) ** 0.5


@pytest.mark.parametrize("rank", [1, 16], ids="r={}".format)
@pytest.mark.parametrize("case", shapes.PATCHES, ids=lambda c: c.name)
def test_patch_sketch(race, case, rank):
    x = case.tensor()

    def ours():
        return functional.patch_sketch(x, case.kernel, padding=case.padding, rank=rank, seed=SEED)

    result = ours()
    few = x[:8]
    small = functional.patch_sketch(few, case.kernel, padding=case.padding, rank=rank, seed=SEED)
    expected = reference.patch_sketch(few, *case.geometry, rank=rank, seed=SEED)
    torch.testing.assert_close(small.double(), expected, rtol=1e-4, atol=1e-4)

    wide, first = case.shape == shapes.WIDE, case is shapes.PATCHES[0] and rank == 1
    lanes = {"ours": ours, "eager": lambda: eager_sketch(x, case, rank)}
    if first or not wide:
        lanes["unfold"] = lambda: unfold_sketch(x, case, rank)
    if first:
        compiled = torch.compile(eager_sketch, dynamic=False)
        lanes["compiled"] = lambda: compiled(x, case, rank)
    race(
        f"{case.name}, r = {rank}",
        lanes,
        traffic=case.traffic if wide else None,
        facts=patches.memory(ours, result, x),
        rounds=8 if wide else 20,
        every={"unfold": 4} if first else None,
    )
