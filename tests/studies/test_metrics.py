"""What a curve says, and the difference of two arms."""

import math
import random
import statistics

import pytest

from rlscuda.studies import LADDER, auc, paired, prunability


def curve(seed):
    stream = random.Random(seed)
    return [stream.uniform(0.6, 0.9) for _ in LADDER]


@pytest.mark.parametrize("seed", range(5))
def test_prunability_grows_with_the_tolerance_from_0(seed):
    found = [prunability(LADDER, curve(seed), t) for t in (0, 0.001, 0.01, 0.1, 0.2, 1)]
    assert found == sorted(found) and found[0] >= 0 and found[-1] == LADDER[-1]


def test_prunability_stops_at_the_first_drop_that_is_too_large():
    assert prunability([0, 0.2, 0.4, 0.6], [0.9, 0.8, 0.9, 0.9], 0.05) == 0
    assert prunability([0, 0.2, 0.4, 0.6], [0.9, 0.95, 0.85, 0.7], 0.05) == 0.4
    assert prunability([0, 0.5], [0.90, 0.89], 0.01) == 0.5  # a point is within a point


def test_area_of_a_constant_curve_is_1_and_scales_do_not_matter():
    assert auc(LADDER, [0.7] * len(LADDER)) == 1
    assert auc([0, 0.5], [0.8, 0.4]) == 0.75
    values = curve(0)
    assert math.isclose(auc(LADDER, values), auc(LADDER, [100 * v for v in values]))


def test_paired_differences():
    first, second = curve(1), curve(2)
    differences = [a - b for a, b in zip(first, second)]
    mean, error = paired(first, second)
    assert math.isclose(mean, statistics.fmean(first) - statistics.fmean(second))
    assert math.isclose(error, statistics.stdev(differences) / math.sqrt(len(first)))
    assert paired([0.5], [0.25]) == (0.25, None)


def test_errors():
    with pytest.raises(ValueError, match="ratios must ascend from 0"):
        prunability([0.1, 0.5], [1, 1], 0.01)
    with pytest.raises(ValueError, match="an accuracy a ratio, got 1 of 2"):
        auc([0, 0.5], [1])
    with pytest.raises(ValueError, match="must be positive"):
        auc([0, 0.5], [0, 0])
    with pytest.raises(ValueError, match="tolerance must be >= 0"):
        prunability([0, 0.5], [1, 1], -1)
    with pytest.raises(ValueError, match="expected pairs"):
        paired([], [])
