"""Uncommon company for the pruner: partial optimizers, loaders, hooks, compiled models."""

import pytest
import torch
from support.pruning_models import Attention, inputs
from support.pruning_nets import mlp, rows, trained, widths
from support.pruning_surgery import changed, everything
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, SketchTracker, calibrate, disagreement, own_matrices
from rlscuda.pruning.choice.ranking import rank
from rlscuda.pruning.structure.trace import trace


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_matrices_with_shrinkage_are_turned_back():
    model = mlp(6, 8, 3)
    optimizer = RLSOptimizer(model, lr=1e-9, form="paper", forgetting=0.99, rank=16,
                             summary="sketch", shrinkage=0.02, ridge=0)  # fmt: skip
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).double()
    for seed in range(600):
        optimizer.zero_grad()
        model(rows(seed=seed) @ mixing).square().mean().backward()
        optimizer.step()
    exact = calibrate(model, [rows(4000, seed=999) @ mixing])
    live = {name: optimizer.inverse_autocorrelation(name)[None] for name in exact}
    own, raw = (disagreement(m, exact) for m in (own_matrices(optimizer), live))
    assert all(own[name] < 0.5 * raw[name] for name in exact)


def test_loaders_that_end_are_refused():
    with pytest.raises(TypeError, match="gone through again.*generator"):
        RLSPruner(normed(), None, torch.randn(2, 6), ratio=0.5, loader=(b for b in [rows()]))


def test_max_loss_counts_what_the_step_leaves():
    """With its batch norms estimated again, as the step does."""
    data = torch.randn(200, 6) * 3 + 1
    for seed in range(3):
        torch.manual_seed(seed)
        model = normed()
        target = model.eval()(data).detach()
        model.train()

        def loss(m, target=target):
            return 1 + float((m.eval()(data).detach() - target).square().mean())

        pruner = RLSPruner(model, None, data[:2], max_loss=0.05, evaluate=loss, loader=[data])
        limit = 1.05 * loss(model)
        pruner.step()
        assert loss(model) <= limit + 1e-5


def test_evaluation_leaves_the_model_alone():
    model = normed()
    data = torch.randn(50, 6)
    seen = []

    def loss(m):
        seen.append(m.training)
        m.train()
        m(data)
        return -float(sum(p.numel() for p in m.parameters()))

    model.train()
    mean = model[1].running_mean.clone()
    matrices = [torch.randn(100, 6)]
    RLSPruner(model, None, data[:2], max_loss=0.0, evaluate=loss, loader=matrices,
              importance="l1", compensate=False).step()  # fmt: skip
    assert model.training and not any(seen)
    assert model[0].out_features == 8 and torch.equal(model[1].running_mean, mean)
    with pytest.raises(ValueError, match="finite loss of the whole model, got nan"):
        RLSPruner(model, None, data[:2], max_loss=0.1, evaluate=lambda m: float("nan"),
                  loader=matrices).step()  # fmt: skip


def test_hooks_of_the_user_do_not_see_the_measurement():
    model, optimizer = trained(6, 8, 3)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5).step()
    assert widths(model) == [4, 3] and report.gains.after.parameters < 59 and not seen


def test_a_hook_that_fails_on_the_pruned_model_is_found_before_it_is_cut():
    model, optimizer = trained(6, 8, 3)

    def fixed(module, args, output):
        assert output.shape[-1] == 8, "planted"

    model[0].register_forward_hook(fixed)
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5).step()
    assert "planted" in report.refused["0"] and widths(model) == [8, 3]
    model(rows(2))


def test_a_tracker_of_some_layers_follows():
    model = mlp(6, 8, 8, 3)
    tracker = SketchTracker(model, layers=["4"])
    model(rows()).sum().backward()
    RLSPruner(model, None, rows(2), ratio=0.5, importance="l2", tracker=tracker).step()
    assert widths(model) == [4, 4, 3] and tracker.matrices()["4"].shape == (1, 5, 5)


def test_matrices_are_those_of_the_weights():
    other, other_optimizer = trained(6, 8, 3)
    with pytest.raises(ValueError, match="none of its parameters"):
        RLSPruner(mlp(6, 8, 3), other_optimizer, rows(2), ratio=0.5)
    whole = nn.ModuleDict({"body": other})

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = whole

        def forward(self, x):
            return self.inner["body"](x)

    model = Wrapped()
    report = RLSPruner(model, other_optimizer, rows(2), ratio=0.5).step()
    assert widths(other) == [4, 3] and not report.uncompensated


