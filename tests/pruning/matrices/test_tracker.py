"""`SketchTracker`: it tends to a calibration, follows pruning and disturbs nothing."""

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from rlscuda.closed_form import formulas
from rlscuda.pruning.matrices.calibration import calibrate, disagreement
from rlscuda.pruning.matrices.tracker import SketchTracker


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(4, 6, 2, groups=2, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def run(model: nn.Module, steps: int = 1, seed: int = 1) -> list[torch.Tensor]:
    """Differentiated forwards of a stationary, correlated input with a mean."""
    generator = torch.Generator().manual_seed(seed)
    channels = getattr(model[0], "in_channels", None)
    inputs = []
    for _ in range(steps):
        if channels:
            x = torch.randn(16, channels, 4, 4, generator=generator).cumsum(3) + 0.5
        else:
            x = torch.randn(16, model[0].in_features, generator=generator) + 0.5
        model(x).square().mean().backward()
        inputs.append(x)
    return inputs


def snapshot(tracker: SketchTracker) -> dict:
    return copy.deepcopy(tracker.state_dict())


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[k]["P"], second[k]["P"])
        and torch.equal(first[k]["power"], second[k]["power"])
        and first[k]["seen"] == second[k]["seen"]
        for k in first
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tracker_tends_to_a_calibration(dtype):
    """It has seen `rows` sketched rows by then: sqrt(n / rows) a direction, and the white noise.

    The noise is as random as the sketch, in directions that it alone fills too.
    """
    steps = 300
    model = network()
    tracker = SketchTracker(model, forgetting=0.9999, dtype=dtype)
    inputs = run(model, 20)
    early = tracker.matrices()
    inputs += run(model, steps - 20, seed=2)
    exact, late = calibrate(model, inputs), tracker.matrices()
    assert late.keys() == exact.keys() == {"0", "2", "4"}
    far, near = disagreement(early, exact), disagreement(late, exact)
    for name, P in late.items():
        assert (P.dtype, P.shape) == (torch.float64, exact[name].shape)
        assert near[name] < 1.5 * math.sqrt(P.shape[-1] / (16 * steps))
        assert near[name] < far[name] / 2
        ratio = float(P.diagonal(dim1=1, dim2=2).sum() / exact[name].diagonal(dim1=1, dim2=2).sum())
        assert 0.9 < ratio < 1.1  # in the units of the input too


def test_old_inputs_fade():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    tracker = SketchTracker(model, forgetting=0.9)
    for scale in (1.0, 10.0):
        for _ in range(100):
            model(scale * torch.randn(64, 4)).sum().backward()
    assert tracker.matrices()["0"][0].diagonal().mean() == pytest.approx(0.01, rel=0.5)


def test_tracker_disturbs_nothing():
    models, weights = [network(), network()], []
    for k, model in enumerate(models):
        tracker = SketchTracker(model) if k else None
        optimizer = torch.optim.Adam(model.parameters())
        for seed in range(3):
            torch.manual_seed(seed)
            run(model, seed=seed)
            optimizer.step()
        weights.append([*model.parameters(), torch.rand(3)])
        assert tracker is None or tracker.matrices()
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_only_differentiated_forwards_in_training_mode_count():
    model = network()
    tracker = SketchTracker(model)
    x = torch.randn(4, 2, 4, 4)
    with torch.no_grad():
        model(x)
    model.eval()
    run(model)
    assert tracker.matrices() == {}
    model.train()
    with pytest.warns(UserWarning, match="requires_grad"):
        checkpoint(model, x, use_reentrant=True)  # its first run is without gradients
    assert tracker.matrices() == {}
    checkpoint(model, x.requires_grad_(), use_reentrant=True).sum().backward()
    assert {t["seen"] for t in tracker.state_dict().values()} == {1}
    model(x[:0])
    assert {t["seen"] for t in tracker.state_dict().values()} == {1}


def test_layers_may_be_chosen():
    model = network()
    tracker = SketchTracker(model, layers=["2", model[4]])
    run(model)
    assert tracker.matrices().keys() == {"2", "4"}


