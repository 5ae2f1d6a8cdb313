"""Relief on whole models: training on, the backward pass, shortcuts, and units that leave."""

from __future__ import annotations

import copy

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, train
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from rlscuda import RLSOptimizer, zoo
from rlscuda.pruning import calibrate, prune_relief, prune_weights, remove_unread
from rlscuda.pruning.masks import relief
from rlscuda.pruning.masks.units import structure_of, unread

OPTIMIZERS = {
    "rls": lambda model: RLSOptimizer(model),
    "paper": lambda model: make(model, form="paper", momentum=0.5),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.1),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1),
}


def lenet(dtype=torch.float64):
    shape = zoo.ImageShape(1, 12, 12)
    return zoo.lenet5(shape, 4, widths=(5, 7), hidden=(12,)).to(dtype)


def images(size=40, channels=1, dtype=torch.float64):
    return torch.randn(size, channels, 12, 12, dtype=dtype)


def masks(model):
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("_mask")}


def moments(module, row, optimizer):
    """What the optimizer keeps for single weights and biases, with what is kept of those."""
    both = row.mask.flatten(1)
    if row.bias is not None:
        both = torch.cat([both, row.bias[:, None]], 1)
    for own, mask in (("weight", row.mask), ("bias", row.bias)):
        parameter = getattr(module, f"{own}_orig", None)
        state = optimizer.state.get(parameter, {}) if mask is not None else {}
        for name, value in state.items():
            for keep in (mask, both):
                if name != "P" and isinstance(value, torch.Tensor) and value.shape == keep.shape:
                    yield keep, value


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masks_survive_training_and_a_resume(kind):
    model = cnn()
    optimizer = OPTIMIZERS[kind](model)
    train(model, optimizer)
    for i in (0, 5):
        model[i].bias.data.mul_(1e-6)  # so that biases are among what goes
    x = batch(model, 64)
    parameters = set(model.parameters())
    report = prune_relief(model, [x], alpha=0.8, optimizers=optimizer)
    assert parameters == set(model.parameters())
    kept = masks(model)
    assert any(not row.bias.all() for row in report if row.bias is not None)
    for row in report:
        for keep, value in moments(model.get_submodule(row.name), row, optimizer):
            assert torch.equal(value != 0, keep)
    train(model, optimizer, steps=4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps=3, seed=9)
    assert kept.keys() == masks(model).keys()
    for name, mask in kept.items():
        owner, _, own = name.rpartition(".")
        assert torch.equal(masks(model)[name], mask)
        value = getattr(model.get_submodule(owner), own.removesuffix("_mask"))
        assert torch.all(value[mask == 0] == 0) and torch.all(value[mask == 1] != 0)

    resumed = cnn(seed=5)
    again = OPTIMIZERS[kind](resumed)
    for name in kept:
        owner, _, own = name.rpartition(".")
        prune.identity(resumed.get_submodule(owner), own.removesuffix("_mask"))
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again, steps=3, seed=9)
    assert not differing(snapshot(model, optimizer), snapshot(resumed, again))


def test_masked_biases_stay_in_the_matrices():
    model = cnn()
    model[5].bias.data.zero_()
    x = batch(model, 64)
    first = prune_relief(model, [x], alpha=0.8)[-1]
    assert not first.bias.any() and prune.is_pruned(model[5])
    matrices = calibrate(model, [x])
    assert matrices["5"].shape == (1, 37, 37)
    second = prune_relief(model, [x], alpha=0.8, matrices=matrices)[-1]
    assert not second.bias.any() and torch.all(model[5].bias == 0)
    third = prune_weights(model, matrices, sparsity=0.9, layers=["5"])[0]
    assert not (third.mask & ~first.mask).any()
    assert torch.all(model[5].bias == 0) and torch.all(model[5].bias_orig == 0)
    prune_weights(model, matrices, sparsity=0.95, layers=["5"], permanent=True)
    assert not prune.is_pruned(model[5]) and torch.all(model[5].bias == 0)


def test_the_backward_pass_leaves_live_units_only():
    model, x = lenet(), images()
    for layer in (model.conv1, model.conv2, model.fc1):
        layer.weight.data[2] *= 1e-7  # three units that no other has a use for
        layer.bias.data[2] *= 1e-7
    without = copy.deepcopy(model)
    prune_relief(without, [x], alpha=0.7, backward=False)
    report = prune_relief(model, [x], alpha=0.7)
    torch.testing.assert_close(model(x), without(x))
    keep = {
        row.name: torch.cat([row.mask.flatten(1), row.bias[:, None]], 1) for row in report
    }  # fmt: skip
    live = {name: mask.any(1) for name, mask in keep.items()}
    assert not any(live[name][2] for name in ("conv1", "conv2", "fc1")) and live["fc2"].all()
    reads = {
        "conv1": report[1].mask.flatten(2).any(2).any(0),
        "conv2": report[2].mask.view(12, 7, -1).any(2).any(0),
        "fc1": report[3].mask.any(0),
    }
    for name, read in reads.items():
        assert torch.equal(read, live[name])
    structure = structure_of(model, x[:2])
    before = {name: mask.clone() for name, mask in keep.items()}
    relief.drop_unread(structure, keep)
    assert all(torch.equal(keep[name], before[name]) for name in keep)
    assert sum(map(len, unread(structure, keep).values())) == sum(
        int((~live[name]).sum()) for name in reads
    )


