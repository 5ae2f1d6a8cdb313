"""foreach_spectral_root_: scaled inverse roots of the grams of many shapes, by the reference."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from support.compare import assert_close, assert_same_by_any_threads
from support.op_cases import VALID
from torch import Tensor

import rlscuda.functional  # noqa: F401  (its import registers the operators)
from rlscuda import reference
from rlscuda.optim.steps.spectral import COEFFICIENTS

_take_roots = torch.ops.rlscuda.foreach_spectral_root_
NUMBERS = list(itertools.chain(*COEFFICIENTS))
EPS = 1e-3
DTYPES = [torch.float32, torch.float64]


@dataclass
class Shape:
    """Layers of one shape, with random blocks whose gram is that of N [m, n] and P = R R^T."""

    block: int
    columns: int
    groups: int = 1
    parts: int = 1
    layers: int = 1
    scale: float = 1.0
    rank: int | None = None
    dtype: torch.dtype = torch.float64

    def __post_init__(self):
        self.matrices = self.groups * self.layers
        m, n = self.block, self.columns
        self.rows = self.parts * m
        like = {"dtype": torch.float64}
        N = torch.randn(self.matrices * self.parts, m, self.rank or n, **like)
        if self.rank is not None:
            N = N @ torch.randn(self.rank, n, **like)
        R = torch.randn(n, n, **like) / n**0.5 + torch.eye(n, **like)
        D = N @ R @ R.T
        gram = D @ N.mT if m <= n else N.mT @ D
        self.gram = (gram * self.scale).to(self.dtype)
        if m <= n:  # what is above the diagonal is not read
            self.upper = torch.ones(m, m, dtype=torch.bool).triu(1)
            self.symmetric = self.gram.tril() + self.gram.tril(-1).mT
            self.gram[:, self.upper] = math.nan
        else:
            self.symmetric = self.gram.clone()
        self.peak = torch.rand(self.matrices, **like).to(self.dtype)
        self.length = (1 + torch.rand(self.matrices, **like)).to(self.dtype)
        self.power = [torch.rand(self.groups, **like).to(self.dtype) for _ in range(self.layers)]

    def expected(self, coefficients=COEFFICIENTS) -> Tensor:
        size = self.peak.double() * self.length.double() / (self.rows * self.columns) ** 0.5
        power = torch.cat(self.power).double()
        scale = reference.spectral_scale(size, power, self.block, self.columns, EPS)
        grams = self.symmetric.double().unflatten(0, (self.matrices, -1))
        return torch.stack([
            s * reference.spectral_root(K, coefficients)
            for s, blocks in zip(scale, grams) for K in blocks
        ])  # fmt: skip


def run(shapes: list[Shape], numbers=NUMBERS) -> None:
    _take_roots(
        [s.gram for s in shapes], [s.peak for s in shapes], [s.length for s in shapes],
        [p for s in shapes for p in s.power], [s.block for s in shapes], [s.rows for s in shapes],
        [s.columns for s in shapes], numbers, EPS,
    )  # fmt: skip


def check(shape: Shape, scale: float = 1.0) -> None:
    """Within rounding errors of the largest element, which go 44-fold into small ones."""
    expected = shape.expected()
    size = expected.abs().amax((1, 2), keepdim=True)
    if shape.block <= shape.columns:
        assert torch.equal(shape.gram, shape.gram.mT)
    assert_close((shape.gram / size.to(shape.dtype)), expected / size, 20 * scale)


SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 60, 63, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", SIZES)
def test_equals_the_reference(m, dtype):
    shape = Shape(m, m + 40, dtype=dtype)
    run([shape])
    check(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_equals_the_reference_of_blocks_with_less_columns_than_rows(n, dtype):
    shape = Shape(n + 7, n, dtype=dtype)
    run([shape])
    check(shape, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_layers_groups_and_blocks_of_one_call(dtype):
    shapes = [
        Shape(5, 9, groups=3, parts=2, layers=4, dtype=dtype), Shape(64, 90, dtype=dtype),
        Shape(1, 1, groups=8, dtype=dtype), Shape(64, 3, layers=2, parts=3, dtype=dtype),
        Shape(17, 17, layers=2, dtype=dtype),
    ]  # fmt: skip
    run(shapes)
    for shape in shapes:
        check(shape, 50)


@pytest.mark.parametrize("layers", [45, 370])
def test_more_layers_than_one_launch_takes(layers):
    shapes = [Shape(3, 7, layers=layers), Shape(2, 4)]
    run(shapes)
    for shape in shapes:
        check(shape)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_any_number_of_polynomials(count):
    coefficients = [(1.5, -0.5, 0.1 / (i + 1)) for i in range(count)]
    for columns in (9, 4):
        shape = Shape(6, columns)
        run([shape], list(itertools.chain(*coefficients)))
        assert_close(shape.gram, shape.expected(coefficients), 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [70, 20])
@pytest.mark.parametrize("exponent", [-100, -60, 60, 100, 124])
def test_grams_of_any_scale(exponent, columns, dtype):
    """The root goes with the inverse root of the scale, to the bit."""
    torch.manual_seed(1)
    one = Shape(33, columns, dtype=dtype, scale=2.0**-10)
    torch.manual_seed(1)
    other = Shape(33, columns, dtype=dtype, scale=2.0 ** (exponent - 10))
    run([one, other])
    torch.testing.assert_close(other.gram * 2.0 ** (exponent / 2), one.gram, rtol=1e-6, atol=0)
    assert one.gram.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5, 63])
def test_singular_grams(rank, dtype):
    shape = Shape(64, 90, rank=rank, dtype=dtype)
    run([shape])
    check(shape, 20)


@pytest.mark.parametrize("tiny", [0.0, 1e-40])
def test_a_gram_of_next_to_nothing_has_a_bounded_root(tiny):
    shape = Shape(4, 9, dtype=torch.float32)
    shape.gram.fill_(0).diagonal(dim1=1, dim2=2).fill_(tiny)
    run([shape])
    limit = 44 / torch.finfo(torch.float32).tiny ** 0.5
    assert shape.gram.isfinite().all() and shape.gram.abs().max() <= limit


def test_no_momentum_has_no_direction():
    shapes = [Shape(4, 9, layers=2), Shape(9, 4, layers=2)]
    for shape in shapes:
        shape.peak[1] = shape.length[1] = 0
    run(shapes)
    for shape in shapes:
        assert shape.gram[0].any() and not shape.gram[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("columns", [70, 20])
def test_what_is_not_finite_stays_in_its_block(columns, bad, dtype):
    shape, good = (Shape(37, columns, parts=3, dtype=dtype) for _ in range(2))
    good.__dict__.update({k: v.clone() if isinstance(v, Tensor) else v
                          for k, v in vars(shape).items()})  # fmt: skip
    shape.gram[1, 5, 2] = bad
    run([shape])
    run([good])
    assert shape.gram[1].isnan().all()
    assert torch.equal(shape.gram[::2], good.gram[::2])


@pytest.mark.parametrize("name", ["peak", "length", "power"])
def test_a_factor_that_is_nan_is_that_of_its_matrix(name):
    shape = Shape(5, 9, groups=2, parts=2)
    factor = shape.power[0] if name == "power" else getattr(shape, name)
    factor[0] = math.nan
    run([shape])
    assert shape.gram[:2].isnan().all() and shape.gram[2:].isfinite().all()


def test_shapes_without_blocks():  # as of a weight whose rows are on other processes
    empty, shape = Shape(5, 9), Shape(4, 7)
    empty.gram = empty.gram[:0]
    run([empty, shape])
    check(shape)


def test_nothing_depends_on_the_number_of_threads():
    def made(shapes):
        run(shapes)
        return [shape.gram for shape in shapes]

    assert_same_by_any_threads(
        lambda: [Shape(64, 70, layers=7), Shape(9, 11, layers=30), Shape(60, 50, layers=2)], made
    )


def test_opcheck():
    torch.library.opcheck(_take_roots.default, VALID["foreach_spectral_root_"]())


WRONG = {  # message -> argument, value
    r"gram must hold at least one shape": (0, []),
    r"peak and length must have 2 tensors, got 1": (1, [torch.ones(4)]),
    r"block, rows and columns must have 2 entries, got 3": (5, [5, 6, 7]),
    r"coefficients must be three each of 1 to 8 polynomials, got 4": (7, [1.0] * 4),
    r"coefficients must be three each of 1 to 8 polynomials, got 27": (7, [1.0] * 27),
    r"every coefficient must be a finite number .* got nan": (7, [1.0, math.nan, 1.0]),
    r"eps must be finite and not negative, got -1": (8, -1.0),
    r"eps must be finite and not negative, got inf": (8, math.inf),
    r"every gram must be \[b, m, m\], got \[2, 3\]": (0, [torch.ones(2, 3), torch.ones(2, 2, 2)]),
    r"every gram must be \[b, m, m\] of m = 2, got \[2, 3, 3\]": (
        0, [torch.ones(4, 5, 5), torch.ones(2, 3, 3)]),
    r"every gram must have at most 64 rows, got 65": (
        0, [torch.ones(4, 65, 65), torch.ones(2, 2, 2)]),
    r"block, rows and columns must be positive, got 5, 5 and 0": (6, [0, 2]),
    r"every gram must have blocks of its peak's 4 matrices, got \[6, 5, 5\]": (
        0, [torch.ones(6, 5, 5), torch.ones(2, 2, 2)]),
    r"every length must be \[4\], got \[3\]": (2, [torch.ones(3), torch.ones(1)]),
    r"gram must be contiguous": (0, [torch.ones(4, 5, 5).mT, torch.ones(2, 2, 2)]),
    r"gram must be float32 or float64, got bfloat16": (0, [torch.ones(4, 5, 5).bfloat16()] * 2),
    r"peak and length must have the dtype of gram\[0\], float32, got float64": (
        1, [torch.ones(4).double(), torch.ones(1)]),
    r"every power must have the dtype of gram\[0\], float32, got float64": (
        3, [torch.ones(4).double(), torch.ones(1)]),
    r"power must have more than 1 tensors": (3, [torch.ones(4)]),
    r"power must have 2 tensors, got 3": (3, [torch.ones(4), torch.ones(1), torch.ones(1)]),
    r"power must be of the 3 matrices that a gram has left, got 4": (
        3, [torch.ones(1), torch.ones(4), torch.ones(1)]),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_and_nothing_changes(message):
    arguments = VALID["foreach_spectral_root_"]()
    place, value = WRONG[message]
    given = [*arguments[:place], value, *arguments[place + 1 :]]
    if "at most 64" in message:
        given[4], given[6] = [65, 3], [70, 2]
    before = [K.clone() for K in given[0]]
    with pytest.raises(RuntimeError, match=message):
        _take_roots(*given)
    assert all(torch.equal(a, b) for a, b in zip(given[0], before))