def test_nothing_overflows_where_inputs_die():
    """Forgetting without new input: 1500 forwards at .9 would grow P by 1e68."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 2, bias=False))
    tracker = SketchTracker(model, rank=4, forgetting=0.9)
    for step in range(1500):
        x = torch.randn(8, 4, 1, 1)
        x[:, 2:] = 0
        if step > 10:
            x[:, 0] = 0
            model[0].weight.data.zero_()
            model[0].bias.data.zero_()
        model(x).sum().backward()
    for P in tracker.matrices().values():
        assert torch.isfinite(P).all()
        assert (torch.linalg.cholesky_ex(P).info == 0).all()
    small = tracker.state_dict()["0"]["P"].diagonal(dim1=1, dim2=2)
    assert small.max() < 1e3 / 1e-3


def test_non_finite_input_leaves_the_matrix():
    model = nn.Sequential(nn.Linear(3, 2))
    tracker = SketchTracker(model)
    run(model, 3)
    before = snapshot(tracker)["0"]
    model(torch.full((2, 3), float("nan"))).sum().backward()
    after = tracker.state_dict()["0"]
    assert torch.equal(after["P"], before["P"])
    assert torch.equal(after["power"], before["power"])


# -- after pruning ---------------------------------------------------------------------------------


def prune_inputs(module: nn.Module, kept: torch.Tensor, groups: int = 1) -> None:
    """Input channels [k] of a layer, of each group."""
    module.weight = nn.Parameter(module.weight.detach()[:, kept].clone())
    if isinstance(module, nn.Conv2d):
        module.in_channels = groups * len(kept)
    else:
        module.in_features = len(kept)


def inverse_of_remaining(P: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(torch.linalg.inv(P)[kept][:, kept])


def test_tracker_follows_a_pruned_layer():
    model = network()
    tracker = SketchTracker(model, dtype=torch.float64)
    run(model, 40)
    before = tracker.matrices()
    channel = torch.arange(9)
    model[0].in_channels = 1  # the network's second input channel goes
    model[0].weight = nn.Parameter(model[0].weight.detach()[:, :1].clone())
    kept = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 20, 21, 22, 23])
    prune_inputs(model[4], kept)
    model[2].weight = nn.Parameter(model[2].weight.detach()[[0, 2, 5]].clone())  # 24 -> 12 inputs
    model[2].out_channels = 3
    with pytest.raises(ValueError, match="'0' must leave"):
        tracker.follow({"4": kept})
    model[2].groups, model[2].in_channels = 1, 2
    tracker.follow({"0": channel, "4": kept, "2": torch.arange(8)})
    after = tracker.matrices()
    ones = {"0": [18], "4": [24]}
    for name, columns in (("0", channel), ("4", kept)):
        columns = torch.cat([columns, torch.tensor(ones[name])])
        expected = inverse_of_remaining(before[name][0], columns)
        torch.testing.assert_close(after[name][0], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(after["2"][0], before["2"][0])  # its second group went


def test_tracking_goes_on_after_pruning():
    """The tracker of a pruned model tends to the calibration of the pruned model."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    tracker = SketchTracker(model, forgetting=0.999)
    run(model, 200)
    kept = torch.tensor([0, 2, 3, 5])
    prune_inputs(model[0], kept)
    with pytest.raises(RuntimeError, match=r"'0' has input rows \[1, 5\].*call follow"):
        run(model)
    tracker.follow({"0": kept})
    inputs = run(model, 400)
    assert tracker.state_dict()["0"]["seen"] == 600
    assert disagreement(tracker.matrices(), calibrate(model, inputs))["0"] < 0.1


def test_groups_keep_columns_of_their_own():
    model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2).double())
    tracker = SketchTracker(model, dtype=torch.float64)
    for _ in range(30):
        model(torch.randn(4, 4, 3, 3).double()).sum().backward()
    before = tracker.matrices()["0"]
    model[0].weight = nn.Parameter(model[0].weight.detach()[:, :1].clone())
    model[0].in_channels = 2
    tracker.follow({"0": torch.tensor([4, 5, 6, 7, 8, 9, 10, 11])})  # 2nd of 1st, 1st of 2nd
    after = tracker.matrices()["0"]
    for group, columns in enumerate([[4, 5, 6, 7, 8], [0, 1, 2, 3, 8]]):
        expected = inverse_of_remaining(before[group], torch.tensor(columns))
        torch.testing.assert_close(after[group], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kept, message",
    [
        ({"7": torch.tensor([0])}, r"kept names \['7'\], which are not tracked"),
        ({"4": torch.tensor([0.0])}, "'4' must be int64"),
        ({"4": torch.tensor([[0]])}, r"int64 \[k\], got torch.int64 \[1, 1\]"),
        ({"4": torch.tensor([0, 24])}, "columns from 0 to 23"),
        ({"4": torch.tensor([-1, 2])}, "columns from 0 to 23"),
        ({"4": torch.tensor([2, 1])}, "ascending"),
        ({"2": torch.tensor([0, 1, 8])}, r"as many in each group, got \[2, 1\]"),
        ({"4": torch.tensor([0, 1])}, r"must leave \[1, 25, 25\].* got \[1, 3, 3\]"),
    ],
)  # fmt: skip
def test_errors_of_follow(kept, message):
    model = network()
    tracker = SketchTracker(model)
    run(model, 2)
    before = snapshot(tracker)
    with pytest.raises(ValueError, match=message):
        tracker.follow(kept)
    assert same(tracker.state_dict(), before)


