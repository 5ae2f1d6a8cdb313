"""The algebra of labels: what meets goes together, and sums of several stand for all of them."""

from __future__ import annotations

import torch

from rlscuda.pruning.structure.rules.labels import Labels, pointwise, project, reduced, varying


def roots(labels: Labels, tensor: torch.Tensor) -> list[int]:
    return labels.roots(tensor)


def test_what_meets_goes_together():
    labels = Labels()
    x, y = labels.new(4), labels.new(4)
    [made] = pointwise(labels, [((2, 4), [x.view(1, 4)]), ((4,), [y])], "add")
    assert roots(labels, x) == roots(labels, y) == roots(labels, made)
    assert len(set(roots(labels, x))) == 4 and not any(map(labels.fixed, roots(labels, x)))


def test_what_meets_a_fixed_size_is_fixed_and_says_where():
    labels = Labels()
    x, one = labels.new(4), labels.new(4)
    pointwise(labels, [((2, 4), [x.view(1, 4)]), ((2, 4), [])], "mul (net.py:3)")
    pointwise(labels, [((2, 4), [one.view(1, 4)]), ((2, 1), [])], "mul")  # broadcast over them
    assert all("net.py:3" in labels.fixed(root) for root in roots(labels, x))
    assert not any(labels.fixed(root) for root in roots(labels, one))


def test_axes_of_their_own_do_not_meet():
    labels = Labels()
    rows, columns = labels.new(3), labels.new(4)
    made = pointwise(labels, [((3, 1), [rows.view(3, 1)]), ((1, 4), [columns.view(1, 4)])], "mul")
    assert sorted(map(varying, made), key=min) == [frozenset({0}), frozenset({1})]
    assert len(set(roots(labels, torch.cat([rows, columns])))) == 7


def test_a_sum_stands_for_all_of_its_terms():
    """Of heads times dimensions summed over dimensions: a head goes where all of them go."""
    labels = Labels()
    heads = labels.new(6).view(2, 3)
    [sums] = reduced(labels, [heads], [1], keepdim=False)
    bias = labels.new(2)
    pointwise(labels, [((2,), [sums]), ((2,), [bias])], "add")
    whole, parts = labels.copy(), labels.copy()
    for row in heads:  # whole heads go
        whole.join_all(row[:1].expand(3), row)
    whole.resolve()
    for h in range(2):
        assert whole.find(int(bias[h])) == whole.find(int(heads[h, 0]))
    parts.join_all(heads[0], heads[1])  # dimensions go
    parts.resolve()
    assert all(parts.fixed(root) for root in roots(parts, bias))  # no head goes
    assert not any(parts.fixed(root) for root in roots(parts, heads))


def test_a_weight_that_heads_share_ties_them():
    labels = Labels()
    heads, shared = labels.new(6).view(2, 3), labels.new(3)
    pointwise(labels, [((2, 3), [heads]), ((3,), [shared])], "mul")
    labels.join_all(heads[0], heads[1])
    labels.resolve()
    assert roots(labels, shared) == roots(labels, heads[0])


def test_a_projection_of_one_label_is_that_label():
    labels = Labels()
    x = labels.new(3)
    assert torch.equal(project(labels, x.view(3, 1).expand(3, 4), {0}).flatten(), x)