def test_units_that_a_norm_over_channels_meets_stay():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).double()
    model[3].weight.data[:, 2] = 0
    x = torch.randn(30, 6).double()
    report = prune_relief(model, [x], alpha=0.9)
    assert not report[1].mask[:, 2].any() and report[0].mask[2].any()
    assert not remove_unread(model, x[:2])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_unread_units_leave(kind, seed):
    torch.manual_seed(seed)
    model, x = lenet(torch.float32), images(dtype=torch.float32)
    for layer in (model.conv1, model.conv2, model.fc1):
        layer.weight.data[:3] *= 1e-7
    optimizer = OPTIMIZERS[kind](model)

    def step():
        optimizer.zero_grad()
        model(x[:8]).square().mean().backward()
        optimizer.step()

    step()
    prune_relief(model, [x], alpha=0.6, optimizers=optimizer)
    model.eval()
    before, left = model(x), masks(model)
    removed = remove_unread(model, x[:2], optimizer)
    assert removed.keys() == {"conv1", "conv2", "fc1"} and masks(model).keys() == left.keys()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert model.conv1.out_channels == model.conv2.in_channels == 5 - len(removed["conv1"])
    assert model.fc1.out_features == model.fc2.in_features == 12 - len(removed["fc1"])
    live = [sum(int((m != 0).sum()) for m in some.values()) for some in (left, masks(model))]
    assert live[0] == live[1]
    step()
    step()
    assert all(
        torch.all(getattr(module, own)[getattr(module, f"{own}_mask") == 0] == 0)
        for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))
        for own in ("weight", "bias") if hasattr(module, f"{own}_mask")
    )  # fmt: skip
    assert not remove_unread(model, x[:2], optimizer)


def test_a_removal_that_fails_changes_nothing(monkeypatch):
    model, x = lenet(), images()
    model.fc2.weight.data[:, :4] = 0
    prune_relief(model, [x], alpha=0.6)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def failing(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr("rlscuda.pruning.masks.units.operate", failing)
    with pytest.raises(RuntimeError, match="planted"):
        remove_unread(model, x[:2])
    assert not differing(before, model.state_dict())
    assert torch.equal(model.fc1.weight, model.fc1.weight_orig * model.fc1.weight_mask)


def test_the_last_unit_of_a_coupling_stays():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model[2].weight.data.zero_()
    assert remove_unread(model, torch.randn(2, 4)) == {"0": [1, 2, 3, 4]}
    assert torch.equal(model(torch.randn(3, 4)), model[2].bias.expand(3, 2))


class Shortcut(nn.Module):
    """A block whose sum is made as its caller says, on top of a convolution."""

    def __init__(self, add, projected=True):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.block = zoo.ResidualBlock(6, 6)
        if projected:
            self.block.shortcut = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.add, self.fc = add, nn.Linear(6, 3)
        nn.init.ones_(self.conv.bias)  # no channel is dead

    def forward(self, x):
        b, x = self.block, self.conv(x).relu()
        y = self.add(b.bn2(b.conv2(b.bn1(b.conv1(x)).relu())), b.shortcut(x))
        return self.fc(y.relu().mean((2, 3)))


ADDITIONS = {
    "plus": lambda y, r: y + r,
    "in_place": lambda y, r: y.add_(r),
    "function": torch.add,
    "turned": lambda y, r: r + y,
}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("add", ADDITIONS)
def test_channels_that_do_not_matter_beside_a_shortcut(add, projected):
    model = Shortcut(ADDITIONS[add], projected).double()
    block, x = model.block, images()
    for _ in range(20):
        model(x)  # so that the norms know their inputs
    model.eval()
    for channels, norm in (([1, 3], block.bn2), ([4], block.shortcut[1] if projected else None)):
        if norm is not None:
            norm.weight.data[channels] *= 1e-4
            norm.bias.data[channels] *= 1e-4
    before = model(x)
    report = {
        row.name: row for row in prune_relief(model, x.split(15), alpha=0.998, backward=False)
    }
    assert report["block.conv2"].mask.flatten(1).any(1).tolist() == [1, 0, 1, 0, 1, 1]
    assert torch.all(block.bn2.weight[[1, 3]] == 0) and torch.all(block.bn2.bias[[1, 3]] == 0)
    assert block.bn2.weight[[0, 2, 4, 5]].all()
    if projected:
        assert report["block.shortcut.0"].mask.flatten(1).any(1).tolist() == [1, 1, 1, 1, 0, 1]
        assert block.shortcut[1].weight[4] == 0
    assert (model(x) - before).abs().max() < 0.1 * before.abs().max()


def test_a_channel_that_is_read_elsewhere_stays():
    class Both(Shortcut):
        def forward(self, x):
            b, x = self.block, self.conv(x).relu()
            y = b.bn2(b.conv2(x))
            return self.fc((y + x).relu().mean((2, 3)) + 1e6 * y.mean((2, 3)))

    model = Both(None, projected=False).double()
    model.block.bn2.weight.data *= 1e-6
    report = prune_relief(model, [images()], layers=["block.conv2"])
    assert report[0].mask.flatten(1).any(1).all() and model.block.bn2.weight.all()


def test_the_other_addend_may_be_read_elsewhere():
    class Shared(Shortcut):
        def forward(self, x):
            b, x = self.block, self.conv(x)
            return self.fc((b.bn2(b.conv2(x)) + x).relu().mean((2, 3)))

    model = Shared(None, projected=False).double()
    model.block.bn2.weight.data[2] *= 1e-6
    model.conv.weight.data[4], model.conv.bias.data[4] = 1e-9, 0
    report = {row.name: row for row in prune_relief(model, [images()], backward=False)}
    assert report["conv"].mask.flatten(1).any(1).all()
    assert not report["block.conv2"].mask[2].any() and report["block.conv2"].mask[4].any()


def test_moments_of_a_norm_that_falls_silent():
    model = Shortcut(torch.add).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-6)
    F.cross_entropy(model(images(8)), torch.arange(8) % 3).backward()
    optimizer.step()
    model.block.bn2.weight.data[2] *= 1e-6
    prune_relief(model, [images()], optimizers=optimizer)
    moment = optimizer.state[model.block.bn2.weight]["exp_avg"]
    assert moment[2] == 0 and moment.count_nonzero() == 5


