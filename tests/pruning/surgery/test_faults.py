"""A surgery completes or changes nothing: planted faults, models that fail, wrong arguments."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.pruning_models import Attention, inputs, lenet, vgg
from support.pruning_surgery import changed, every_other, everything, operate, training
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.optim.kept import Kept
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery import transaction
from rlscuda.pruning.surgery.plan import plan

# -- all or nothing -------------------------------------------------------------------------------


def prepared(make=vgg):
    """A model in the middle of training, staged and with gradients, and a surgery of it."""
    torch.manual_seed(0)
    model = make()
    optimizer = RLSOptimizer(model, fallback="adamw")
    training(model, optimizer)
    optimizer.zero_grad()
    model(inputs()).square().mean().backward()
    structure = trace(model, inputs())
    surgery = plan(structure, every_other(structure))
    bias = dict(model.named_parameters())["4.bias" if make is vgg else "head.bias"]
    name = "8.bias" if make is vgg else "head.bias"
    values = {name: torch.randn_like(dict(model.named_parameters())[name])}
    assert bias is not None
    return model, optimizer, surgery, values


def writes(make) -> int:
    """How many references one surgery replaces."""
    model, optimizer, surgery, values = prepared(make)
    with mock.patch.object(transaction, "_write", wraps=transaction._write) as write:
        operate(model, [optimizer], surgery, values, inputs())
    return write.call_count


@pytest.mark.parametrize("make", [vgg, Attention])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_fault_at_any_point_of_the_commit_changes_nothing(make, after):
    model, optimizer, surgery, values = prepared(make)
    before, real = everything(model, optimizer), transaction._write
    for failing in range(writes(make)):
        count = iter(range(10**6))

        def faulty(target, key, value, count=count, failing=failing):
            place = next(count)
            if place == failing and not after:
                raise RuntimeError("planted")
            real(target, key, value)
            if place == failing:
                raise RuntimeError("planted")

        with (
            mock.patch.object(transaction, "_write", faulty),
            pytest.raises(RuntimeError, match="planted"),
        ):
            operate(model, [optimizer], surgery, values, inputs())
        assert changed(before, everything(model, optimizer)) == set()
    twin, twins_optimizer, _, _ = prepared(make)
    losses = [(torch.manual_seed(1), training(*pair))[1]  # of dropout
              for pair in ((model, optimizer), (twin, twins_optimizer))]  # fmt: skip
    assert losses[0] == losses[1]
    operate(model, [optimizer], surgery, values, inputs())
    training(model, optimizer)


@pytest.mark.parametrize(
    "where",
    ["rlscuda.optim.kept.Kept.take", "rlscuda.optim.kept.downdate",
     "rlscuda.optim.kept.KeptLayer.stage", "rlscuda.pruning.surgery.trial.call",
     "rlscuda.pruning.surgery.transaction.isolated_copy"],
)  # fmt: skip
def test_a_fault_before_the_commit_changes_nothing(where):
    model, optimizer, surgery, values = prepared()
    before = everything(model, optimizer)
    with (
        mock.patch(where, side_effect=RuntimeError("planted")),
        pytest.raises((RuntimeError, ValueError), match="planted"),
    ):
        operate(model, [optimizer], surgery, values, inputs())
    assert changed(before, everything(model, optimizer)) == set()
    training(model, optimizer)


class Strict(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.strict = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 8), False

    def forward(self, x):
        x = self.first(x)
        return self.second(x.view(-1, 8, 8, 8) if self.strict else x)


def test_pruned_model_that_fails_is_refused():
    model = Strict()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    structure = trace(model, inputs())
    model.strict = True
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"fails on the example inputs: shape '\[-1, 8, 8, 8\]'"):
        operate(model, [optimizer], plan(structure, {"first": [0]}), {}, inputs())
    assert changed(before, everything(model, optimizer)) == set()
    training(model, optimizer)


# -- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removed", "message"),
    [({"0": [4]}, r"units of '0' must be different ints in \[0, 4\)"), ({"0": [1, 1]}, "different"),
     ({"0": [-1]}, "different"), ({"0": [0.5]}, "different"),
     ({"0": range(4)}, "one of the 4 units of '0' must stay")],
)  # fmt: skip
def test_wrong_units(removed, message):
    with pytest.raises(ValueError, match=message):
        plan(trace(lenet(), inputs()), removed)


def test_unknown_coupling():
    with pytest.raises(KeyError, match="no coupling '8'"):
        plan(trace(lenet(), inputs()), {"8": [0]})


def test_model_changed_since():
    model = lenet()
    structure = trace(model, inputs())
    operate(model, [], plan(structure, {"0": [0]}), {}, inputs())
    with pytest.raises(ValueError, match="trace it again"):
        plan(structure, {"0": [0]})


@pytest.mark.parametrize(
    ("values", "message"),
    [({"3.weight": torch.zeros(6, 3, 2, 2)}, r"old shape \[6, 4, 2, 2\], got \[6, 3, 2, 2\]"),
     ({"nowhere": torch.zeros(1)}, "'nowhere', which the model does not have"),
     ({"3.bias": torch.full((6,), torch.nan)}, "'3.bias' is not finite")],
)  # fmt: skip
def test_wrong_values(values, message):
    model = lenet()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    before = everything(model, optimizer)
    surgery = plan(trace(model, inputs()), {"0": [0]})
    with pytest.raises(ValueError, match=message):
        operate(model, [optimizer], surgery, values, inputs())
    assert changed(before, everything(model, optimizer)) == set()


def test_surgery_of_another_model():
    surgery = plan(trace(vgg(), inputs()), {"0": [0]})
    with pytest.raises(ValueError, match="the surgery is of another model"):
        operate(lenet(), [], surgery, {}, inputs())


def test_kept():
    kept = Kept.from_index(torch.tensor([[1, 2], [7, 8]]), (3, 3))
    assert kept.shape == (2, 2) and kept.index.tolist() == [1, 2, 7, 8]
    assert kept.take(torch.arange(9).view(3, 3)).tolist() == [[1, 2], [7, 8]]
    assert kept.take(torch.arange(3).view(1, 3)).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="not made of places"):
        Kept.from_index(torch.tensor([[1, 2], [7, 6]]), (3, 3))
    with pytest.raises(ValueError, match=r"expected a tensor of shape \[3, 3\]"):
        kept.take(torch.zeros(2, 3))
