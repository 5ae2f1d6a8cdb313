"""`patch_mean` against `F.unfold(x).mean`, the best eager form, and copy bandwidth.

`unfold` is what the operator replaces: the mean of the im2col matrix. `eager` is the best eager
form: the mean of the patches is the patch of the mean image. The floor is a copy of as many bytes
as the activation has.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.common import shapes
from benchmarks.operators import patches
from rlscuda import functional, reference


def unfold_mean(x, case):
    columns = F.unfold(x, case.kernel, padding=case.padding)
    return columns.mean((0, 2))


def eager_mean(x, case):
    if case.kernel == 1:
        return x.mean(0)
    image = x.mean(0, keepdim=True)
    return F.unfold(image, case.kernel, padding=case.padding).mean(2)


@pytest.mark.parametrize("case", shapes.PATCHES, ids=lambda c: c.name)
def test_patch_mean(race, case):
    x = case.tensor()
    expected = reference.patch_mean(x, *case.geometry)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    result = functional.patch_mean(x, case.kernel, padding=case.padding)
    torch.testing.assert_close(result.double(), expected, **tolerance)
    if x.dtype == torch.float32:
        for eager in (unfold_mean, eager_mean):
            torch.testing.assert_close(
                eager(x, case).view_as(expected).double(), expected, **tolerance
            )

    def ours():
        return functional.patch_mean(x, case.kernel, padding=case.padding)

    wide, first = case.shape == shapes.WIDE, case is shapes.PATCHES[0]
    lanes = {"ours": ours, "eager": lambda: eager_mean(x, case)}
    if first or not wide:
        lanes["unfold"] = lambda: unfold_mean(x, case)
    if first:
        compiled = torch.compile(eager_mean, dynamic=False)
        lanes["compiled"] = lambda: compiled(x, case)
    race(
        case.name,
        lanes,
        targets={"ours / unfold": 0.05} if first else None,
        traffic=case.traffic if wide else None,
        facts=patches.memory(ours, result, x),
        rounds=10 if wide else 20,
        every={"unfold": 4} if first else None,
    )
