"""The patch ops against their float64 specification, over shapes, dtypes and memory layouts."""

import pytest
import torch
import torch.nn.functional as F
from support.operators import row_mean, row_sample, row_sketch
from support.patch_cases import CASES, DTYPES, layouts

from rlscuda.functional import patches as RF
from rlscuda.reference import patches as reference

TOLERANCE = {torch.float64: 1e-12}  # relative to the largest entry of x; float32 sums otherwise
DRAW = {"rank": 5, "seed": -7, "offset": 1000003}


def close(actual, expected, x):
    bound = TOLERANCE.get(x.dtype, 2e-6) * max(1.0, float(x.double().abs().max())) * 4
    assert actual.shape == expected.shape
    assert actual.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert float((actual.double() - expected).abs().max()) <= bound


def check(x, case, ones):
    geometry = RF.conv_geometry(case.kernel_size, **case.options)
    mode = {"ones": ones, **case.options}
    close(RF.patch_mean(x, case.kernel_size, **mode),
          reference.patch_mean(x, *geometry, ones), x)  # fmt: skip
    sketch = RF.patch_sketch(x, case.kernel_size, **mode, **DRAW)
    expected = reference.patch_sketch(x, *geometry, ones, **DRAW)
    # the root of the number of patches scales the rounding of a sum of that many signed terms
    close(sketch / 4, expected / 4, x)
    rows, keys = RF.patch_sample(x, case.kernel_size, **mode, **DRAW)
    expected_rows, expected_keys = reference.patch_sample(x, *geometry, ones, **DRAW)
    assert torch.equal(rows.double(), expected_rows)
    assert torch.equal(keys, expected_keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_the_specification(case, dtype):
    check(case.input(dtype), case, ones=dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_any_memory_layout(case, dtype):
    for x in layouts(case.input(dtype)).values():
        check(x, case, ones=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_expanded_batch(case):
    one = case.input()[:1]
    check(one.expand(6, -1, -1, -1), case, ones=False)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_convolution_sees_the_rows_of_the_specification():
    for case in CASES:
        x = case.input(torch.float64)
        kernel = RF.conv_geometry(case.kernel_size, **case.options)[0]
        options = dict(case.options)
        if isinstance(options.get("padding"), tuple) and len(options["padding"]) == 4:
            x_in, options["padding"] = F.pad(x, options["padding"]), 0
        else:
            x_in = x
        groups = options.get("groups", 1)
        conv = torch.nn.Conv2d(
            x.shape[1], 2 * groups, tuple(kernel), bias=False, dtype=torch.float64, **options
        )
        geometry = RF.conv_geometry(case.kernel_size, **case.options)
        rows = reference.patch_rows(x, *geometry)
        expected = conv(x_in).unflatten(1, (groups, 2)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
        torch.testing.assert_close(rows @ conv.weight.unflatten(0, (groups, 2)).flatten(2).mT,
                                   expected)  # fmt: skip


def test_mean_is_that_of_unfold():
    x = torch.randn(3, 4, 9, 8)
    expected = F.unfold(x, 3, padding=1, stride=2).mean((0, 2))
    torch.testing.assert_close(RF.patch_mean(x, 3, 2, 1)[0], expected)


def test_unbatched_image_is_a_batch_of_one():
    x = torch.randn(4, 9, 8)
    assert torch.equal(RF.patch_mean(x, 3), RF.patch_mean(x[None], 3))


@pytest.mark.parametrize("shape", [(7, 30), (3, 5, 9), (300, 1), (11,)])
def test_rows_of_a_linear_input(shape):
    x = torch.randn(shape, dtype=torch.float64)
    rows = F.pad(x.reshape(-1, shape[-1]), (0, 1), value=1.0)
    torch.testing.assert_close(row_mean(x, ones=True), rows.mean(0))
    signs = reference.signs(3, len(rows), 5, 70)
    sketch = row_sketch(x, 3, 5, offset=70, ones=True)
    torch.testing.assert_close(sketch, signs @ rows / len(rows) ** 0.5)
    sample, keys = row_sample(x, 3, 5, offset=70, ones=True)
    assert keys.shape == (3,)
    assert all(any(torch.equal(s, r) for r in rows) for s in sample)


def test_transposed_linear_input():
    x = torch.randn(40, 90, dtype=torch.float64).T
    torch.testing.assert_close(row_mean(x), x.mean(0))
    expected = reference.signs(2, 90, 0) @ x / 90**0.5
    torch.testing.assert_close(row_sketch(x, 2, 0), expected)


def test_half_precision_values_convert_exactly():
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype).reshape(1, 2**16)
        for row in (x, torch.stack([x, -x], -1)[..., 0]):  # dense: in vectors; strided: one by one
            mean = row_mean(row)  # of one row: the row itself
            assert torch.equal(mean.nan_to_num(7.0), x[0].float().nan_to_num(7.0))


def test_nonfinite_input_shows_in_the_mean_and_the_sketch():
    for value in (float("nan"), float("inf")):
        x = torch.zeros(2, 9, 8, 9)
        x[1, 3, 4, 5] = value
        assert not RF.patch_mean(x, 3)[0, 27:36].isfinite().all()
        assert not RF.patch_sketch(x, 3, rank=2, seed=0)[0, :, 27:36].isfinite().all()
        assert RF.patch_mean(x, 3)[0, :27].isfinite().all()
        assert RF.patch_sketch(x, 3, rank=2, seed=0)[0, :, :27].isfinite().all()
