"""What couplings cost where they compete: measured on other samples, and over what they save."""

import copy
import warnings
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from rlscuda.pruning import RLSPruner
from rlscuda.pruning.choice.measuring import _costs, in_halves
from rlscuda.pruning.running.distortion import distortion
from rlscuda.pruning.running.measure import count_flops, count_parameters


def images(count, seed, pixels=8):
    """Images of which each is a mixture of twelve."""
    drawn = torch.Generator().manual_seed(seed)
    twelve = torch.randn(12, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    return (torch.randn(count, 12, generator=drawn) @ twelve.flatten(1)).view(-1, *twelve.shape[1:])


def network(pooled=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity(), nn.Flatten(),
        nn.Linear(16 if pooled else 1024, 20), nn.ReLU(), nn.Linear(20, 5),
    ).eval()  # fmt: skip


def pruned(loader, pooled=False, **options):
    model = network(pooled)
    options = {"scope": "global"} | (options or {"target_flops": 0.5})
    pruner = RLSPruner(model, None, images(2, 1), loader=loader, **options)
    return model, pruner.step()


def cost(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_costs_add_up_to_what_was_measured():
    foreseen = cost(1, 3, 2, 4, 6)
    found = _costs(foreseen, [2, 4], [0.4, 1.0])
    assert found.tolist() == pytest.approx([0.1, 0.3, 0.2, 0.4, 0.6])


@pytest.mark.parametrize(
    ("foreseen", "losses", "expected"),
    [
        ((0, 0, 2, 4, 6), (0.4, 1.0), (0.2, 0.2, 0.2, 0.4, 0.6)),
        ((1, 3, 0, 0, 0), (0.4, 1.0), (0.1, 0.3, 0.3, 0.3, 0.3)),
        ((1, 3, 2, 4, 6), (0.4, float("inf")), (0.1, 0.3, *[float("inf")] * 3)),
        ((1, 3, 2, 4, 6), (float("inf"), float("inf")), [float("inf")] * 5),
        ((1, 3, 2, 4, 6), (0.0, 0.0), (0.0,) * 5),
    ],
)
def test_costs_that_have_no_proportions(foreseen, losses, expected):
    found = _costs(cost(*foreseen), [2, 4], losses)
    assert found.tolist() == pytest.approx(list(expected))


def test_a_loss_that_falls_leaves_no_unit_free():
    found = _costs(cost(1, 1, 1, 1), [1, 3], [0.5, 0.4])
    assert (found > 0).all() and float(found[:3].sum()) == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_layer_that_fits_its_few_rows_is_not_cut_for_nothing(share):
    # 1024 columns, of which the samples are too few to say what losing some costs
    samples, fresh = images(64, 2), images(256, 3)
    losses = []
    for loader in ([samples], samples.split(16)):  # of which one batch gives nothing to measure by
        model, _ = pruned(loader, target_params=share)
        losses.append(distortion(network(), model, [(fresh, fresh)]))
    assert losses[1] < 0.85 * losses[0]


@pytest.mark.parametrize("target", ["target_flops", "target_params"])
@pytest.mark.parametrize("batches", [1, 4])
def test_units_go_by_their_cost_for_what_they_save(target, batches):
    loader = images(64, 2).split(64 // batches)
    _, report = pruned(loader, pooled=True, **{target: 0.6})
    size = {
        "target_flops": lambda model: count_flops(model, images(2, 1)),
        "target_params": count_parameters,
    }[target]
    dearest_gone, cheapest_left = 0.0, float("inf")
    for change in report.couplings:
        less = network(pooled=True)
        ratio = {change.name: 1 / change.before}
        RLSPruner(less, None, images(2, 1), ratio=ratio, loader=loader).step()
        saved = size(network(pooled=True)) - size(less)
        prices = list(accumulate((one / saved for one in change.cost), max))  # one bars the next
        gone = len(change.removed)
        dearest_gone = max([dearest_gone, *prices[:gone]])
        cheapest_left = min([cheapest_left, *prices[gone : gone + 1]])
    assert dearest_gone <= cheapest_left


def test_a_size_that_no_unit_changes_leaves_couplings_alone():
    _, report = pruned(images(32, 2).split(8), target_params=0.999)
    assert sum(len(change.removed) for change in report.couplings) == 1


def test_outputs_that_cannot_be_compared_leave_the_costs_as_foreseen():
    def model():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
        return nn.Sequential(*layers)

    batches = [images(4, k, pixels) for k, pixels in enumerate((8, 8, 8, 10))]
    options = {"scope": "global", "target_flops": 0.5, "loader": batches}
    pruner = RLSPruner(model(), None, images(2, 1), **options)
    with pytest.warns(UserWarning, match="not by what is measured.*outputs that are compared"):
        report = pruner.step()
    assert report.gains.after.flops <= 0.5 * report.gains.before.flops


def test_a_model_that_fails_without_some_units_is_pruned_by_what_is_foreseen():
    class Picky(nn.Sequential):
        def forward(self, x):
            if len(x) > 2 and len(self[0].weight) < 8:
                raise RuntimeError("too narrow")
            return super().forward(x)

    torch.manual_seed(0)
    model = Picky(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    options = {"scope": "global", "target_flops": 0.5, "loader": images(34, 2).split([2, 16, 16])}
    with pytest.warns(UserWarning, match="without units of 0: .*fails on loader.*too narrow"):
        report = RLSPruner(model, None, images(2, 1), **options).step()
    assert report.gains.after.flops <= 0.5 * report.gains.before.flops


@pytest.mark.parametrize(
    "pack", [lambda x: (x, torch.zeros(len(x))), lambda x: {"input": x, "label": 0}]
)
def test_batches_of_any_kind_that_can_be_fed(pack):
    loader = images(64, 2).split(16)
    _, plain = pruned(loader)
    _, report = pruned([pack(x) for x in loader])
    assert [c.removed for c in report.couplings] == [c.removed for c in plain.couplings]


def test_inputs_compete_too():
    loader = images(64, 2).split(16)
    model, report = pruned(loader, include_inputs=True, target_flops=0.4)
    assert report.couplings[0].before == 3
    kept = report.kept_inputs
    left = images(2, 5)[:, next(iter(kept.values()))] if kept else images(2, 5)
    assert model(left).shape == (2, 5)


def test_either_half_of_a_loader_that_shuffles_is_always_the_same():
    loader, seen = DataLoader(images(64, 2), 8, shuffle=True), []
    for half in in_halves(loader) * 2:
        with torch.random.fork_rng():
            seen.append(torch.cat(list(half)).sum((1, 2, 3)).tolist())
    assert seen[:2] == seen[2:] and not set(seen[0]) & set(seen[1])


def test_measuring_leaves_model_and_random_numbers_alone():
    model = network()
    before = copy.deepcopy(model.state_dict())
    loader, said = images(64, 2).split(16), []
    pruner = RLSPruner(model, None, images(2, 1), scope="global", ratio=0.0, loader=loader)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step(progress=said.append)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any(text.startswith("measuring ") for text in said)
