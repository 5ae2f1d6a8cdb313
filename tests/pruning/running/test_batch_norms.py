"""Batch norms after a cut, and batches of every kind for them and for cut inputs."""

import copy

import pytest
import torch
from support.compare import assert_close
from support.pruning_surgery import changed, everything
from torch import nn

from rlscuda.optim.kept import Kept
from rlscuda.pruning import RLSPruner
from rlscuda.pruning.running.batch_norms import Seen, settle
from rlscuda.pruning.running.calls import SlicedBatches

WITHOUT_MATRICES = {"importance": "l1", "compensate": False}


def normed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    for _ in range(20):
        model(3 * torch.randn(16, 6) + 1)
    return model


NORMS = {
    "1d": (nn.BatchNorm1d, (6,)), "1d rows": (nn.BatchNorm1d, (6, 4)),
    "2d": (nn.BatchNorm2d, (6, 3, 2)), "3d": (nn.BatchNorm3d, (6, 2, 3, 2)),
    "sync": (nn.SyncBatchNorm, (6, 3, 2)),
}  # fmt: skip


def trained(norm, shape, **options):
    """A norm that has seen other inputs than those to come."""
    model = nn.Sequential(norm(shape[0], **options))
    model.train()
    if norm is not nn.SyncBatchNorm:  # which trains on GPUs alone
        for _ in range(20):
            model(3 * torch.randn(16, *shape) + 1)
    return model.eval()


def halved(model):
    """A copy that keeps the even channels, and what it keeps."""
    pruned, even = copy.deepcopy(model), torch.arange(0, 6, 2)
    kept = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        kept[f"0.{name}"] = Kept.along((6,), {0: even})
        value = getattr(pruned[0], name).detach()[even]
        setattr(pruned[0], name, nn.Parameter(value) if name in ("weight", "bias") else value)
    pruned[0].num_features = 3
    return pruned, kept


def test_what_the_whole_model_shows_is_kept_for_many_cuts():
    torch.manual_seed(0)
    model = nn.Sequential(*trained(nn.BatchNorm2d, (6, 3, 2)), nn.BatchNorm2d(6)).eval()
    batches = [torch.randn(size, 6, 3, 2) for size in (4, 1, 7)]
    before, seen = copy.deepcopy(model.state_dict()), Seen(model, batches)
    for scale in (0.5, 2.0):
        pairs = [(x, scale * x) for x in batches]
        at_once, kept = (
            settle(whole, copy.deepcopy(model), {}, pairs) for whole in (model, seen)
        )  # fmt: skip
        assert kept.samples == at_once.samples == 12
        for name, value in at_once.statistics.items():
            assert torch.equal(kept.statistics[name], value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_statistics_move_by_the_difference_of_inputs(name, dtype):
    norm, shape = NORMS[name]
    model = trained(norm, shape, momentum=None).to(dtype)
    count = model[0].num_batches_tracked.clone()
    pruned, kept = halved(model)
    x = torch.randn(40, *shape).to(dtype)
    y = 0.5 * x[:, ::2] + 2
    found = settle(model, pruned, kept, zip(x.split(7), y.split(7)))
    whole, then, now = model[0], x[:, ::2].double(), y.double()
    axes = [dim for dim in range(x.dim()) if dim != 1]
    mean = whole.running_mean[::2].double() + 40 / 41 * (now.mean(axes) - then.mean(axes))
    old = whole.running_var[::2].double() + whole.eps
    after, before = (40 * (v.var(axes, correction=0) + whole.eps) + old for v in (now, then))
    assert_close(found.statistics["0.running_mean"], mean)
    assert_close(found.statistics["0.running_var"], old * after / before - whole.eps)
    assert found.samples == 40 and pruned[0].momentum is None
    assert torch.equal(found.statistics["0.num_batches_tracked"], count)


def deep(drop=0.5):
    torch.manual_seed(0)
    layers: list = [nn.Linear(6, 8)]
    for _ in range(3):
        layers += [nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(drop), nn.Linear(8, 8)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(8))
    for _ in range(50):
        model(3 * torch.randn(16, 6) + 1)
    return model


@pytest.mark.parametrize("size", [1, 2, 40])
def test_where_nothing_was_cut_nothing_changes(size):
    model, batches = deep(), torch.randn(40, 6).split(size)
    model[1].running_var[0] = 0.0  # of a dead channel
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    pruned = copy.deepcopy(model)
    found = settle(model, pruned, {}, zip(batches, batches))
    own = dict(model.named_buffers())
    assert found.statistics.keys() == own.keys()
    for name, value in found.statistics.items():
        torch.testing.assert_close(value, own[name], rtol=0, atol=0)
    assert [m.training for m in model.modules()] == flags and not pruned.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for one in (model, pruned) for m in one.modules())


