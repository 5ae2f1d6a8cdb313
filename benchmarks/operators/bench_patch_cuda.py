"""`patch_mean`, `patch_sketch` and `patch_sample` on a GPU against the time to read the activation.

The floor is a copy that moves as many bytes as the activation has.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.common import shapes
from rlscuda import functional

IMAGES = (256, 64, 56, 56)
CASES = [
    shapes.PatchCase("[256, 64, 56, 56], 3 × 3", IMAGES, 3, 1),
    shapes.PatchCase("[256, 64, 56, 56], 3 × 3, channels_last", IMAGES, 3, 1, channels_last=True),
    shapes.PatchCase("[256, 64, 56, 56], 3 × 3, bfloat16", IMAGES, 3, 1, torch.bfloat16),
    shapes.PatchCase("[128, 512, 4, 4], 3 × 3", (128, 512, 4, 4), 3, 1),
    shapes.PatchCase("Linear, [8192, 4096]", (8192, 4096)),
]


def eager_mean(x, case):
    image = x.mean(0, keepdim=True, dtype=torch.float32)
    return F.unfold(image, case.kernel, padding=case.padding).mean(2)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_patch(race, case):
    x = case.tensor("cuda")
    args = {"kernel_size": case.kernel, "padding": case.padding}
    mean = functional.patch_mean(x, **args)
    torch.testing.assert_close(mean, eager_mean(x, case), rtol=1e-3, atol=1e-5)
    draw = {"rank": 1, "seed": 1}
    many = {"rank": 16, "seed": 1}
    race(
        case.name,
        {
            "mean": lambda: functional.patch_mean(x, **args),
            "sketch, r = 1": lambda: functional.patch_sketch(x, **args, **draw),
            "sample, r = 16": lambda: functional.patch_sample(x, **args, **many),
            "eager mean": lambda: eager_mean(x, case),
        },
        targets={"mean / copy floor": 1.4} if case is CASES[0] else None,
        ratios=["mean / copy floor", "mean / eager mean", "sketch, r = 1 / copy floor",
                "sample, r = 16 / copy floor"],
        traffic=case.traffic,
        rounds=12,
    )  # fmt: skip