def test_a_compiled_model_is_pruned():
    model, optimizer = trained(6, 8, 3)
    compiled = torch.compile(model, backend="eager")
    RLSPruner(compiled, optimizer, rows(2), ratio=0.5).step()
    assert widths(model) == [4, 3]
    assert compiled(rows()).shape == (64, 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_costs_of_a_layer_add_up_to_its_energy(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=groups), nn.Conv2d(8, 2, 1))
    data = torch.randn(32, 3, 6, 6)
    structure = trace(model, data[:2])
    matrices = calibrate(model, [data])
    found, _ = rank(structure, dict(model.named_modules()), matrices, "saliency", "greedy", {}, 0,
                    lambda name: None)  # fmt: skip
    cost = found["0"].cost
    assert 0.3 < float(cost.sum()) < 1.0


def test_only_the_statistics_of_norms_are_taken_over():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = normed()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            return self.body(x)

    model = Counting()
    model(torch.randn(9, 6))
    norm = model.body[1]
    tracked, mean = norm.num_batches_tracked.clone(), norm.running_mean.clone()
    data = torch.randn(50, 6)
    calls = int(model.calls)
    report = RLSPruner(model, None, data[:2], ratio=0.5, loader=[data, data], importance="l1",
                       compensate=False).step()  # fmt: skip
    assert int(model.calls) == calls and torch.equal(norm.num_batches_tracked, tracked)
    kept = [unit for unit in range(len(mean)) if unit not in report.couplings[0].removed]
    torch.testing.assert_close(norm.running_mean, mean[kept])  # what feeds it did not change


def test_dropout_in_the_estimation_leaves_the_random_state():
    model = nn.Sequential(nn.Dropout(0.5), *normed())
    data = torch.randn(50, 6)
    state = torch.get_rng_state()
    RLSPruner(model, None, data[:2], ratio=0.5, loader=[data]).step()
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_returns_a_loss_beside_its_output():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(6, 8, 3)

        def forward(self, x):
            y = self.body(x)
            return y, y.square().mean()

    model = Pair()
    RLSPruner(model, None, rows(2), ratio=0.5, loader=[rows(100)]).step()
    assert model.body[0].out_features == 4


def test_a_snapshot_before_the_tracker_saw_anything():
    model = mlp(6, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = SketchTracker(model)
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5, tracker=tracker)
    snapshot = pruner.snapshot()
    model(rows()).sum().backward()
    pruner.step()
    snapshot.restore()
    model(rows()).sum().backward()
    assert tracker.matrices()["2"].shape == (1, 9, 9)


def test_a_void_snapshot_is_refused():
    model, optimizer = trained(6, 8, 3)
    pruner = RLSPruner(model, optimizer, rows(2), ratio=0.5)
    first = pruner.snapshot()
    pruner.step()
    second = pruner.snapshot()
    first.restore()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="this snapshot is void"):
        second.restore()
    assert not changed(before, everything(model, optimizer))
    first.restore()


def test_one_name_or_module_is_ignored_as_such():
    for ignored in ("0", "first"):
        model, optimizer = trained(6, 8, 8, 3)
        chosen = model[0] if ignored == "first" else ignored
        RLSPruner(model, optimizer, rows(2), ratio=0.5, ignored=chosen).step()
        assert widths(model) == [8, 4, 3]


def test_inputs_and_losses_do_not_go_together():
    with pytest.raises(ValueError, match="max_loss cannot be combined with include_inputs"):
        RLSPruner(mlp(6, 8, 3), None, rows(2), max_loss=0.1, evaluate=lambda m: 0.0,
                  loader=[rows()], include_inputs=True)  # fmt: skip


class TwoReaders(nn.Module):
    """A convolution, and a transposed one that reads the same channels."""

    def __init__(self):
        super().__init__()
        self.first, self.plain = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.transposed = nn.ConvTranspose2d(8, 2, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.plain(x) + self.transposed(x)


def test_layers_without_a_rule_are_reported():
    torch.manual_seed(0)
    model, data = Attention(), inputs(size=32)
    pruner = RLSPruner(model, None, data[:2], ratio=0.5, loader=[data])
    reason = "there is no rule for MultiheadAttention"
    assert pruner.step().uncompensated == {"attention": reason}
    assert pruner.step().uncompensated == {}  # nothing more goes


def test_transposed_convolution_beside_another_layer_is_compensated():
    torch.manual_seed(0)
    model, data = TwoReaders(), inputs(size=32)
    weight = model.transposed.weight.detach().clone()
    pruner = RLSPruner(model, None, data[:2], ratio=0.5, loader=[data])
    report = pruner.step()
    assert not report.uncompensated and not report.refused
    gone = report.couplings[0].removed
    kept = [i for i in range(len(weight)) if i not in gone]
    assert gone and not torch.equal(model.transposed.weight, weight[kept])


def test_taylor_passes_over_what_is_frozen():
    model, optimizer = trained(6, 8, 8, 3)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    model(rows()).square().mean().backward()
    report = RLSPruner(model, optimizer, rows(2), ratio=0.5, importance="taylor").step()
    assert widths(model) == [8, 4, 3]
    assert set(report.refused) == {"0"} and "has a gradient" in report.refused["0"]
