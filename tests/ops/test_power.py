"""The running mean of the squared input under wild summaries, and under scales that do change."""

import math

import pytest
import torch
from support.compare import assert_close, random_spd
from support.op_cases import health

import rlscuda.functional as RF
from rlscuda import HeldMatrix, reference

GAIN = 0.01


class Stream:
    """A matrix updated by rows of a given scale, plainly or held back."""

    def __init__(self, hold: int, dtype=torch.float32, n: int = 6):
        self.matrix = HeldMatrix(torch.eye(n, dtype=dtype), hold=hold)
        self.power, self.health = torch.ones(1, dtype=dtype), health()

    def update(self, scale: float) -> torch.Tensor:
        row = torch.ones(self.matrix.P.shape[-1], dtype=self.matrix.P.dtype) * scale
        options = {"power": self.power, "health": self.health, "gain": GAIN}
        return self.matrix.update(row, 1 - GAIN, **options)[1]

    @property
    def refused(self) -> float:
        return self.health[1].item()


@pytest.mark.parametrize("hold", [0, 4])
def test_immense_rows_are_refused_and_counted(hold):
    stream = Stream(hold)
    before = stream.matrix.P.clone()
    assert stream.update(1e21).isnan()  # its square is no float32
    assert torch.equal(stream.matrix.P, before) and stream.power == 1 and stream.refused == 1
    assert stream.update(1.0).isfinite() and not torch.equal(stream.matrix.P, before)
    assert Stream(hold, torch.float64).update(1e21).isfinite()


def test_rows_are_not_too_large_where_nothing_is_normalised():
    P = torch.eye(3)
    _, h = RF.rls_update_(P, torch.full((3,), 1e15))
    assert h.isfinite() and P.isfinite().all()


def test_an_infinite_power_begins_anew():
    stream = Stream(0)
    stream.power.fill_(math.inf)  # as an earlier version would leave it
    stream.update(2.0)
    assert stream.power == 4


@pytest.mark.parametrize("hold", [0, 4])
def test_one_wild_batch_leaves_little_behind(hold):
    stream = Stream(hold)
    stream.update(1e4)
    assert 1 < stream.power < 2
    for _ in range(300):
        stream.update(1.0)
    assert stream.power < 1.06 and stream.refused == 0


@pytest.mark.parametrize("scale, updates", [(1e2, 75), (1e4, 90), (1e-2, 500)])
def test_a_scale_that_changes_is_followed(scale, updates):
    stream = Stream(0)
    for _ in range(updates):
        stream.update(scale)
    assert 0.5 < stream.power / scale**2 < 100


def test_power_equals_the_reference():
    stream, expected = Stream(0, torch.float64), 1.0
    for scale in (1.0, 3.0, 12.0, 1e3, 1e-3, 0.0, 7.0):
        before, exact = expected, stream.matrix.P.clone()
        now, expected = reference.running_power(before, scale**2, GAIN)
        row = torch.full((1, 6), scale, dtype=torch.float64)
        exact, _, h = reference.rls_update(exact, row / now**0.5, 1 - GAIN, GAIN)
        assert_close(stream.update(scale), h)
        assert_close(stream.matrix.P, exact)
        assert math.isclose(stream.power.item(), expected, rel_tol=1e-12)


def test_ordinary_rows_are_averaged_as_ever():
    P, power, expected = random_spd(5), torch.ones(1).double(), 1.0
    for _ in range(50):
        row = torch.randn(2, 5).double()
        RF.rls_update_(P, row, 0.9, 0.1, power=power)
        expected = 0.9 * expected + 0.1 * row.square().mean().item()
    assert math.isclose(power.item(), expected, rel_tol=1e-12)
