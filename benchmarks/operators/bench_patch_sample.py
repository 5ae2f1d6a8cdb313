"""`patch_sample` against eager PyTorch: r random patches of r random images.

`unfold` takes columns of the im2col matrix. `eager` is the best eager form: it unfolds only the
chosen images.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.common import shapes
from benchmarks.operators import patches
from rlscuda import functional, reference

RANK, SEED = 16, 7


def unfold_sample(x, case):
    columns = F.unfold(x, case.kernel, padding=case.padding)  # [N, n, L]
    image = torch.randint(columns.shape[0], (RANK,))
    place = torch.randint(columns.shape[2], (RANK,))
    return columns[image, :, place]


def eager_sample(x, case):
    image = torch.randint(x.shape[0], (RANK,))
    if case.kernel == 1:
        return x[image]
    columns = F.unfold(x[image], case.kernel, padding=case.padding)
    place = torch.randint(columns.shape[2], (RANK,))
    return columns[torch.arange(RANK), :, place]


@pytest.mark.parametrize("case", shapes.PATCHES, ids=lambda c: c.name)
def test_patch_sample(race, case):
    x = case.tensor()

    def ours():
        return functional.patch_sample(x, case.kernel, padding=case.padding, rank=RANK, seed=SEED)

    rows, keys = ours()
    expected = reference.patch_sample(x, *case.geometry, rank=RANK, seed=SEED)
    torch.testing.assert_close(rows.double(), expected[0], rtol=0, atol=0)
    assert torch.equal(keys, expected[1])

    wide, first = case.shape == shapes.WIDE, case is shapes.PATCHES[0]
    lanes = {"ours": ours, "eager": lambda: eager_sample(x, case)}
    if first or not wide:
        lanes["unfold"] = lambda: unfold_sample(x, case)
    if first:
        compiled = torch.compile(eager_sample, dynamic=False)
        lanes["compiled"] = lambda: compiled(x, case)
    race(
        f"{case.name}, r = {RANK}",
        lanes,
        facts=patches.memory(ours, (rows, keys), x),
        rounds=9 if wide else 20,
        every={"unfold": 4} if first else None,
    )
