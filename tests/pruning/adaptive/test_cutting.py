"""Constants that are folded, models of other kinds, and arguments that are refused."""

import pytest
import torch
import torch.nn.functional as F
from support.blocks import PreActivation, resnet
from support.blocks.adaptive import LABELS, ROWS, X, epochs, mlp, started, steps
from support.pruning_models import Dense, mobilenet
from torch import nn

from rlscuda.pruning import AdaptivePruner, RLSPruner, SketchTracker, calibrate
from rlscuda.pruning.adaptive.folding import fold_constants
from rlscuda.pruning.choice.targets import compensate_layers
from rlscuda.pruning.running.measure import count_parameters

IMAGES = torch.randn(20, 3, 7, 7, generator=torch.Generator().manual_seed(1))


class Constant(nn.Module):
    """Channel 1 of the first convolution puts out relu(beta), whatever comes in."""

    def __init__(self, following):
        super().__init__()
        self.conv, self.bn, self.following = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), following
        with torch.no_grad():
            self.bn.weight[1], self.bn.bias[1] = 0, 1.7

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return self.following(x.flatten(1) if isinstance(self.following, nn.Linear) else x)


def columns(model):
    """Those of channel 1 in the following layer."""
    area = 25 if isinstance(model.following, nn.Linear) else model.following.weight[0, 0].numel()
    return torch.arange(area, 2 * area)


@pytest.mark.parametrize(
    "following",
    [lambda: nn.Linear(100, 5), lambda: nn.Conv2d(4, 5, 1), lambda: nn.Conv2d(4, 5, 3, stride=2)],
    ids=["linear", "1x1", "unpadded"],
)
def test_a_constant_channel_is_folded_exactly(following):
    model = Constant(following()).eval()
    before = model(IMAGES)
    values = fold_constants(model, {"following": columns(model)}, [IMAGES])
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
        model.bn.bias[1] = -9.0  # the channel is read by nobody any more
    assert set(values) == {"following.weight", "following.bias"}
    torch.testing.assert_close(model(IMAGES), before, rtol=1e-6, atol=1e-6)


