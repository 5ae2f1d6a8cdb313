"""Blocks leave a model, its optimizers and its files together, or nothing changes."""

import gc
import weakref

import pytest
import torch
from support.blocks import CASES, IMAGES, copies, resnet
from support.compare import differing, snapshot
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import (
    export_program,
    load_optimizer,
    load_pruned,
    remove_blocks,
    save_pruned,
)
from rlscuda.pruning.blocks.stand_ins import Absent, Mapped, Passed, made_of
from rlscuda.pruning.running.measure import count_flops

LOADER = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)]
OPTIMIZERS = {
    "rls": lambda model: RLSOptimizer(model, lr=0.02),
    "adam": lambda model: torch.optim.Adam(model.parameters()),
    "sgd": lambda model: torch.optim.SGD(
        [{"params": list(model.conv.parameters())},
         {"params": [p for n, p in model.named_parameters() if not n.startswith("conv.")]}],
        lr=0.1, momentum=0.9,
    ),
}  # fmt: skip


def steps(model, optimizer, count=3, seed=0):
    for k in range(count):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed + k))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("ways", [("delete",), ("1x1",), ("3x3",)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_goes_on(name, ways):
    torch.manual_seed(0)
    model = resnet()
    optimizer = OPTIMIZERS[name](model)
    steps(model, optimizer)
    kept = snapshot(model, optimizer)
    numbers = {p: i for i, p in enumerate(model.parameters())}
    report = remove_blocks(model, IMAGES, LOADER, optimizers=optimizer, count=2, ways=ways)
    assert len(report.changes) == 2 and {c.how for c in report.changes} == set(ways)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    assert set(optimizer.state) <= held
    for parameter in held & numbers.keys():  # their states are the same to the bit
        for entry, value in optimizer.state.get(parameter, {}).items():
            old = kept[f"state.{numbers[parameter]}.{entry}"]
            assert torch.equal(torch.as_tensor(value), old)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model, optimizer, seed=9)
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []
    if name == "rls":
        assert all(health.missing == 0 for health in optimizer.health().values())
        maps = [n for n, m in model.named_modules() if isinstance(m, Mapped)]
        assert len(maps) == (0 if ways == ("delete",) else 2)
        covered = {row.name for row in optimizer.coverage() if row.status == "exact"}
        assert {f"{one}.map" for one in maps} <= covered


def test_the_cheapest_goes_first_and_targets_are_met():
    torch.manual_seed(0)
    model = resnet()
    with torch.no_grad():
        model.block12.bn2.weight.mul_(1e-3)  # this branch says next to nothing
    flops = count_flops(model, IMAGES)
    report = remove_blocks(model, IMAGES, LOADER, target_flops=0.6, price="params")
    assert "block12" in [change.name for change in report.changes]
    assert count_flops(model, IMAGES) <= 0.6 * flops
    assert report.gains.after.flops == count_flops(model, IMAGES)
    assert sum(p.numel() for p in model.parameters()) == report.gains.after.parameters
    assert set(report.kept).isdisjoint(change.name for change in report.changes)


def test_a_target_that_is_reached_changes_nothing():
    model = resnet()
    before = copies(model)
    report = remove_blocks(model, IMAGES, LOADER, target_params=10**9)
    assert report.changes == [] and not differing(before, copies(model))


def refusals():
    yield {"count": 9}, "out of reach"
    yield {"count": 1, "target_flops": 0.5}, "exactly one of"
    yield {}, "exactly one of"
    yield {"count": 1, "ways": ("5x5",)}, "ways must be"
    yield {"count": 1, "price": "euros"}, "price must be"
    yield {"count": 1, "names": "stem*"}, "no block of the model may go: it has block11"
    yield {"count": 1, "evaluate": lambda model: float("nan")}, "must be finite"
    yield {"target_flops": 0}, "above 0"


@pytest.mark.parametrize(("options", "message"), list(refusals()))
def test_a_refusal_changes_nothing(options, message):
    torch.manual_seed(0)
    model = resnet()
    optimizer = RLSOptimizer(model)
    steps(model, optimizer, 1)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        remove_blocks(model, IMAGES, LOADER, optimizers=optimizer, **options)
    assert not differing(before, snapshot(model, optimizer))
    steps(model, optimizer, 1)


def test_a_map_is_trained_where_its_branch_was():
    """Also where what comes first is frozen, held by no optimizer, and where weights are tied."""
    torch.manual_seed(0)
    model = Tokens()
    model.branch[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    groups = optimizer.param_groups[0]["params"]
    remove_blocks(model, TOKENS[:2], [TOKENS], optimizers=optimizer, count=1, ways=("linear",))
    assert {*groups} == {*model.parameters()}  # the very list
    model = Tokens()
    model.head.weight, model.head.bias = model.branch[3].weight, model.branch[3].bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    remove_blocks(model, TOKENS[:2], [TOKENS], optimizers=optimizer, count=1, ways=("linear",))
    held = optimizer.param_groups[0]["params"]
    assert [*held] == [*model.parameters()] and all(p.requires_grad for p in held)


def test_an_optimizer_may_lose_all_that_it_trains():
    model = resnet()
    first = torch.optim.SGD(model.block12.parameters(), lr=0.1)
    left = [p for name, p in model.named_parameters() if not name.startswith("block12")]
    options = {"optimizers": [first, torch.optim.SGD(left, lr=0.1)], "ways": ("delete",)}
    remove_blocks(model, IMAGES, LOADER, count=1, names="block12", **options)
    assert first.param_groups[0]["params"] == []
    first.step()
    remove_blocks(model, IMAGES, LOADER, count=1, **options)


def test_what_is_gone_is_freed():
    model = resnet()
    optimizer = RLSOptimizer(model, lr=0.02)
    steps(model, optimizer, 1)
    weights = [weakref.ref(block.conv1.weight) for block in (model.block11, model.block12)]
    options = {"optimizers": optimizer, "count": 1, "names": "block12"}
    remove_blocks(model, IMAGES, LOADER, **options)
    steps(model, optimizer, 1)
    gc.collect()
    assert weights[0]() is not None and weights[1]() is None


def test_what_the_model_keeps_under_another_name_is_still_trained():
    model = Tokens()
    model.also = model.branch[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    remove_blocks(model, TOKENS[:2], [TOKENS], optimizers=optimizer, count=1)
    assert {*optimizer.param_groups[0]["params"]} == {*model.parameters()}
    assert model.also.weight in {*model.parameters()}


def test_an_optimizer_that_cannot_follow_is_refused():
    model = Tokens()
    optimizer = torch.optim.LBFGS(model.parameters(), history_size=2)

    def loss():
        optimizer.zero_grad()
        value = model(TOKENS).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    before = copies(model)
    with pytest.raises(ValueError, match="all parameters of a group together"):
        remove_blocks(model, TOKENS[:2], [TOKENS], optimizers=optimizer, count=1)
    assert not differing(before, copies(model))
    optimizer.step(loss)


TOKENS = torch.randn(32, 5, 8, generator=torch.Generator().manual_seed(4))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.LayerNorm(8), nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)
        self.branch, self.head = nn.Sequential(*layers), nn.Linear(24, 8)

    def forward(self, x):
        return self.head((x + self.branch(x)).repeat(1, 1, 3))


def test_only_what_goes_leaves_a_trace():
    """An evaluation may train what it is given; random state and other buffers stay."""
    torch.manual_seed(0)
    model = resnet()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(Counting())
    before, state = copies(model), torch.get_rng_state()

    def evaluate(trial):
        trial.train()
        trial(10 * LOADER[0] + 5)
        with torch.no_grad():
            trial.conv.weight.zero_()
        return float(trial.block22.bn2.weight.shape[0] if hasattr(trial.block22.bn2, "eps") else 0)

    options = {"evaluate": evaluate, "adapt_norms": False, "ways": ("1x1",)}
    report = remove_blocks(model, IMAGES, LOADER, count=1, **options)
    assert [change.name for change in report.changes] == ["block22"]
    assert torch.equal(torch.get_rng_state(), state)
    left = {name: t for name, t in copies(model).items() if name in before}
    assert not differing({name: before[name] for name in left}, left)


class Counting:
    """A hook that stays in copies, as those of masks do; it counts the calls in a buffer."""

    __module__ = "torch.nn.utils.fake"

    def __call__(self, module, args):
        module.calls += 1


def test_an_error_late_in_the_transaction_takes_all_back(monkeypatch):
    from rlscuda.pruning.blocks import transaction

    torch.manual_seed(0)
    model = resnet()
    optimizers = [RLSOptimizer(model), torch.optim.Adam(model.parameters())]
    steps(model, optimizers[0], 1)
    before = snapshot(model, optimizers[0])
    modules = list(model.modules())
    real = transaction._optimizer_changes

    def broken(optimizer, *rest):
        changes = real(optimizer, *rest)
        return changes if optimizer is optimizers[0] else [*changes, (object(), "state", {})]

    monkeypatch.setattr(transaction, "_optimizer_changes", broken)
    with pytest.raises(AttributeError):
        remove_blocks(model, IMAGES, LOADER, optimizers=optimizers, count=1)
    assert not differing(before, snapshot(model, optimizers[0]))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    steps(model, optimizers[0], 1)


@pytest.mark.parametrize("ways", [("delete",), ("3x3",)])
def test_a_file_holds_it(ways, tmp_path):
    torch.manual_seed(0)
    model = resnet()
    optimizer = RLSOptimizer(model)
    steps(model, optimizer, 1)
    remove_blocks(model, IMAGES, LOADER, optimizers=optimizer, count=3, ways=ways)
    steps(model, optimizer, 1)
    save_pruned(model, tmp_path / "model.safetensors", optimizer=optimizer)
    again = load_pruned(resnet, tmp_path / "model.safetensors")
    assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
    resumed = RLSOptimizer(again)
    load_optimizer(resumed, tmp_path / "model.safetensors")
    for one, own in ((model, optimizer), (again, resumed)):
        steps(one.train(), own, 3, seed=5)
    assert not differing(copies(model), copies(again))
    with pytest.raises(ValueError, match="it has no module 'block.*, which was removed"):
        load_pruned(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "model.safetensors")


@pytest.mark.parametrize("ways", [("delete",), ("1x1",)])
def test_it_exports(ways, tmp_path):
    torch.manual_seed(0)
    model = resnet()
    remove_blocks(model, IMAGES, LOADER, count=2, ways=ways)
    export_program(model, IMAGES, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.allclose(program(IMAGES), model.eval()(IMAGES), atol=1e-5)


def test_a_transformer_loses_branches_by_tokens():
    make, inputs, _, _ = CASES["post-norm"]
    torch.manual_seed(0)
    model = make()
    loader = [dict(zip(("x", "padding"), inputs))]
    report = remove_blocks(model, inputs, loader, count=2, ways=("linear",))
    assert [change.how for change in report.changes] == ["linear", "linear"]
    assert all(0 < change.explained <= 1 for change in report.changes)
    assert isinstance(model.attention, Mapped)
    assert "linear" in str(report)


def test_all_blocks_may_go():
    model = resnet()
    remove_blocks(model, IMAGES, LOADER, count=4, ways=("delete",))
    kinds = [type(m) for m in model.modules() if isinstance(m, (Absent, Passed))]
    assert kinds.count(Absent) == 4 and kinds.count(Passed) == 12
    assert model(IMAGES).shape == (2, 5)


@pytest.mark.parametrize(
    "description", [{"kind": "Linear"}, {"kind": "Passed", "outputs": "2"}, {"kind": "Mapped"},
                    {"kind": "Absent", "strides": 3}, {"kind": "Absent", "place": 1},
                    {"kind": ["Absent"]},
                    {"kind": "Absent", "strides": [2, 0]}, {"kind": "Passed", "outputs": 10**12},
                    {"kind": "Absent", "channel": 10**9}, {"kind": "Passed", "outputs": -1},
                    {"kind": "Mapped", "outputs": 0, "kernel": 1, "inputs": 2, "width": 2,
                     "stride": 0}],
)  # fmt: skip
def test_a_damaged_description_is_refused(description):
    with pytest.raises(ValueError, match="a stand-in must be|is described by"):
        made_of(description)
