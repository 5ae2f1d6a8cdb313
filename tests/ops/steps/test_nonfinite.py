"""nonfinite: one element of any tensor, wherever it is."""

import math

import pytest
import torch
from support.operators import nonfinite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_nonfinite_finds_one_element_anywhere(dtype, bad):
    extreme = torch.finfo(dtype)
    for size in (1, 7, 64, 1001):
        fine = torch.full((size,), extreme.max, dtype=dtype)
        fine[::2] = extreme.tiny
        assert not nonfinite([torch.zeros(3), fine])
        for place in {0, size // 2, size - 1}:
            x = fine.clone()
            x[place] = bad
            assert nonfinite([fine, x, torch.ones(2, dtype=torch.float64)])
            assert nonfinite([x[1:]]) == (place > 0)  # at an odd address


def test_nonfinite_of_strided_and_empty_tensors():
    x = torch.ones(4, 6)
    x[1, 1] = math.inf
    assert not nonfinite([x[::2], x[:, ::2], torch.empty(0)])
    assert nonfinite([x[:, 1::2]]) and nonfinite([x.t()])
    image = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert not nonfinite([image, image[:1], torch.ones(3).expand(4, 3)])
    image[1, 2, 3, 4] = math.nan
    assert nonfinite([image]) and not nonfinite([image[:1]])
    result = nonfinite([x])
    assert result.dtype == torch.bool and result.shape == ()


def test_nonfinite_in_a_large_tensor_on_many_threads():
    x = torch.zeros(1_000_000)
    torch.set_num_threads(3)
    try:
        assert not nonfinite([x])
        x[777_777] = math.nan
        assert nonfinite([x])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("tensors, message", [
    ([torch.ones(2, dtype=torch.int64)],
     "nonfinite expects floating-point tensors, got int64"),
])  # fmt: skip
def test_nonfinite_errors(tensors, message):
    with pytest.raises(ValueError, match=message):
        nonfinite(tensors)
