"""Ratios by round, and counts from ratios, targets and scopes."""

import pytest
import torch

from rlscuda.pruning.choice.ranking import Candidate
from rlscuda.pruning.choice.targets import Ladder, check_ratio
from rlscuda.pruning.schedule import CURVES, ratio_after


def candidate(costs, units=None, gone=0):
    cost = torch.tensor(costs, dtype=torch.float64)
    return Candidate(torch.arange(len(cost)), cost, units or len(cost) + 1, gone)


def ladder(scope="layer", round_to=1, gone=0):
    return Ladder(
        {
            "a": candidate([0.1, 0.2, 0.3, 0.9, 2.0, 3.0, 4.0], gone=gone),
            "b": candidate([0.25, 0.5, 5.0], gone=gone),
        },
        scope,
        round_to,
    )


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_curves_rise_from_nothing_to_the_ratio(curve, rounds):
    ratios = [ratio_after(curve, 0.7, k, rounds) for k in range(rounds + 1)]
    assert ratios[0] == 0 and ratios[-1] == pytest.approx(0.7)
    assert all(a <= b for a, b in zip(ratios, ratios[1:]))


def test_iterative_takes_the_same_share_of_what_is_left():
    left = [1 - ratio_after("iterative", 0.8, k, 4) for k in range(5)]
    assert [b / a for a, b in zip(left, left[1:])] == pytest.approx([0.2**0.25] * 4)


def test_cubic_is_that_of_gradual_pruning():
    assert ratio_after("cubic", 0.5, 1, 2) == pytest.approx(0.5 * (1 - 0.5**3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("square", 0.5, 1, 2), "curve must be one_shot"),
        (("linear", 1.0, 1, 2), r"ratio must be in \[0, 1\), got 1.0"),
        (("linear", 0.5, 3, 2), "0 <= done <= rounds"),
        (("linear", 0.5, 0, 0), "rounds > 0"),
    ],
)
def test_wrong_rounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        ratio_after(*arguments)


@pytest.mark.parametrize("ratio", [1.0, -0.1, "half", True, {"a": 1.5}, float("nan")])
def test_wrong_ratios(ratio):
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\)"):
        check_ratio(ratio)


def test_layer_scope_takes_the_same_share_and_leaves_one():
    assert ladder().by_ratio(0.5) == {"a": 4, "b": 2}
    assert ladder().by_ratio(0.0) == {"a": 0, "b": 0}
    assert ladder().by_ratio(0.999) == {"a": 7, "b": 3}


def test_ratios_are_of_the_original_units():
    assert ladder(gone=2).by_ratio(0.5) == {"a": 3, "b": 1}
    assert ladder(gone=8).by_ratio(0.5) == {"a": 0, "b": 0}


def test_ratios_by_name_and_pattern():
    assert ladder().by_ratio({"a": 0.25, "*": 0.5}) == {"a": 2, "b": 2}
    assert ladder().by_ratio({"b": 0.5}) == {"a": 0, "b": 2}
    with pytest.raises(ValueError, match="ratio names 'c', which matches no coupling"):
        ladder().by_ratio({"c": 0.5})
    with pytest.raises(ValueError, match="must be one number in scope 'global'"):
        ladder("global").by_ratio({"a": 0.5})


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.9])
def test_global_scope_takes_the_cheapest(share):
    counts = ladder("global").by_ratio(share)
    taken = int(share * 12 + 1e-9)
    costs = sorted([0.1, 0.2, 0.3, 0.9, 2.0, 3.0, 4.0, 0.25, 0.5, 5.0])[:taken]
    spent = [0.1, 0.2, 0.3, 0.9, 2.0, 3.0, 4.0][: counts["a"]] + [0.25, 0.5, 5.0][: counts["b"]]
    assert sorted(spent) == costs


def test_a_dear_unit_bars_the_cheap_ones_behind_it():
    paths = {"a": candidate([9.0, 0.0, 0.0]), "b": candidate([1.0, 1.0, 1.0])}
    assert Ladder(paths, "global").at(3 / 8) == {"a": 0, "b": 3}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_stays_is_a_multiple(scope):
    counts = ladder(scope, round_to=4).at(0.6)
    assert (8 - counts["a"]) % 4 == 0 and counts["b"] == 0
    assert ladder(scope, round_to=16).at(0.9) == {"a": 0, "b": 0}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_targets_are_met_with_the_least_cut(scope):
    climbing = ladder(scope)

    def size(counts):
        return 100 * (8 - counts["a"]) + 10 * (4 - counts["b"])

    counts = climbing.lowest(lambda c: size(c) <= 430)
    assert size(counts) <= 430
    heights = [k / 1000 for k in range(1001)]
    assert size(counts) == max(s for h in heights if (s := size(climbing.at(h))) <= 430)
    with pytest.raises(ValueError, match="out of reach"):
        climbing.lowest(lambda c: size(c) < 1)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_largest_cut_that_is_allowed(scope):
    climbing = ladder(scope)
    counts = climbing.highest(lambda c: sum(c.values()) <= 5)
    assert sum(counts.values()) == max(
        s for k in range(1001) if (s := sum(climbing.at(k / 1000).values())) <= 5
    )
    assert climbing.highest(lambda c: False) == {"a": 0, "b": 0}


def test_nothing_to_climb():
    assert Ladder({}).at(0.5) == {} and Ladder({}, "global").highest(lambda c: True) == {}