# -- life ------------------------------------------------------------------------------------------


def test_state_dict_goes_on_exactly(tmp_path):
    model = network()
    first = SketchTracker(model)
    run(model, 3)
    torch.save(first.state_dict(), tmp_path / "tracker.pt")
    second = SketchTracker(model)
    second.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    assert same(first.state_dict(), second.state_dict())
    run(model, 3, seed=5)
    assert same(first.state_dict(), second.state_dict())
    assert {t["seen"] for t in first.state_dict().values()} == {6}
    other = SketchTracker(model, seed=1)
    run(model, 6)
    assert not torch.equal(other.matrices()["0"], second.matrices()["0"])


def test_masked_layers_are_tracked():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    masked, x = copy.deepcopy(model), torch.randn(8, 4)
    prune.identity(masked[0], "weight")
    first, second = SketchTracker(model), SketchTracker(masked)
    for one in (model, masked):
        one(x).sum().backward()
    assert same(second.state_dict(), first.state_dict())


def test_a_compiled_model_that_has_run():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(8, 4)
    compiled(x).sum().backward()
    tracker = SketchTracker(compiled)
    compiled(x).sum().backward()
    assert tracker.matrices().keys() == {"0", "2"}


def test_hooks_end_with_the_tracker():
    model = network()
    tracker = SketchTracker(model)
    run(model, 2)
    twin = copy.deepcopy(model)
    before = snapshot(tracker)
    run(twin)  # a copy is not tracked
    assert same(tracker.state_dict(), before)
    tracker.detach()
    run(model)
    assert same(tracker.state_dict(), before)
    assert tracker.matrices().keys() == {"0", "2", "4"}
    other = SketchTracker(model)
    assert any(m._forward_hooks for m in model.modules())
    del other
    gc.collect()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, "rank must be an int >= 1, got 0"),
        ({"rank": 2.5}, ValueError, "rank must be an int"),
        ({"forgetting": 1.0}, ValueError, r"forgetting must be in \(0, 1\), got 1.0"),
        ({"forgetting": float("nan")}, ValueError, "got nan"),
        ({"damping": 0.0}, ValueError, "damping must be > 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be .* got torch.float16"),
        ({"layers": ["nothing"]}, ValueError, "layers names 'nothing', which the model does not"),
        ({"layers": ["1"]}, ValueError, "layers names '1', which can have no matrix: "),
        ({"model": nn.ReLU()}, ValueError, "must have a Linear or convolution"),
        ({"model": 3}, TypeError, "model must be a module, got int"),
    ],
)  # fmt: skip
def test_errors_of_a_tracker(options, error, message):
    with pytest.raises(error, match=message):
        SketchTracker(**{"model": network(), **options})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {"9": s["0"]}, "names '9', which is not tracked"),
        (lambda s: {"0": s["4"]}, r"'0' must be \[1, 19, 19\], got \[1, 25, 25\]"),
        (lambda s: {"0": {**s["0"], "power": torch.ones(2)}}, "'0' must be"),
        (lambda s: {"0": {"seen": 3}}, r"'0' must have P, power and seen, got \['seen'\]"),
        (lambda s: {"0": 3}, "'0' must have P, power and seen, got int"),
    ],
)
def test_errors_of_a_state(change, message):
    model = network()
    tracker = SketchTracker(model)
    run(model, 2)
    before = snapshot(tracker)
    with pytest.raises(ValueError, match=message):
        tracker.load_state_dict(change(before))
    assert same(tracker.state_dict(), before)


def test_compensation_from_a_tracked_matrix():
    """What it is for: a copied channel goes, and the output stays nearly what it was."""
    model = nn.Sequential(nn.Linear(6, 3))
    tracker = SketchTracker(model, damping=1e-5)
    for _ in range(200):
        x = torch.randn(32, 6)
        x[:, 5] = x[:, 0] - x[:, 1]
        model(x).sum().backward()
    W = torch.cat([model[0].weight, model[0].bias[:, None]], 1)
    compensated = formulas.compensate(tracker.matrices()["0"][0], W, torch.tensor([5]))
    rows = torch.cat([x, torch.ones(32, 1)], 1).double()
    error = (rows @ (compensated - W).T).norm() / (rows @ W.T.double()).norm()
    assert error < 1e-3
