"""Channels and blocks in one step: the mix is no worse than either alone."""

import pytest
import torch
from support.blocks import IMAGES, copies, resnet
from support.compare import differing, snapshot
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import (
    PruneSchedule,
    RLSPruner,
    jointly,
    load_pruned,
    remove_blocks,
    save_pruned,
)
from rlscuda.pruning.blocks.stand_ins import StandIn
from rlscuda.pruning.report import PruneReport
from rlscuda.pruning.running.distortion import Distortion
from rlscuda.pruning.running.measure import count_flops

LOADER = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)]
BOTH = ("channels", "blocks")


def trained(steps=3):
    torch.manual_seed(0)
    model = resnet((6, 8))
    optimizer = RLSOptimizer(model, lr=0.02)
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model, optimizer, steps=2):
    model.train()
    for x in LOADER[:1] * steps:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def pruner(model, optimizer=None, **options):
    options = {"target_flops": 0.6, "scope": "global", "what": BOTH} | options
    return RLSPruner(model, optimizer, IMAGES[:1], loader=LOADER, source="calibration", **options)


def test_a_mix_is_no_worse_than_either_alone():
    model, optimizer = trained()
    loss = Distortion(model, LOADER)
    flops = count_flops(model, IMAGES[:1])
    alone = []
    for what in ("channels", "blocks"):
        other, _ = trained()
        if what == "channels":
            pruner(other, what="channels").step()
        else:
            remove_blocks(other, IMAGES[:1], LOADER, target_flops=0.6)
        alone.append(loss(other))
    report = pruner(model, optimizer).step()
    assert loss(model) <= min(alone) + 1e-6
    assert count_flops(model, IMAGES[:1]) <= 0.6 * flops
    assert report.gains.before.flops == flops
    assert report.gains.after.flops == count_flops(model, IMAGES[:1])
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    before = copies(model)
    go_on(model, optimizer)
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == set()


@pytest.mark.parametrize("count", [3, 4])
def test_a_mix_is_judged_by_batches_that_nothing_was_fitted_by(count, monkeypatch):
    fitted, judged = [], []
    original = jointly.best_mix

    def spied(shorter, reached, cut, loss):
        judged.extend(loss._loader)
        fitted.extend(shorter._search.loader)
        return original(shorter, reached, cut, loss)

    monkeypatch.setattr("rlscuda.pruning.pruner.best_mix", spied)
    loader = [torch.randn(8, 3, 8, 8) for _ in range(count)]
    model, _ = trained()
    RLSPruner(model, None, IMAGES[:1], loader=loader, target_flops=0.6, what=BOTH).step()
    halves = ([0, 2], [1, 3]) if count == 4 else ([0, 1, 2], [0, 1, 2])
    for batches, expected in zip((fitted, judged), halves):
        assert [id(x) for x in batches] == [id(loader[k]) for k in expected]


def test_idle_branches_go_first():
    model, _ = trained()
    with torch.no_grad():
        for name in ("block12", "block22"):
            model.get_submodule(name).bn2.weight.zero_()
            model.get_submodule(name).bn2.bias.zero_()
    report = pruner(model, target_flops=0.9).step()
    gone = [block.name for block in report.blocks]
    assert gone and set(gone) <= {"block12", "block22"}
    assert all(abs(block.cost) < 1e-6 for block in report.blocks)
    assert all(change.removed == [] for change in report.couplings)
    again = PruneReport.from_dict(report.to_dict())
    assert again.blocks == report.blocks and "block12" in str(again) or "block22" in str(again)


def test_a_file_holds_channels_and_blocks(tmp_path):
    model, optimizer = trained()
    target = {"target_params": 0.5, "target_flops": None}

    def evaluate(trial):
        blocks = (trial.block11, trial.block12, trial.block21, trial.block22)
        gone = [isinstance(block.bn2, StandIn) for block in blocks]
        return 1.0 + (gone != [False, True, False, False])

    report = pruner(model, optimizer, evaluate=evaluate, **target).step()
    assert [block.name for block in report.blocks] == ["block12"]
    assert any(change.removed for change in report.couplings)
    save_pruned(model, tmp_path / "model.safetensors", optimizer=optimizer)
    again = load_pruned(lambda: resnet((6, 8)), tmp_path / "model.safetensors")
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))