@pytest.mark.parametrize("size", [1, 400])
def test_a_cut_that_scales_everything_is_undone(size):
    model, x = deep().eval(), 3 * torch.randn(400, 6) + 1
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned[0].weight *= 0.5
        pruned[0].bias *= 0.5
        before = (pruned(x) - model(x)).square().mean()
        settle(model, pruned, {}, zip(x.split(size), x.split(size)))
        assert (pruned(x) - model(x)).square().mean() < 0.02 * before


@pytest.mark.parametrize("options", [{}, WITHOUT_MATRICES])
def test_named_batches(options):
    x = torch.randn(32, 6)
    models = [normed(), normed()]
    for model, batch in zip(models, (x, {"label": torch.zeros(32), "input": x})):
        RLSPruner(model, None, x[:2], ratio=0.5, loader=[batch], **options).step()
    first, second = (model.state_dict() for model in models)
    assert models[0][0].out_features == 4
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "at least one batch, got none"),
        ([torch.randn(16, 6), torch.full((4, 6), torch.nan)], "'1.running_mean' finite values"),
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


@pytest.mark.parametrize("samples", [1, 15])
def test_few_samples_are_warned_of_once(samples):
    x, model = torch.randn(samples, 6), normed()
    loss = {"max_loss": 9.0, "evaluate": lambda copy: copy(x).detach().square().mean()}
    pruner = RLSPruner(model, None, x[:1], loader=x.split(1), **loss, **WITHOUT_MATRICES)
    with pytest.warns(UserWarning, match=f"cut by {samples} samples of loader") as caught:
        pruner.step()
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


def test_statistics_can_be_left_alone():
    model, x = normed(), torch.randn(2, 6)
    mean = model[1].running_mean.clone()
    options = {"ratio": 0.5, "loader": [5 * x], "adapt_norms": False, **WITHOUT_MATRICES}
    removed = RLSPruner(model, None, x, **options).step().couplings[0].removed
    kept = [unit for unit in range(8) if unit not in removed]
    assert len(kept) == 4 and torch.equal(model[1].running_mean, mean[kept])


def test_errors_of_a_batch_leave_no_hook():
    model = _Failing(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="planted"):
        settle(model, copy.deepcopy(model), {}, [(torch.randn(4, 6),) * 2])
    assert not model[0]._forward_pre_hooks


class _Failing(nn.Sequential):
    def forward(self, x):
        raise ValueError("planted")


class _Frozen(nn.BatchNorm1d):
    """A norm that never trains."""

    def train(self, mode=True):
        return super().train(False)


def test_norms_that_do_not_train_or_have_no_statistics_stay():
    frozen, bare = _Frozen(6), nn.BatchNorm1d(6, track_running_stats=False)
    model = nn.Sequential(frozen, bare, nn.BatchNorm1d(6))
    pruned = copy.deepcopy(model)
    x = torch.randn(20, 6)
    found = settle(model, pruned, {}, [(x, 2 * x**3)])
    assert found.statistics.keys() == {f"2.{name}" for name, _ in model[2].named_buffers()}
    assert torch.equal(pruned[0].running_mean, frozen.running_mean)
    assert not torch.equal(pruned[2].running_mean, model[2].running_mean)


def test_a_norm_that_no_batch_reaches_stays():
    model = nn.Sequential(nn.BatchNorm1d(6))
    model.spare = nn.BatchNorm1d(6)
    model.forward = lambda x: model[0](x)
    pruned = copy.deepcopy(model)
    pruned.forward = lambda x: pruned[0](x)
    x = torch.randn(20, 6)
    found = settle(model, pruned, {}, [(x, 2 * x)])
    assert found.samples == 20 and torch.equal(pruned.spare.running_var, torch.ones(6))


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
