"""What makes the summaries useful: unbiased, mergeable over micro-batches, accurate, repeatable."""

import pytest
import torch
from support.compare import assert_same_by_any_threads
from support.operators import row_mean, row_sketch
from support.patch_cases import CASES

from rlscuda.functional import patches as RF
from rlscuda.reference import patches as reference

CONV = ((3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 1)


def moments(rows, draws):
    """The mean of SᵀS/r over draws and its standard error, entry by entry."""
    products = torch.stack([s.mT @ s / len(s) for s in draws])
    error = products.std(0) / len(products) ** 0.5
    return products.mean(0), error + 1e-12, rows.mT @ rows / len(rows)


@pytest.mark.parametrize("summary", ["sketch", "sample"])
def test_summary_is_unbiased(summary):
    x = torch.randn(6, 2, 5, 6, dtype=torch.float64) + 0.5
    rows = reference.patch_rows(x, *CONV, ones=True)[0]
    options = {"stride": CONV[1], "padding": CONV[2], "rank": 4, "ones": True}
    if summary == "sketch":
        draws = [RF.patch_sketch(x, 3, seed=s, **options)[0] for s in range(4000)]
    else:
        draws = [RF.patch_sample(x, 3, seed=s, **options)[0][0] for s in range(4000)]
    mean, error, expected = moments(rows, draws)
    assert float(((mean - expected) / error).abs().max()) < 5  # of 190 entries, fixed seeds
    assert float((mean - expected).norm() / expected.norm()) < 0.05


def test_rank_rows_and_seeds_are_independent():
    signs = torch.cat([reference.signs(64, 4096, seed) for seed in (0, 1, 2**63 - 1, -1)])
    gram = signs @ signs.mT / 4096
    gram.fill_diagonal_(0)
    assert float(gram.abs().max()) < 6 / 4096**0.5
    assert abs(float(signs.mean())) < 5 / signs.numel() ** 0.5
    lagged = (signs[:, 1:] * signs[:, :-1]).mean(1)
    assert float(lagged.abs().max()) < 5 / 4096**0.5


def test_sample_takes_every_image_and_position_alike():
    x = torch.arange(5 * 12, dtype=torch.float64).reshape(5, 1, 3, 4)
    rows, keys = RF.patch_sample(x, 1, rank=6000, seed=3)
    counts = torch.bincount(rows.flatten().long(), minlength=60).double()
    chi_square = float(((counts - 100) ** 2 / 100).sum())
    assert chi_square < 59 + 5 * (2 * 59) ** 0.5
    assert int(keys.min()) >= 0


@pytest.mark.parametrize("first", [1, 3, 6])
def test_sketches_of_micro_batches_combine(first):
    x = torch.randn(7, 3, 5, 9, dtype=torch.float64)
    options = {"stride": CONV[1], "padding": CONV[2], "rank": 3, "seed": 11, "ones": True}
    whole = RF.patch_sketch(x, 3, **options)
    count = reference.patch_rows(x, *CONV).shape[1]
    staged = count * first // 7
    a = RF.patch_sketch(x[:first], 3, **options)
    b = RF.patch_sketch(x[first:], 3, offset=staged, **options)
    joined = (staged / count) ** 0.5 * a + (1 - staged / count) ** 0.5 * b
    torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [1, 40, 89])
def test_linear_sketches_of_micro_batches_combine(first):
    x = torch.randn(90, 13, dtype=torch.float64)
    a, b = (
        row_sketch(x[:first], 2, 4),
        row_sketch(x[first:], 2, 4, offset=first),
    )
    joined = (first / 90) ** 0.5 * a + (1 - first / 90) ** 0.5 * b
    torch.testing.assert_close(joined, row_sketch(x, 2, 4), rtol=1e-12, atol=1e-12)


def test_samples_of_micro_batches_combine():
    x = torch.randn(20, 3, 5, 9)
    options = {"padding": 1, "rank": 12, "seed": 11}
    rows, keys = RF.patch_sample(x, 3, **options)
    rows_a, keys_a = RF.patch_sample(x[:8], 3, **options)
    rows_b, keys_b = RF.patch_sample(x[8:], 3, offset=8, **options)
    assert 0 < int((keys_a < keys_b).sum()) < 12
    assert torch.equal(torch.minimum(keys_a, keys_b), keys)
    assert torch.equal(torch.where((keys_a < keys_b)[:, None], rows_a, rows_b), rows)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_threads_do_not_change_a_bit(case, memory_format):
    x = case.input()
    many = torch.cat([x] * (1 + 400000 // x.numel()))[:400]

    def run(batch):
        sketch = RF.patch_sketch(batch, case.kernel_size, rank=2, seed=1, **case.options)
        sample, keys = RF.patch_sample(batch, case.kernel_size, rank=2, seed=1, **case.options)
        return RF.patch_mean(batch, case.kernel_size, **case.options), sketch, sample, keys

    assert_same_by_any_threads(
        lambda: torch.randn_like(many).contiguous(memory_format=memory_format), run
    )


@pytest.mark.parametrize("shape", [(60000, 9), (60000, 3), (50000, 2, 2, 1), (3, 1, 300, 400)])
def test_float32_stays_accurate_over_many_rows(shape):
    x = torch.rand(shape)
    if x.dim() == 2:
        mean, exact = row_mean(x), x.double().mean(0)
        sketch = row_sketch(x, 1, 0)
        exact_sketch = row_sketch(x.double(), 1, 0)
    else:
        kernel = min(3, shape[3])
        mean, exact = RF.patch_mean(x, kernel, padding=1), RF.patch_mean(x.double(), kernel,
                                                                         padding=1)  # fmt: skip
        sketch = RF.patch_sketch(x, kernel, padding=1, rank=1, seed=0)
        exact_sketch = RF.patch_sketch(x.double(), kernel, padding=1, rank=1, seed=0)
    assert float((mean - exact).abs().max()) < 5e-7
    assert float((sketch - exact_sketch).abs().max()) < 5e-6