def test_a_snapshot_brings_blocks_back():
    model, optimizer = trained()
    one = pruner(model, optimizer, target_flops=0.5)
    kept, before = one.snapshot(), snapshot(model, optimizer)
    modules, values = dict(model.named_modules()), copies(model)
    one.step()
    assert copies(model).keys() != values.keys() or differing(values, copies(model))
    go_on(model, optimizer)
    kept.restore()
    assert not differing(before, snapshot(model, optimizer))
    assert not differing(values, copies(model))
    assert dict(model.named_modules()) == modules
    go_on(model, optimizer)
    kept.restore()
    assert not differing(values, copies(model))


def idle(*blocks):
    with torch.no_grad():
        for block in blocks:
            block.bn2.weight.zero_()
            block.bn2.bias.zero_()


def test_snapshots_are_restored_one_after_the_other():
    model, optimizer = trained()
    idle(model.block11, model.block12)
    one = pruner(model, optimizer, target_flops=0.9)
    first, before = one.snapshot(), copies(model)
    report = one.step()
    second, between = one.snapshot(), copies(model)
    assert report.blocks and one.step().blocks
    go_on(model, optimizer)
    second.restore()
    assert not differing(between, copies(model))
    go_on(model, optimizer)
    first.restore()
    assert not differing(before, copies(model))
    assert {p for g in optimizer.param_groups for p in g["params"]} == {*model.parameters()}
    one.step()
    first.restore()
    assert not differing(before, copies(model))


def test_a_mask_that_came_since_is_seen_before_anything_is_changed():
    model, _ = trained()
    idle(model.block11)
    one = pruner(model, target_flops=0.9)
    kept = one.snapshot()
    nn.utils.prune.l1_unstructured(model.conv, "weight", 0.2)
    assert one.step().blocks
    before = copies(model)
    with pytest.raises(ValueError, match="with masks on or off"):
        kept.restore()
    assert not differing(before, copies(model))
    nn.utils.prune.remove(model.conv, "weight")
    kept.restore()


def test_an_error_in_the_channels_brings_blocks_back(monkeypatch):
    model, optimizer = trained()
    with torch.no_grad():
        model.block12.bn2.weight.zero_()
        model.block12.bn2.bias.zero_()
    one = pruner(model, optimizer, target_flops=0.6)
    before, values, modules = snapshot(model, optimizer), copies(model), dict(model.named_modules())

    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(one, "_operate", broken)
    with pytest.raises(RuntimeError, match="no"):
        one.step()
    assert not differing(before, snapshot(model, optimizer))
    assert not differing(values, copies(model))
    assert dict(model.named_modules()) == modules
    go_on(model, optimizer)


def test_ignored_blocks_stay():
    model, _ = trained()
    with torch.no_grad():
        for block in (model.block11, model.block12):
            block.bn2.weight.zero_()
            block.bn2.bias.zero_()
    report = pruner(model, target_flops=0.9, ignored="block12.conv1").step()
    assert [block.name for block in report.blocks] == ["block11"]
    assert report.refused["block12"] == "ignored"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"what": "blocks"}, "what must be"), ({"what": ("channels", "layers")}, "what must be"),
     ({"source": "own"}, "with blocks the matrices are of the model without them"),
     ({"target_flops": None, "ratio": 0.5}, "ratio is of channels alone"),
     ({"include_inputs": True}, "cannot be combined with include_inputs"),
     ({"target_flops": 10}, "out of reach")],
)  # fmt: skip
def test_a_refusal_changes_nothing(options, message):
    model, optimizer = trained()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        RLSPruner(
            model, optimizer, IMAGES[:1],
            **{"loader": LOADER, "source": "calibration", "target_flops": 0.6, "what": BOTH}
            | options,
        ).step()  # fmt: skip
    assert not differing(before, snapshot(model, optimizer))
    assert isinstance(model, nn.Module)


def test_an_error_of_the_evaluation_is_not_taken_for_a_target_out_of_reach():
    model, _ = trained()
    calls = []

    def evaluate(trial):
        calls.append(trial)
        if len(calls) == 2:
            raise ValueError("no such file")
        return 1.0

    with pytest.raises(ValueError, match="no such file"):
        pruner(model, evaluate=evaluate).step()


def test_a_schedule_is_of_channels_alone():
    model, _ = trained()
    with pytest.raises(ValueError, match="channels alone"):
        PruneSchedule(pruner(model), 0.5)


def test_hooks_of_others_see_no_search():
    model, _ = trained()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    remove_blocks(model, IMAGES[:1], LOADER, target_flops=0.8)
    assert not seen
