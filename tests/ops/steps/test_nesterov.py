"""foreach_nesterov_: the momentum of the gradients of many layers, against the reference."""

import copy
import itertools
import math

import pytest
import torch
from support.compare import assert_close, assert_same_by_any_threads
from support.op_cases import VALID
from torch import Tensor

import rlscuda.functional  # noqa: F401  (its import registers the operators)
from rlscuda import reference

_nesterov = torch.ops.rlscuda.foreach_nesterov_
PAIRS = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16), (torch.float64, torch.float64), (torch.float64, torch.float32),
]  # fmt: skip
# groups, rows and columns of a matrix, rows of the result: one element, a warp's row and a block's
SHAPES = [
    (1, 1, 1, 1), (1, 5, 7, 8), (3, 2, 33, 2), (8, 1, 9, 3), (1, 70, 130, 128), (2, 3, 300, 4),
]  # fmt: skip


def tiny_of(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


class Layers:
    """The arguments of a call, and what it must make of them, in float64."""

    def __init__(self, shape, compute, storage=None, count=3):
        self.groups, self.rows, self.columns, self.padded = shape
        c = self.groups * self.rows
        self.grad = [torch.randn(c, self.columns, dtype=compute) for _ in range(count)]
        kept = c if storage is not None else 0
        self.bias = [torch.randn(kept).to(storage or compute) for _ in range(count)]
        n = self.columns + (storage is not None)
        self.average = [torch.randn(c, n, dtype=compute) for _ in range(count)]
        self.h = 1 + torch.rand(count * self.groups + 2, dtype=compute)
        self.place = [2 + self.groups * layer for layer in reversed(range(count))]

    @property
    def lists(self) -> list[list]:
        """The arguments that have an entry a layer, but for the places."""
        each = [[number] * len(self.average) for number in (self.groups, self.padded)]
        return [self.grad, self.bias, self.average, *each]

    def run(self, momentum: float) -> tuple[Tensor, Tensor, Tensor]:
        grad, bias, average, groups, rows = self.lists
        flat, peak, length = _nesterov(
            grad, bias, average, self.h, self.place, groups, rows, momentum
        )
        return flat.view(len(peak), self.padded, average[0].shape[1]), peak, length

    def expected(self, momentum: float) -> tuple[list[Tensor], Tensor]:
        averages, ahead = [], []
        for layer, M in enumerate(self.average):
            G = self.grad[layer].double()
            if len(self.bias[layer]):
                G = torch.cat([G, self.bias[layer][:, None].double()], 1)
            M = M.double().view(self.groups, self.rows, -1)
            G = G.view_as(M)
            new, N = reference.nesterov(M, G, momentum)
            place = self.place[layer]
            stays = ~self.h[place : place + self.groups].isfinite()[:, None, None]
            averages.append(torch.where(stays, M, new).flatten(0, 1))
            out = M.new_zeros(self.groups, self.padded, M.shape[2])
            out[:, : self.rows] = torch.where(stays, momentum * M, N)
            ahead.append(out)
        return averages, torch.cat(ahead)

    def check(self, momentum: float = 0.9) -> None:
        averages, ahead = self.expected(momentum)
        before = [M.data_ptr() for M in self.average]
        out, peak, length = self.run(momentum)
        assert before == [M.data_ptr() for M in self.average]
        for M, exact in zip(self.average, averages):
            assert_close(M, exact, 4)
        exact = ahead.abs().amax((1, 2)) if self.rows else peak.new_zeros(len(peak))
        assert_close(peak, exact, 4)
        assert_close(out, ahead / exact.clamp(min=tiny_of(out))[:, None, None], 4)
        assert_close(length, out.double().square().sum((1, 2)).sqrt(), 4)
        largest = out.abs().amax((1, 2))
        assert torch.equal(largest, (peak >= tiny_of(out)).to(largest))


@pytest.mark.parametrize("compute, storage", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_with_biases(shape, compute, storage):
    Layers(shape, compute, storage).check()


@pytest.mark.parametrize("momentum", [0.0, 0.4, 0.5, 0.99])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_without(shape, momentum):
    Layers(shape, torch.float32).check(momentum)


@pytest.mark.parametrize("count", [1, 51, 409])
def test_more_layers_than_one_launch_takes(count):
    Layers((2, 2, 3, 3), torch.float32, torch.float32, count).check()


@pytest.mark.parametrize("compute, storage", PAIRS, ids=str)
def test_layers_of_many_shapes_are_as_by_themselves(compute, storage):
    """With biases and without, of a warp's rows and a block's, in one call."""
    parts = [Layers(shape, compute, (None, storage)[i % 2]) for i, shape in enumerate(SHAPES * 2)]
    own = copy.deepcopy(parts)
    lists = [list(itertools.chain(*each)) for each in zip(*(part.lists for part in parts))]
    starts = itertools.accumulate((len(part.h) for part in parts), initial=0)
    places = [start + place for start, part in zip(starts, parts) for place in part.place]
    grad, bias, average, groups, rows = lists
    h = torch.cat([part.h for part in parts])
    together = _nesterov(grad, bias, average, h, places, groups, rows, 0.9)
    apart = [[t.flatten() for t in part.run(0.9)] for part in own]
    for joined, separate in zip(together, zip(*apart)):
        assert torch.equal(joined, torch.cat(separate))
    for M, exact in zip(average, itertools.chain(*(part.average for part in own))):
        assert torch.equal(M, exact)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_refused_matrix_takes_nothing_in(shape, bad):
    layers = Layers(shape, torch.float64, torch.float64)
    layers.h[layers.place[1]] = bad
    for t in (layers.grad[1], layers.bias[1]):
        t[: layers.rows] = bad
    before = layers.average[1][: layers.rows].clone()
    layers.check()
    assert torch.equal(layers.average[1][: layers.rows], before)


@pytest.mark.parametrize("columns", [40, 400])
def test_a_matrix_with_nan_is_nan_and_no_other(columns):
    layers = Layers((2, 3, columns, 3), torch.float32)
    layers.average[0][1, 5], layers.average[1][4, columns - 1] = math.nan, math.nan
    out, peak, length = layers.run(0.9)
    nan = [True, False, False, True, False, False]
    assert peak.isnan().tolist() == length.isnan().tolist() == nan
    assert out.isnan().any(2).any(1).tolist() == nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [40, 400])
def test_momentum_of_any_size(columns, dtype):
    """No square leaves the range of the dtype; what is no normal number is not blown up to one."""
    info = torch.finfo(dtype)
    sizes = [0.0, info.smallest_normal / 64, info.tiny * 2, 1.0, info.max / 8]
    layers = Layers((1, 3, columns, 4), dtype, count=len(sizes))
    for average, grad, size in zip(layers.average, layers.grad, sizes):
        grad.zero_()
        average.copy_(torch.rand_like(average) * size)
    out, peak, length = layers.run(0.9)
    exact = torch.stack(layers.average).double() * 0.9  # as it is now
    assert_close(peak / (info.max / 8), exact.amax((1, 2)) / (info.max / 8))
    assert out.isfinite().all() and length.isfinite().all()
    assert not out[0].any() and length[0] == 0
    assert out[1].max() < 1 / 32 and (out[2:].amax((1, 2)) == 1).all()


def test_nothing_depends_on_the_number_of_threads():
    assert_same_by_any_threads(
        lambda: Layers((2, 100, 130, 128), torch.float32), lambda layers: layers.run(0.9)
    )


def test_layers_without_rows():  # as of a weight whose rows are on other processes
    layers = Layers((1, 0, 5, 2), torch.float32, torch.float32)
    out, peak, length = layers.run(0.9)
    assert out.shape == (3, 2, 6) and not out.any() and not peak.any() and not length.any()


def test_gradients_that_lie_anyhow():
    layers = Layers((1, 6, 5, 6), torch.float32, torch.float32)
    layers.grad = [g.t().contiguous().t() for g in layers.grad]
    layers.bias = [torch.stack([b, b], 1)[:, 0] for b in layers.bias]
    layers.check()


WRONG = {  # message -> argument, value
    r"average must hold at least one layer": (2, []),
    r"grad and grad_bias must have 2 tensors, got 1": (0, [torch.randn(4, 3)]),
    r"place, groups and rows must have 2 entries, got 1": (4, [0]),
    r"momentum must be in \[0, 1\), got 1": (7, 1.0),
    r"momentum must be in \[0, 1\), got nan": (7, math.nan),
    r"groups must divide 4 rows, got 3": (5, [2, 3]),
    r"groups must divide 4 rows, got 0": (5, [0, 2]),
    r"rows must be at least 2, got 1": (6, [3, 1]),
    r"place must be in h, which has 5 elements, got 4 for 2 groups": (4, [4, 0]),
    r"place must be in h, which has 5 elements, got -1 for 2 groups": (4, [0, -1]),
    r"grad must have 5 columns, or one less with a grad_bias, got 3":
        (2, [torch.ones(4, 4), torch.ones(4, 5)]),
    r"every grad must be \[4, 3\], got \[5, 3\]": (0, [torch.ones(4, 3), torch.ones(5, 3)]),
    r"grad must have 4 columns, or one less with a grad_bias, got 2": (0, [torch.ones(4, 2)] * 2),
    r"every grad_bias must be \[4\], got \[3\]": (1, [torch.ones(4), torch.ones(3)]),
    r"h must have the dtype of average\[0\], float32, got float64": (3, torch.ones(5).double()),
    r"average must have columns, got \[4, 0\]": (2, [torch.ones(4, 0), torch.ones(4, 4)]),
    r"grad must have the dtype of average": (0, [torch.ones(4, 3).double()] * 2),
    r"every grad_bias must be \[0\], got \[4\]": (0, [torch.ones(4, 4)] * 2),
    r"average must be \[c, n\] and grad": (2, [torch.ones(16), torch.ones(16)]),
    r"grad_bias must be float32, bfloat16 or float16": (1, [torch.ones(4).double()] * 2),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused_and_nothing_changes(message):
    arguments = VALID["foreach_nesterov_"]()
    before = [M.clone() for M in arguments[2]]
    place, value = WRONG[message]
    given = [*arguments[:place], value, *arguments[place + 1 :]]
    with pytest.raises(RuntimeError, match=message):
        _nesterov(*given)
    assert all(torch.equal(a, b) for a, b in zip(arguments[2], before))
