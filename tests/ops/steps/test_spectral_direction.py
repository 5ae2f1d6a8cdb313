"""foreach_spectral_direction_: the directions of the blocks of many layers, by the reference."""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from support.compare import assert_close, assert_same_by_any_threads, random_spd
from support.op_cases import VALID
from torch import Tensor

import rlscuda.functional  # noqa: F401  (its import registers the operators)
from rlscuda import reference
from rlscuda.optim.steps.spectral import COEFFICIENTS

_take_directions = torch.ops.rlscuda.foreach_spectral_direction_
NUMBERS = list(itertools.chain(*COEFFICIENTS))
EPS = 1e-3
DTYPES = [torch.float32, torch.float64]


@dataclass
class Shape:
    """Layers of one shape: random momenta, and matrices that some layers have multiplied by."""

    block: int
    columns: int
    groups: int = 1
    parts: int = 1
    layers: int = 1
    dtype: torch.dtype = torch.float64
    left: tuple[bool, ...] = (True, False)  # whose products are to be made, in turn
    P: list[Tensor] = field(init=False)

    def __post_init__(self):
        self.matrices, self.rows = self.groups * self.layers, self.parts * self.block
        self.blocks = self.groups * self.parts
        n = self.columns
        like = {"dtype": torch.float64}
        self.momentum = torch.randn(self.matrices * self.parts, self.block, n, **like)
        self.momentum = self.momentum.to(self.dtype)
        matrices = [random_spd(self.groups, n, dtype=self.dtype) for _ in range(self.layers)]
        self.product = self.momentum.new_full(self.momentum.shape, math.nan)
        self.P = []
        size = self.groups * self.parts
        for i, P in enumerate(matrices):
            if self.left[i % len(self.left)]:
                self.P.append(P[0] if self.groups == 1 else P)
            else:
                mine = slice(i * size, (i + 1) * size)
                rows = self.momentum[mine].unflatten(0, (self.groups, -1)).flatten(1, 2)
                self.product[mine] = (rows @ P).reshape(size, self.block, n)
                self.P.append(P.new_empty(0))
        self.wide = torch.cat(matrices).double().repeat_interleave(self.parts, 0)
        self.peak = torch.rand(self.matrices, **like).to(self.dtype)
        self.length = (1 + torch.rand(self.matrices, **like)).to(self.dtype)
        self.power = [torch.rand(self.groups, **like).to(self.dtype) for _ in range(self.layers)]
        self.given = self.momentum.clone().double()

    def expected(self) -> Tensor:
        size = self.peak.double() * self.length.double() / (self.rows * self.columns) ** 0.5
        power = torch.cat(self.power).double()
        scale = reference.spectral_scale(size, power, self.block, self.columns, EPS)
        directions = []
        for s, N, P in zip(scale.repeat_interleave(self.parts), self.given, self.wide):
            D = N @ P
            if self.block <= self.columns:
                directions.append(s * reference.spectral_root(D @ N.T, COEFFICIENTS) @ D)
            else:
                directions.append(s * D @ reference.spectral_root(N.T @ D, COEFFICIENTS))
        return torch.stack(directions)


def run(shapes: list[Shape]) -> None:
    def of_layers(*numbers: str) -> list[list[int]]:
        return [[getattr(s, name) for s in shapes for _ in range(s.layers)] for name in numbers]

    momentum, product = (
        torch.cat([getattr(s, name).flatten() for s in shapes]) for name in ("momentum", "product")
    )
    _take_directions(
        momentum, product, [P for s in shapes for P in s.P], torch.cat([s.peak for s in shapes]),
        torch.cat([s.length for s in shapes]), [p for s in shapes for p in s.power],
        *of_layers("blocks", "block", "rows", "columns"), NUMBERS, EPS,
    )  # fmt: skip
    for shape, part in zip(shapes, momentum.split([s.momentum.numel() for s in shapes])):
        shape.momentum = part.view(shape.momentum.shape)


def check(shape: Shape, scale: float = 1.0) -> None:
    """Within rounding errors of the largest element, which go 44-fold into small ones."""
    expected = shape.expected()
    size = expected.abs().amax((1, 2), keepdim=True)
    assert_close(shape.momentum / size.to(shape.dtype), expected / size, 30 * scale)


SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 60, 63, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 65, 79, 80, 200])
@pytest.mark.parametrize("block", SIZES)
def test_equals_the_reference(block, columns, dtype):
    shapes = [Shape(block, columns, dtype=dtype, left=(left,)) for left in (True, False)]
    for shape in shapes:
        run([shape])
        check(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES[:-1])
