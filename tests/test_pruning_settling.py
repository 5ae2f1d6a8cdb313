"""Batch norms after a cut, and batches of every kind for them and for cut inputs."""

import copy

import pytest
import torch
from pruning_surgery_common import changed, everything
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from rlscuda.pruning import RLSPruner
from rlscuda.pruning._inputs import SlicedBatches
from rlscuda.pruning.settling import settle

WITHOUT_MATRICES = {"importance": "l1", "compensate": False}


def normed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    for _ in range(20):
        model(3 * torch.randn(16, 6) + 1)
    return model


def test_settling_is_that_of_torch():
    model, batches = normed(), [(torch.randn(16, 6), 0), (torch.randn(9, 6), 0)]
    expected, count = copy.deepcopy(model), model[1].num_batches_tracked.clone()
    state = torch.get_rng_state()
    update_bn(batches, expected)
    torch.set_rng_state(state)
    found = settle(model, batches)
    assert found.keys() == {f"1.{name}" for name in dict(model[1].named_buffers())}
    assert torch.equal(found["1.running_mean"], expected[1].running_mean)
    assert torch.equal(found["1.running_var"], expected[1].running_var)
    assert torch.equal(found["1.num_batches_tracked"], count)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].momentum == 0.1 and not model.training


@pytest.mark.parametrize("options", [{}, WITHOUT_MATRICES])
def test_named_batches(options):
    x = torch.randn(32, 6)
    models = [normed(), normed()]
    for model, batch in zip(models, (x, {"label": torch.zeros(32), "input": x})):
        RLSPruner(model, None, x[:2], ratio=0.5, loader=[batch], **options).step()
    first, second = (model.state_dict() for model in models)
    assert models[0][0].out_features == 4
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_batch_that_a_later_norm_refuses_is_left_out_of_all():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 1, 6, 6)
    expected = settle(copy.deepcopy(model), [x])
    found = settle(model, [x, 100 * x[:1]])
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_last_batch_of_one_sample_is_left_out():
    x, (one, other) = torch.randn(9, 6), (normed(), normed())
    expected = settle(copy.deepcopy(one), [x[:4], x[4:8]])
    found = settle(one, DataLoader(x, 4))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert RLSPruner(other, None, x[:2], ratio=0.5, loader=DataLoader(x, 4)).step().ratio == 0.5


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "a batch with several values a channel, got none"),
        ([torch.randn(1, 6)], "a batch with several values a channel, got none"),
        ([torch.randn(4, 6), torch.full((4, 6), torch.nan)], "'1.running_mean' finite values"),
    ],
)
def test_a_loader_without_statistics_leaves_everything(loader, message):
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(model, optimizer)
    pruner = RLSPruner(
        model, optimizer, torch.randn(2, 6), ratio=0.5, loader=loader, **WITHOUT_MATRICES
    )
    with pytest.raises(ValueError, match=message):
        pruner.step()
    assert not changed(before, everything(model, optimizer))


def test_other_errors_of_a_batch_are_raised():
    with pytest.raises(ValueError, match="planted"):
        settle(_Failing(nn.BatchNorm1d(6)), [torch.randn(4, 6)])


class _Failing(nn.Sequential):
    def forward(self, x):
        raise ValueError("planted")


class _Frozen(nn.BatchNorm1d):
    """A norm that never trains."""

    def train(self, mode=True):
        return super().train(False)


def test_a_norm_that_does_not_train_keeps_its_statistics():
    model = nn.Sequential(_Frozen(6), nn.BatchNorm1d(6))
    model[0].running_mean.fill_(2.0)
    found = settle(model, [torch.randn(8, 6)])
    assert torch.equal(found["0.running_mean"], torch.full((6,), 2.0))
    assert not torch.equal(found["1.running_mean"], torch.zeros(6))


class _Two(nn.Module):
    """Two inputs, of which one may be left out."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, y=None):
        hidden = self.first(x).tanh()
        return self.last(hidden if y is None else hidden + self.second(y).tanh())


def test_cut_inputs_of_named_batches():
    x, y = torch.randn(40, 6), torch.randn(40, 5)
    batch = {"label": torch.randn(40, 9), "y": y, "x": x}
    model = _Two()
    pruner = RLSPruner(
        model, None, {"x": x[:2], "y": y[:2]}, ratio=0.3, loader=[batch], include_inputs=True
    )
    kept = pruner.step().kept_inputs
    (sliced,) = pruner.loader
    assert sliced["label"] is batch["label"]
    assert torch.equal(sliced["x"], x[:, kept["0"]]) and torch.equal(sliced["y"], y[:, kept["1"]])
    pruner.step(ratio=0.6)
    assert (model.first.in_features, model.second.in_features) == (3, 2)


@pytest.mark.parametrize("example", ["positional", "named", "named otherwise"])
def test_sliced_batches_of_every_kind(example):
    x, y = torch.randn(4, 6), torch.randn(4, 5)
    examples = {"positional": (x, y), "named": {"x": x, "y": y},
                "named otherwise": {"y": y, "x": x}}  # fmt: skip
    order = "yx" if example == "named otherwise" else "xy"

    def halve_x(inputs):
        values = list(inputs.values())
        values[order.index("x")] = values[order.index("x")][:, ::2]
        return dict(zip(inputs, values))

    batches = [x, (x, 0), {"x": x}, {"y": y, "x": x, "z": 0}, {"y": y}]
    tensor, first, alone, both, other = SlicedBatches(batches, halve_x, _Two(), examples[example])
    assert torch.equal(tensor, x[:, ::2]) and torch.equal(first, x[:, ::2])
    assert alone.keys() == {"x"} and torch.equal(alone["x"], x[:, ::2])
    assert torch.equal(both["x"], x[:, ::2]) and both["y"] is y and both["z"] == 0
    assert other == {"y": y}