def test_with_padding_the_fit_is_no_worse_than_the_naive_fold():
    model = Constant(nn.Conv2d(4, 5, 3, padding=1)).eval()
    lost = columns(model)
    assert fold_constants(model, {"following": lost}, [IMAGES]) == {}
    before = model(IMAGES)
    layer, errors = model.following, []
    matrices = calibrate(model, [IMAGES], damping=1e-9)
    fitted, _ = compensate_layers(model, matrices, {"following": lost})
    naive = {"following.weight": layer.weight.detach().clone()}
    naive["following.weight"].flatten(1)[:, lost] = 0
    constant = 1.7 * layer.weight[:, 1].sum((1, 2)).detach()
    naive["following.bias"] = layer.bias.detach() + constant
    for values in (naive, fitted):
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
        errors.append(float((model(IMAGES) - before).detach().square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_what_varies_is_not_folded():
    model = Constant(nn.Conv2d(4, 5, 1)).eval()
    assert fold_constants(model, {"following": torch.tensor([0, 2])}, [IMAGES]) == {}


def test_layers_fitted_in_turn_keep_the_output_better():
    errors = {}
    for how in (True, "in turn"):
        model, optimizer, pruner = started(
            what="channels", epochs=1, warmup=0, compensate=how, source="calibration"
        )
        steps(model, optimizer, pruner)
        model.eval()
        before = model(X)
        assert pruner.after_epoch() == "pruned"
        model.eval()
        errors[how] = float((model(X) - before).detach().square().mean())
    assert errors["in turn"] < 0.9 * errors[True]


@pytest.mark.parametrize("penalty", ["output", "scale"])
@pytest.mark.parametrize("optimizer", ["rls", "adamw"])
def test_a_network_without_norms(penalty, optimizer):
    model, trained_by, pruner = started(mlp, optimizer, x=ROWS, penalty=penalty, what="channels")
    epochs(model, trained_by, pruner, 4, x=ROWS, y=LABELS)
    assert pruner.finished
    assert model[0].out_features == model[2].in_features < 16


def test_a_gate_at_zero_is_a_row_of_zeros_that_stays():
    model, optimizer, pruner = started(
        mlp, "adamw", x=ROWS, penalty="scale", what="channels", rho=8.0, epochs=None, warmup=0
    )  # fmt: skip
    steps(model, optimizer, pruner, 3, x=ROWS, y=LABELS)
    gone = pruner._plan.penalty.measures()["0"] == 0
    assert gone.any()
    assert bool((model[0].weight[gone] == 0).all()) and bool((model[0].bias[gone] == 0).all())


@pytest.mark.parametrize("penalty", ["output", "scale"])
@pytest.mark.parametrize("make", [mobilenet, Dense, PreActivation], ids=lambda m: m.__name__)
def test_models_of_other_kinds(make, penalty):
    """Depthwise convolutions, concatenations, norms before the convolutions."""
    size = {"mobilenet": 4}.get(make.__name__, 8)
    x = torch.randn(32, 3, size, size)
    torch.manual_seed(0)
    model = make()
    whole = count_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = AdaptivePruner(
        model, optimizer, x[:2], penalty=penalty, loader=[x], epochs=2, every=2,
        target_params=0.7,
    )  # fmt: skip
    for _ in range(4):
        model.train()
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            pruner.after_backward()
            optimizer.step()
            pruner.after_step()
        pruner.after_epoch()
    assert pruner.finished and count_parameters(model) <= 0.7 * whole
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_the_norms_of_a_stream_are_one_scale_and_those_of_a_depthwise_layer_too():
    model = resnet()
    pruner = AdaptivePruner(model, None, X[:2], penalty="scale", loader=[X])
    stream = pruner._plan.penalty.scales["conv"]
    assert not stream.gated
    assert {one.name for one in stream.rows} == {
        "bn.weight", "block11.bn2.weight", "block12.bn2.weight"
    }  # fmt: skip
    with torch.no_grad():
        model.bn.weight[0] = 0
    assert float(pruner._plan.penalty.measures()["conv"][0]) == pytest.approx(2)
    pruner = AdaptivePruner(mobilenet(), None, torch.randn(2, 3, 4, 4), penalty="scale",
                            what="channels")  # fmt: skip
    assert any(len(own.rows) == 2 for own in pruner._plan.penalty.scales.values())


def test_ignored_parts_and_blocks_around_them_stay():
    model, optimizer, pruner = started(
        resnet, ignored=["block11.conv1", "fc"], target_params=0.45, epochs=1
    )  # fmt: skip
    epochs(model, optimizer, pruner, 2)
    names = {fate.name for fate in pruner.report().fates}
    assert model.block11.conv1.out_channels == 4
    assert "block11" not in names and "block12" in names


def test_without_data_a_scale_is_taken_out_too():
    torch.manual_seed(0)
    model = resnet(blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner = AdaptivePruner(model, optimizer, X[:2], penalty="scale", epochs=2)
    assert pruner.options.source == "none"
    epochs(model, optimizer, pruner, 4)
    assert pruner.finished


REFUSED = [
    ({"what": ()}, "what must be"), ({"what": ("channels", "heads")}, "what must be"),
    ({"penalty": "l1"}, "penalty must be"), ({"price_by": "latency"}, "price_by must be"),
    ({"curve": "steep"}, "curve must be"), ({"target_params": 0}, "target_params"),
    ({"target_params": 0.5, "target_flops": 0.5}, "exactly one"), ({"rho": -1}, "rho"),
    ({"momentum": 1.0}, "below 1"), ({"epochs": 0}, "epochs"), ({"epochs": 1.5}, "epochs"),
    ({"every": True}, "every"), ({"patience": 0}, "patience"), ({"round_to": 0}, "round_to"),
    ({"tolerance": float("nan")}, "tolerance"), ({"loader": None}, "need loader"),
    ({"target_params": 1e-4}, "out of reach"), ({"ignored": "nothing"}, "nothing"),
    ({"source": "sketch"}, "tracker="),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        started(optimizer="sgd", **options)[2].after_epoch()


def test_wrong_types_are_refused():
    model = resnet()
    with pytest.raises(TypeError, match="model must be a module"):
        AdaptivePruner("model", None, X[:2])
    with pytest.raises(TypeError, match="optimizer"):
        AdaptivePruner(model, "sgd", X[:2])
    with pytest.raises(TypeError, match="loader"):
        AdaptivePruner(model, None, X[:2], loader=iter([X]))
    with pytest.raises(ValueError, match="example_inputs"):
        AdaptivePruner(model, None, loader=[X])
    with pytest.raises(ValueError, match="tracker"):
        AdaptivePruner(model, None, X[:2], tracker=SketchTracker(model))
    with pytest.raises(TypeError, match="tracker"):
        AdaptivePruner(model, None, X[:2], tracker=RLSPruner, what="channels")