def test_equals_the_reference_of_blocks_with_less_columns_than_rows(n, dtype):
    for block in {n + 1, min(n + 17, 64)} - {n}:
        shape = Shape(block, n, dtype=dtype, parts=2)
        run([shape])
        check(shape, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_layers_groups_and_blocks_of_one_call(dtype):
    shapes = [
        Shape(5, 9, groups=3, parts=2, layers=4, dtype=dtype), Shape(64, 90, dtype=dtype),
        Shape(1, 1, groups=8, dtype=dtype), Shape(64, 3, layers=3, parts=3, dtype=dtype),
        Shape(17, 17, layers=2, dtype=dtype), Shape(50, 301, parts=2, layers=2, dtype=dtype),
    ]  # fmt: skip
    run(shapes)
    for shape in shapes:
        check(shape, 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("columns", [70, 20])
def test_what_is_not_finite_stays_in_its_block(columns, bad, dtype):
    torch.manual_seed(2)
    shape = Shape(37, columns, parts=3, dtype=dtype)
    torch.manual_seed(2)
    good = Shape(37, columns, parts=3, dtype=dtype)
    shape.momentum[1, 5, 2] = bad
    run([shape])
    run([good])
    assert shape.momentum[1].isnan().any()
    assert torch.equal(shape.momentum[::2], good.momentum[::2])


def test_no_momentum_has_no_direction():
    shapes = [Shape(4, 9, layers=2), Shape(9, 4, layers=2)]
    for shape in shapes:
        shape.peak[1] = shape.length[1] = 0
    run(shapes)
    for shape in shapes:
        assert shape.momentum[0].any() and not shape.momentum[1].any()


def test_nothing_depends_on_the_number_of_threads():
    def made(shapes):
        run(shapes)
        return [shape.momentum for shape in shapes]

    assert_same_by_any_threads(
        lambda: [Shape(64, 170, layers=7), Shape(9, 11, layers=30), Shape(60, 50, layers=2)], made
    )


def test_opcheck():
    torch.library.opcheck(_take_directions.default, VALID["foreach_spectral_direction_"]())


WRONG = {  # message -> argument, value
    r"P must hold at least one layer": (2, []),
    r"power must have 3 tensors, got 1": (5, [torch.ones(1)]),
    r"blocks, block, rows and columns must have 3 entries, got 2": (7, [5, 5]),
    r"momentum and product must be \[152\], got \[8, 19\]": (0, torch.ones(8, 19)),
    r"momentum and product must be \[152\], got \[151\]": (1, torch.ones(151)),
    r"peak and length must be \[5\], got \[4\]": (4, torch.ones(4)),
    r"product, peak and length must have the dtype of momentum, float32, got float64": (
        1, torch.ones(152).double()),
    r"every P and power must have the dtype of momentum, float32, got float64": (
        5, [torch.ones(1), torch.ones(3).double(), torch.ones(1)]),
    r"every P must be \[7, 7\], got \[7, 6\]": (
        2, [torch.ones(7, 6), torch.ones(3, 7, 7), torch.ones(0)]),
    r"every P must be \[3, 7, 7\], got \[4, 7, 7\]": (
        2, [torch.ones(7, 7), torch.ones(4, 7, 7), torch.ones(0)]),
    r"every P must be \[3, 7, 7\], got \[7, 7\]": (
        2, [torch.ones(7, 7), torch.ones(7, 7), torch.ones(0)]),
    r"its power's 3 matrices, got 4 of 35 elements": (6, [1, 4, 2]),
    r"its power's 1 matrices, got 99999 of 35 elements": (6, [99999, 3, 2]),
    r"its power's 1 matrices, got 0 of 35 elements": (6, [0, 3, 2]),
    r"block, rows and columns must be positive, .* got 0, 5 and 7": (7, [0, 5, 3]),
    r"block, rows and columns must be positive, .* got 5, 9223372036854775807 and 7": (
        8, [2**63 - 1, 5, 6]),
    r"block or columns must be at most 64, got 65 and 70": None,
    r"momentum must be contiguous": (0, torch.ones(304)[::2]),
    r"momentum must be float32 or float64, got bfloat16": None,
    r"coefficients must be three each of 1 to 8 polynomials, got 4": (10, [1.0] * 4),
    r"every coefficient must be a finite number .* got nan": (10, [1.0, math.nan, 1.0]),
    r"eps must be finite and not negative, got -1": (11, -1.0),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_and_nothing_changes(message):
    given = VALID["foreach_spectral_direction_"]()
    if "at most 64" in message:
        given[7], given[9] = [65, 5, 3], [70, 7, 2]
    elif "bfloat16" in message:
        for i, value in enumerate(given):
            if isinstance(value, Tensor):
                given[i] = value.bfloat16()
    else:
        place, value = WRONG[message]
        given[place] = value
    before = given[0].clone()
    with pytest.raises(RuntimeError, match=message):
        _take_directions(*given)
    assert torch.equal(given[0], before)


def test_what_is_written_shares_no_memory():
    given = VALID["foreach_spectral_direction_"]()
    given[1] = given[0]
    with pytest.raises(RuntimeError, match="momentum and product must not share memory"):
        _take_directions(*given)
