"""Every kind of layer that a calibration knows: its rows, its weight, and the least squares.

The oracle knows no im2col: a layer's output is linear in its weight, so the Jacobian by the weight
is the design matrix of the regression that compensation solves.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlscuda.closed_form.formulas import block_saliency
from rlscuda.pruning import RLSPruner
from rlscuda.pruning.choice.ranking import layer_energy, rank
from rlscuda.pruning.choice.targets import compensate_layers, lost_columns
from rlscuda.pruning.couplings import Coupling, Member, Structure
from rlscuda.pruning.matrices.calibration import calibrate
from rlscuda.pruning.matrices.carried import CarriedMatrices
from rlscuda.pruning.matrices.explained import redundancies
from rlscuda.pruning.matrices.layers import layer_of, layer_values, layer_weight
from rlscuda.reference import patch_rows


class Conv1D(nn.Module):
    """That of transformers: a Linear whose weight is [n, c]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Same(nn.Conv2d):
    """Pads so that each stride has an output, as TensorFlow does."""

    def forward(self, x):
        sides = []
        for size, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((-(-size // s) - 1) * s + k - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, 1, self.groups)


class Standardised(nn.Conv2d):
    """Standardises its weight, as timm's `StdConv2d` does."""

    def forward(self, x):
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-6).sqrt()
        weight = flat.view_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(Standardised):
    """One with a gain a channel, as `ScaledStdConv2d` has, behind a padding of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        weight = self.weight * self.gain
        return F.conv2d(F.pad(x, (1, 0, 0, 2)), weight, self.bias, self.stride)


class Counting(nn.Conv2d):
    """Holds a tensor more, so that no optimizer takes it for a convolution; its weight is plain."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


EXACT = {"rtol": 1e-10, "atol": 1e-10}

CASES = {
    "conv1d": (lambda: nn.Conv1d(4, 3, 3, 2, 2, dilation=2), (9,)),
    "conv1d-groups": (lambda: nn.Conv1d(4, 6, 3, 1, "same", groups=2, bias=False), (7,)),
    "conv1d-reflect": (lambda: nn.Conv1d(4, 3, 3, 1, 1, padding_mode="reflect"), (7,)),
    "conv3d": (lambda: nn.Conv3d(4, 3, (2, 1, 2), (1, 2, 1), (1, 0, 0)), (3, 4, 3)),
    "conv3d-groups": (lambda: nn.Conv3d(4, 4, 2, groups=2, dilation=(1, 2, 1)), (3, 4, 3)),
    "conv3d-circular": (lambda: nn.Conv3d(4, 2, 2, 1, 1, padding_mode="circular"), (2, 3, 2)),
    "conv2d": (lambda: nn.Conv2d(4, 3, (3, 2), (2, 1), 1), (5, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (5, 4)),
    "spread1d": (lambda: nn.ConvTranspose1d(4, 3, 4, 2, 1), (6,)),
    "spread1d-more": (lambda: nn.ConvTranspose1d(4, 3, 3, 3, 1, 2, dilation=2), (6,)),
    "spread2d": (lambda: nn.ConvTranspose2d(4, 3, 2, 2), (4, 3)),
    "spread2d-stride": (lambda: nn.ConvTranspose2d(4, 3, (3, 4), (2, 3), (1, 2), (1, 0)), (3, 4)),
    "spread2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, bias=False), (4, 3)),
    "spread2d-dilation": (lambda: nn.ConvTranspose2d(4, 2, 2, 2, 0, 0, dilation=3), (3, 4)),
    "spread2d-cut": (lambda: nn.ConvTranspose2d(4, 2, 2, 1, 2), (7, 6)),
    "spread3d": (lambda: nn.ConvTranspose3d(4, 2, (2, 3, 2), (2, 1, 2), (1, 0, 0)), (3, 2, 3)),
    "spread3d-groups": (lambda: nn.ConvTranspose3d(4, 4, 2, 2, groups=2), (2, 3, 2)),
    "linear": (lambda: nn.Linear(4, 3), ()),
    "Conv1D": (lambda: Conv1D(3, 4), ()),
    "same": (lambda: Same(4, 3, 3, 2), (6, 5)),
    "counting": (lambda: Counting(4, 3, 2), (5, 4)),
    "standardised": (lambda: Standardised(4, 6, 3, padding=1, groups=2), (5, 4)),
    "scaled": (lambda: Scaled(4, 3, 3, 2, bias=False), (6, 5)),
}
WRITTEN = [name for name in CASES if name not in ("standardised", "scaled")]


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    stand_in = types.SimpleNamespace(Conv1D=Conv1D)
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", stand_in)


def case(name, batch=40):
    """A layer in float64, and an input of correlated channels."""
    make, size = CASES[name]
    x = torch.randn(batch, 4, *size).double()
    x[:, 3] += 0.8 * x[:, 0] + 0.5
    return nn.Sequential(make().double()), x


def rows_of(module, x, bias):
    layer = layer_of(module, bias=bias)
    return patch_rows(layer.images(x), *layer.geometry, ones=bias)  # [groups, N, n]


def by_outputs(y, groups):
    """An output as rows of each group, [groups, N, c / groups]."""
    return y.movedim(1, -1).reshape(-1, groups, y.shape[1] // groups).movedim(1, 0)


@pytest.mark.parametrize("name", CASES)
def test_output_is_the_product_of_rows_and_weight(name):
    model, x = case(name, 3)
    module = model[0]
    bias = module.bias is not None
    rows = rows_of(module, x, bias)
    weight = layer_weight(module, rows.mT @ rows)
    output = by_outputs(module(x).detach(), len(rows))
    torch.testing.assert_close(rows @ weight.mT, output, **EXACT)
    torch.testing.assert_close(  # the second moment says what the output's energy is
        torch.einsum("gci,gij,gcj->", weight, rows.mT @ rows, weight), output.square().sum(),
    )  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_weight_goes_there_and_back(name):
    model, x = case(name, 3)
    module = model[0]
    bias = module.bias is not None
    rows = rows_of(module, x, bias)
    values = layer_values(module, layer_weight(module, rows.mT @ rows))
    assert set(values) == {"weight", "bias"} if bias else {"weight"}
    assert all(torch.equal(getattr(module, own), value) for own, value in values.items())


def design(module, x):
    """The Jacobian of the output by the weight, [outputs, weights], and by the bias."""
    names = ["weight"] if module.bias is None else ["weight", "bias"]

    def run(*tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors)), (x,)).flatten()

    parameters = tuple(getattr(module, name).detach() for name in names)
    parts = torch.func.jacrev(run, argnums=tuple(range(len(names))))(*parameters)
    return [part.flatten(1) for part in parts]


def lost_weights(module, units):
    """Which elements of a weight multiply some of the input's channels, bool, flat."""
    gone = torch.zeros_like(module.weight, dtype=torch.bool)
    groups = getattr(module, "groups", 1)
    if isinstance(module, Conv1D) or getattr(module, "transposed", False):
        gone[units] = True
    else:
        size, outputs = 4 // groups, len(gone) // groups
        for unit in units:
            gone[unit // size * outputs : (unit // size + 1) * outputs, unit % size] = True
    return gone.flatten()


def member_of(module, units=((0,), (1,), (2,), (3,))):
    return Member("0", "in", torch.tensor(units))


# in a group of one channel nothing could stand in for it
@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "depthwise"])
def test_compensation_and_saliency_are_those_of_a_direct_least_squares(name):
    model, x = case(name, 20 if name.startswith("spread") else 40)
    module = model[0]
    groups = getattr(module, "groups", 1)
    # the channels of one place in all groups make a unit
    size = 4 // groups
    units = [[g * size + j for g in range(groups)] for j in range(size)]
    member = member_of(module, units)
    P = calibrate(model, [x[:9], x[9:]], damping=1e-12)["0"]
    columns = member.columns(module)
    model.requires_grad_(False)
    target = module(x).flatten()
    parts = design(module, x)
    gone = lost_weights(module, units[-1])
    kept = torch.cat([parts[0][:, ~gone], *parts[1:]], 1)
    residual = target - kept @ torch.linalg.lstsq(kept, target[:, None], driver="gelsd")[0][:, 0]

    values, reasons = compensate_layers(model, {"0": P}, {"0": columns[-1]})
    assert not reasons
    assert not values["0.weight"].flatten()[gone].any()
    y = torch.func.functional_call(model, values, (x,))
    least = residual.square().sum()
    torch.testing.assert_close((y.flatten() - target).square().sum(), least, rtol=1e-6, atol=1e-9)
    # the mean over rows of what a unit costs is its saliency
    W = layer_weight(module, P)
    costs = torch.stack([block_saliency(p, w, columns) for p, w in zip(P, W)])
    count = target.numel() // W.shape[0] / W.shape[1]
    torch.testing.assert_close(costs[:, -1].sum() * count, least, rtol=1e-6, atol=1e-9)
    assert layer_energy(module, P)[0] >= costs.max()


@pytest.mark.parametrize("name", CASES)
def test_couplings_are_ranked_by_every_kind(name):
    model, x = case(name)
    groups = getattr(model[0], "groups", 1)
    units = [[g * (4 // groups) + j for g in range(groups)] for j in range(4 // groups)]
    member = member_of(model[0], units)
    structure = Structure(model, [Coupling("c", len(units), [member])], {}, [], {}, {})
    modules = dict(model.named_modules())
    matrices = calibrate(model, [x])
    found, refused = rank(
        structure, modules, matrices, "saliency", "greedy", {}, 0, lambda name: None
    )
    assert not refused and len(found["c"].order) == len(units) - 1
    lost = lost_columns(structure.couplings, modules, {"c": [0]})
    assert lost["0"].tolist() == member.columns(model[0])[0].tolist()
    values, reasons = compensate_layers(model, matrices, lost)
    assert bool(values) == (name in WRITTEN) != bool(reasons)
    assert all("makes its weight of the parameter" in reason for reason in reasons.values())
    shares = redundancies(model, matrices)["0"]
    assert len(shares) == 4 and (shares[[0, 3]] > 0.2).all() == (groups == 1)


def test_matrices_follow_an_output_size():
    """U-Nets give the size of the skip to their transposed convolutions."""

    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, 2, 1).double()

        def forward(self, x):
            return self.up(x, output_size=(2 * x.shape[2], 2 * x.shape[3]))

    model, x = Sized(), torch.randn(6, 2, 4, 3).double()
    other = nn.ConvTranspose2d(2, 3, 3, 2, 1, 1).double()
    expected = calibrate(nn.Sequential(other), [x])["0"]
    torch.testing.assert_close(calibrate(model, [x])["up"], expected, **EXACT)


def test_generator_is_pruned_by_calibration_and_compensated():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(8, 2, 2, 2),
    ).double()  # fmt: skip
    x = torch.randn(32, 3, 5, 6).double()
    whole = model(x).detach()
    errors = {}
    for compensate in (True, False):
        pruner = RLSPruner(model, None, x[:1], ratio=0.5, loader=[x], compensate=compensate)
        snapshot = pruner.snapshot()
        report = pruner.step()
        assert not report.refused and not report.uncompensated
        assert [change.after for change in report.couplings] == [4, 4]
        errors[compensate] = float((model(x) - whole).detach().square().mean())
        snapshot.restore()
    assert errors[True] < 0.8 * errors[False]


def test_carried_matrices_of_transposed_convolutions_follow_the_pruning():
    model = nn.Sequential(nn.ConvTranspose1d(3, 6, 2, 2), nn.ReLU(), nn.ConvTranspose1d(6, 2, 3))
    model, x = model.double(), torch.randn(50, 3, 6).double()
    carried = CarriedMatrices(model, calibrate(model, [x]))
    RLSPruner(model, None, x[:1], ratio=0.5, tracker=carried).step()
    assert carried.matrices()["2"].shape == (1, 10, 10)
    report = RLSPruner(model, None, x[:1], ratio=0.5, tracker=carried).step()
    assert not report.uncompensated and model[2].weight.shape[0] == 2


def test_transformer_encoder_with_a_padding_mask():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)

        def forward(self, x, mask):
            return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))

    model, x = Classifier(), torch.randn(6, 5, 8)
    mask = torch.arange(5) >= torch.tensor([5, 3, 4, 2, 5, 1])[:, None]
    enabled = torch.backends.mha.get_fastpath_enabled()
    found = calibrate(model, [{"x": x, "mask": mask}])
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert found["encoder.layers.0.linear1"].shape == (1, 9, 9)
    model.encoder.enable_nested_tensor = False
    again = calibrate(model, [{"x": x, "mask": mask}])
    assert all(torch.equal(P, again[name]) for name, P in found.items())
    report = RLSPruner(
        model, None, {"x": x, "mask": mask}, ratio=0.5, loader=[{"x": x, "mask": mask}]
    ).step()
    assert model.encoder.layers[0].linear1.out_features == 6
    assert "encoder.layers.0.linear2" not in report.uncompensated