def test_resnet20():
    model = zoo.resnet20(zoo.ImageShape(3, 16, 16), 10)
    x = torch.randn(20, 3, 16, 16)
    for _ in range(2):
        report = prune_relief(model, [x], alpha=0.95, alpha_conv=0.9, norm="position")
    assert len(report) == 22 and report.left < 0.8
    assert all(row.signal > 0.85 for row in report)
    model.eval()
    before = model(x)
    remove_unread(model, x[:2])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_an_error_in_the_midst_of_writing_undoes_everything(monkeypatch):
    model = Shortcut(torch.add).double()
    model.block.bn2.weight.data[2] *= 1e-6
    optimizer = torch.optim.Adam(model.parameters(), 1e-6)
    F.cross_entropy(model(images(8)), torch.arange(8) % 3).backward()
    optimizer.step()
    before = {**snapshot(model, optimizer), **model.state_dict()}
    before = {name: value.clone() for name, value in before.items()}
    real, calls = relief.write_mask, []

    def failing(*args, **options):
        real(*args, **options)
        calls.append(1)
        if len(calls) == fault:
            raise RuntimeError("planted")

    def failing_norm(*args):
        silence(*args)
        raise RuntimeError("planted")

    silence = relief._silence
    for fault in (1, 3, 0):
        calls.clear()
        monkeypatch.setattr(relief, "write_mask", failing)
        if not fault:
            monkeypatch.setattr(relief, "_silence", failing_norm)
        with pytest.raises(RuntimeError, match="planted"):
            prune_relief(model, [images()], alpha=0.5, optimizers=optimizer)
        assert not differing(before, {**snapshot(model, optimizer), **model.state_dict()})
        assert not prune.is_pruned(model)


def test_taps_that_went_one_by_one_stay_away():
    model, x = lenet(), images()
    first = prune_weights(model, calibrate(model, [x]), sparsity=0.5, layers=["conv2"])[0]
    second = {row.name: row for row in prune_relief(model, [x], alpha=0.9)}["conv2"]
    assert not (second.mask & ~first.mask).any() and second.mask.any()
    assert torch.all(model.conv2.weight_orig[~second.mask] == 0)


def test_convolutions_have_a_share_of_their_own():
    model, x = lenet(), images()
    kept = {}
    for alpha, alpha_conv in ((0.9, None), (0.9, 0.5), (0.5, 0.9)):
        copied = copy.deepcopy(model)
        report = prune_relief(copied, [x], alpha=alpha, alpha_conv=alpha_conv, backward=False)
        kept[alpha, alpha_conv] = [row.connections[0] for row in report]
        assert torch.all(copied.fc1.weight_orig[~report[2].mask] == 0)
    both, fewer_kernels, fewer_weights = kept.values()
    assert fewer_kernels[1] < both[1] and fewer_kernels[2:] == both[2:]
    assert fewer_weights[2] < both[2] and fewer_weights[:2] == both[:2]
