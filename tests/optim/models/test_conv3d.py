"""A Conv3d is a Conv2d over slabs of its input: the planes that one output plane sees."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_exact
from support.training import make
from torch import nn

from rlscuda import RLSOptimizer, reference
from rlscuda.optim.layers import Layer
from rlscuda.pruning import RLSPruner, calibrate

FORMS = ["paper", "natural", "adaptive"]
GEOMETRIES = [
    {"kernel_size": (3, 2, 3), "stride": s, "padding": p, "padding_mode": mode, "dilation": d,
     "groups": g}
    for s, p, mode, d, g in itertools.product(
        (1, (2, 1, 2)), (0, (2, 1, 1), "same", "valid"),
        ("zeros", "reflect", "replicate", "circular"), (1, (2, 1, 1)), (1, 2))
    if not (p == "same" and s != 1) and not (p in (0, "valid") and mode != "zeros")
]  # fmt: skip
GEOMETRIES += [{"kernel_size": k, "padding": "same"} for k in (1, 2, 4)]


def rows_of(conv, x):
    """The im2col matrix by PyTorch's own padding and windows: [groups, N D' H' W', n]."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for i, (k, s, d) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    rows = x.permute(1, 0, *range(2, 8)).unflatten(0, (conv.groups, -1))  # [g, C/g, N, D'H'W', k]
    return rows.permute(0, 2, 3, 4, 5, 1, 6, 7, 8).flatten(5).flatten(1, 4)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_rows_are_those_of_the_convolution(options):
    conv = nn.Conv3d(4, 6, bias=False, **options).double()
    layer, x = Layer("", conv, 0, False), torch.randn(2, 4, 6, 5, 7).double()
    images = layer.images(x)
    rows = reference.patch_rows(images, *layer.geometry)
    assert torch.equal(rows, rows_of(conv, x))
    assert images.shape[0] * layer.positions(images) == rows.shape[1]
    weight = conv.weight.detach().flatten(1).unflatten(0, (conv.groups, -1))
    product = (rows @ weight.mT).movedim(0, -2).flatten(-2)
    assert_exact(product, conv(x).detach().movedim(1, -1).flatten(0, -2))


class Slabs(nn.Module):
    """The Conv2d that a Conv3d without padding is, over its slabs."""

    def __init__(self, conv):
        super().__init__()
        (self.k, kh, kw), (self.s, sh, sw) = conv.kernel_size, conv.stride
        self.plane = nn.Conv2d(conv.in_channels * self.k, conv.out_channels, (kh, kw), (sh, sw),
                               groups=conv.groups)  # fmt: skip
        weight = conv.weight.detach().flatten(1, 2)
        self.plane.load_state_dict({"weight": weight, "bias": conv.bias.detach()})

    def forward(self, x):
        slabs = x.unfold(2, self.k, self.s).permute(0, 2, 1, 5, 3, 4).flatten(2, 3)
        return self.plane(slabs.flatten(0, 1)).unflatten(0, slabs.shape[:2]).movedim(1, 2)


def fit(model, optimizer, shape=(3, 4, 6, 5, 5), steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(shape).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("summary", ["mean", "sketch", "sample"])
@pytest.mark.parametrize("groups, most, last", [(1, None, False), (2, None, True), (1, 20, True)])
def test_steps_are_those_of_a_conv2d_over_slabs(form, summary, groups, most, last):
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 6, (3, 2, 2), (2, 1, 1), groups=groups).double()
    slabs = Slabs(conv).double()
    if last:
        conv = conv.to(memory_format=torch.channels_last_3d)
    optimizers = [make(m, summary, form=form, max_fan_in=most) for m in (conv, slabs)]
    for model, optimizer in zip((conv, slabs), optimizers):
        fit(model, optimizer)
    for one, other in zip(conv.parameters(), slabs.parameters()):
        assert_exact(one.detach().flatten(), other.detach().flatten(), 1e-10)
        for name, value in optimizers[0].state[one].items():
            if isinstance(value, torch.Tensor):
                assert_exact(value, optimizers[1].state[other][name], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_trains_and_is_pruned(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1, padding_mode="replicate"), nn.BatchNorm3d(8), nn.ReLU(),
        nn.Conv3d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(4 * 8, 2),
    ).to(dtype)  # fmt: skip
    optimizer = RLSOptimizer(model)
    fit(model, optimizer, (4, 2, 6, 6, 6))
    assert [r.fan_in for r in optimizer.coverage() if r.status == "exact"] == [55, 217, 33]
    if dtype == torch.float32:
        matrices = calibrate(model, [torch.randn(4, 2, 6, 6, 6)])
        assert matrices["3"].shape == (1, 217, 217)
        RLSPruner(model, optimizer, torch.randn(2, 2, 6, 6, 6), ratio=0.5).step()
        assert model[0].out_channels == 4
        assert optimizer.inverse_autocorrelation("3").shape == (109, 109)
    fit(model, optimizer, (4, 2, 6, 6, 6), 2)
    assert optimizer.health()["3"].updates == 5
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_unbatched_input():
    conv = nn.Conv3d(2, 3, 3)
    optimizer = RLSOptimizer(conv)
    conv(torch.randn(2, 5, 5, 5)).sum().backward()
    optimizer.step()
    assert optimizer.health()[""].updates == 1
