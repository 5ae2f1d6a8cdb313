"""A Conv1d is a Conv2d over images of one line, to the bit."""

import copy
import io
import itertools
import math

import pytest
import torch
from support.compare import differing, snapshot
from support.training import make
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, calibrate, prune_weights
from rlscuda.pruning.matrices.tracker import SketchTracker

FORMS = ["paper", "natural", "adaptive"]
GEOMETRIES = [
    {"kernel_size": 3, "stride": s, "padding": p, "dilation": d, "groups": g, "bias": g == d,
     "padding_mode": mode}
    for s, p, mode, d, g in itertools.product(
        (1, 2), (0, 2, "same", "valid"), ("zeros", "reflect", "replicate", "circular"), (1, 2),
        (1, 2))
    if not (p == "same" and s > 1) and not (p in (0, "valid") and mode != "zeros")
]  # fmt: skip
GEOMETRIES += [{"kernel_size": k, "padding": "same"} for k in (1, 2, 4)]


class Lines(nn.Module):
    """A Conv2d over the lines of sequences [N, C, L]."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x.unsqueeze(-2)).squeeze(-2)


def flat(options):
    """The options of the Conv2d with the same lines."""
    wide = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0}
    return {k: (wide[k], v) if k in wide and isinstance(v, int) else v for k, v in options.items()}


def twins(options):
    """The Conv1d, and the Conv2d of the same numbers."""
    torch.manual_seed(0)
    line = nn.Conv1d(4, 6, **options).double()
    plane = nn.Conv2d(4, 6, **flat(options)).double()
    plane.load_state_dict({k: v.view(plane.state_dict()[k].shape)
                           for k, v in line.state_dict().items()})  # fmt: skip
    return line, Lines(plane)


def fit(model, optimizer, shape=(5, 4, 9), steps=2):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(shape).double()).square().mean().backward()
        optimizer.step()


def near(one, other):
    return torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def assert_one_step(line, plane, optimizers, equal=torch.equal):
    """Both have the same numbers, in whatever shape."""
    for one, other in zip(line.parameters(), plane.parameters()):
        assert equal(one.flatten(), other.flatten())
        states = [o.state[p] for o, p in zip(optimizers, (one, other))]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            if isinstance(value, torch.Tensor):
                assert equal(value, states[1][name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
def test_same_as_images_of_one_line(form, summary):
    for options in GEOMETRIES:
        models = twins(options)
        optimizers = [make(m, summary, form=form) for m in models]
        for model, optimizer in zip(models, optimizers):
            fit(model, optimizer)
            (row,) = optimizer.coverage()
            assert (row.status, row.groups) == ("exact", options.get("groups", 1))
            assert next(iter(optimizer.health().values())).updates == 2 * row.groups
        assert_one_step(*models, optimizers)


@pytest.mark.parametrize("form", FORMS)
def test_unbatched_and_strided_input(form):
    models = twins({"kernel_size": 3, "padding": 1})
    optimizers = [make(m, form=form) for m in models]
    torch.manual_seed(1)
    x = torch.randn(2, 9, 4).double().mT
    for model, optimizer in zip(models, optimizers):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model(x[0]).square().sum().backward()
        optimizer.step()
    assert_one_step(*models, optimizers, near)  # torch adds up their gradients otherwise


def test_step_within_a_part_of_the_norm():
    models = twins({"kernel_size": 3})
    optimizers = [make(m, form="paper", trust_ratio=1e-3) for m in models]
    for model, optimizer in zip(models, optimizers):
        fit(model, optimizer)
    assert_one_step(*models, optimizers)


def network(channels=8):
    """A stack as of speech models: strided Conv1d, group norm, grouped positions, a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, channels, 5, stride=2, bias=False), nn.GroupNorm(2, channels), nn.GELU(),
        nn.Conv1d(channels, 6, 3, padding="same"), nn.GELU(),
        nn.Conv1d(6, 6, 4, padding=2, groups=2), nn.Tanh(),
        nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 2),
    )  # fmt: skip


def losses_of(model, optimizer, steps):
    torch.manual_seed(2)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 2, 40)
        optimizer.zero_grad()
        loss = (model(x) - x[..., :20].mean(-1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_stack_of_speech_models_trains_and_is_saved():
    model = network()
    optimizer = RLSOptimizer(model, lr=0.02)
    losses = losses_of(model, optimizer, 40)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert [r.fan_in for r in optimizer.coverage() if r.status == "exact"] == [10, 25, 13, 13]
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    twin = network()
    other = RLSOptimizer(twin)
    for one, state in zip((twin, other), torch.load(buffer, weights_only=True)):
        one.load_state_dict(state)
    copied, with_it = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other)):
        losses_of(m, o, 2)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert losses_of(copied, with_it, 1)


def test_calibration_and_tracker_see_what_images_of_one_line_show():
    models = twins({"kernel_size": 3, "groups": 2, "padding": 1})
    loader = [torch.randn(8, 4, 9).double() for _ in range(2)]
    (line,), (plane,) = (calibrate(m, loader).values() for m in models)
    assert torch.equal(line, plane)
    trackers = [SketchTracker(m) for m in models]
    for model in models:
        for x in loader:
            model(x).sum().backward()
    (line,), (plane,) = (t.matrices().values() for t in trackers)
    assert torch.equal(line, plane)


@pytest.mark.parametrize("importance", ["saliency", "l2"])
def test_channels_are_pruned_with_their_matrix(importance):
    model = network()
    optimizer = RLSOptimizer(model)
    losses_of(model, optimizer, 8)
    before = optimizer.inverse_autocorrelation("3").clone()
    pruner = RLSPruner(model, optimizer, torch.randn(2, 2, 40), ratio=0.5, importance=importance)
    pruner.step()
    assert model[0].out_channels < 8 and model[3].out_channels < 6
    P = optimizer.inverse_autocorrelation("3")
    assert P.shape[-1] == 3 * model[3].in_channels + 1 < before.shape[-1]
    assert all(map(math.isfinite, losses_of(model, optimizer, 3)))
    assert optimizer.health()["3"].updates == 11


def test_weights_are_masked():
    models = twins({"kernel_size": 3, "padding": 1})
    loader = [torch.randn(8, 4, 9).double() for _ in range(2)]
    for model in models:
        prune_weights(model, calibrate(model, loader), sparsity=0.5)
    masks = [next(iter(dict(m.named_buffers()).values())) for m in models]
    assert torch.equal(masks[0].flatten(), masks[1].flatten()) and not masks[0].all()
    for one, other in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(one.flatten(), other.flatten())
