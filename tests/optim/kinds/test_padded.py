"""Subclasses of Conv2d that pad their input first: covered where they are that, refused where not.

The oracle is the same convolution behind an `nn.ZeroPad2d`.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.optim.kinds.padded import padding_of
from rlscuda.pruning import RLSPruner, SketchTracker, calibrate

with mock.patch("torch.library.register_fake", lambda *_, **__: lambda function: function):
    from timm.layers import StdConv2dSame
    from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport


class Fixed(nn.Conv2d):
    """Pads by what was fixed when it was made, as `Conv2dStaticSamePadding` does."""

    def __init__(self, *args, pad=(0, 1, 0, 1), **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d(pad)

    def forward(self, x):
        return F.conv2d(
            self.static_padding(x), self.weight, self.bias, self.stride, self.padding,
            self.dilation, self.groups,
        )  # fmt: skip


CASES = {  # and the padding of images of 9 x 8
    "same": (lambda: Conv2dSame(4, 6, 3), (1, 1, 1, 1)),
    "stride": (lambda: Conv2dSame(4, 6, 3, 2, bias=False), (0, 1, 1, 1)),
    "even": (lambda: Conv2dSame(4, 6, (2, 4)), (1, 2, 0, 1)),
    "dilation": (lambda: Conv2dSame(4, 6, 3, 2, dilation=2), (1, 2, 2, 2)),
    "depthwise": (lambda: Conv2dSame(4, 4, 5, 2, groups=4), (1, 2, 2, 2)),
    "groups": (lambda: Conv2dSame(4, 6, 3, groups=2), (1, 1, 1, 1)),
    "point": (lambda: Conv2dSame(4, 6, 1), (0, 0, 0, 0)),
    "export": (lambda: Conv2dSameExport(4, 6, 3, 2), (0, 1, 1, 1)),
    "fixed": (lambda: Fixed(4, 6, 3, 2, pad=(2, 1, 0, 1)), (2, 1, 0, 0)),
}
EQUAL = {"rtol": 0, "atol": 0}


def images(*shape):
    return torch.randn(5, *(shape or (4, 9, 8)))


def plain(module, padding):
    """The same layer of torch's own."""
    conv = nn.Conv2d(
        module.in_channels, module.out_channels, module.kernel_size, module.stride,
        dilation=module.dilation, groups=module.groups, bias=module.bias is not None,
    )  # fmt: skip
    conv.load_state_dict(module.state_dict())
    return nn.Sequential(nn.ZeroPad2d(padding), conv)


def stepped(model, xs):
    optimizer = RLSOptimizer(model)
    for x in xs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", CASES)
def test_trained_as_the_convolution_of_a_padded_input(name):
    make, padding = CASES[name]
    module = make()
    assert padding_of(module, 9, 8) == padding
    other, xs = plain(module, padding), [images() for _ in range(3)]
    model = nn.Sequential(nn.Identity(), module)
    torch.testing.assert_close(model(xs[0]), other(xs[0]))
    own, theirs = stepped(model, xs), stepped(other, xs)
    assert own.coverage()[0].status == "exact"
    P = own.inverse_autocorrelation("1"), theirs.inverse_autocorrelation("1")
    torch.testing.assert_close(*P, **EQUAL)
    torch.testing.assert_close(module.weight, other[1].weight)
    torch.testing.assert_close(
        calibrate(model, xs)["1"], calibrate(other, xs)["1"], rtol=1e-9, atol=1e-9
    )


def test_every_size_of_images_has_its_own_padding():
    module = Conv2dSame(4, 6, 3, 2)
    sizes = ((9, 8), (8, 9), (7, 7), (4, 4))
    paddings = [padding_of(module, *size) for size in sizes]
    assert paddings == [(0, 1, 1, 1), (1, 1, 0, 1), (1, 1, 1, 1), (0, 1, 0, 1)]
    xs = [images(4, *size) for size in sizes]
    tracker = SketchTracker(module)
    for x, padding in zip(xs, paddings):
        other = plain(module, padding)
        exact = calibrate(nn.Sequential(module), [x])["0"], calibrate(other, [x])["1"]
        torch.testing.assert_close(*exact, rtol=1e-9, atol=1e-9)
        module(x).sum().backward()
    assert tracker.matrices()[""].shape == (1, 37, 37)


def net(same):
    torch.manual_seed(3)
    convs = [Conv2dSame(3, 6, 3, 2, bias=False), Conv2dSame(6, 8, 3), Conv2dSame(8, 8, 3, groups=8)]
    head = nn.Linear(8, 4)
    if not same:
        convs = [plain(m, p) for m, p in zip(convs, ((0, 1, 0, 1), (1, 1, 1, 1), (1, 1, 1, 1)))]
    parts = [part for conv in convs for part in (conv, nn.ReLU())]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()


def test_pruned_as_the_convolution_of_a_padded_input():
    x = torch.randn(20, 3, 8, 8).double()
    found = []
    for same in (True, False):
        model = net(same)
        report = RLSPruner(model, None, x[:2], ratio=0.5, loader=[x]).step()
        assert not report.refused and not report.uncompensated
        assert [c.after for c in report.couplings] == [3, 4]
        found.append(model(x))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


class Scaled(Conv2dSame):
    def forward(self, x):
        return 1.01 * super().forward(x)


class Noisy(Conv2dSame):
    def forward(self, x):
        return super().forward(x) + 1e-3 * torch.randn(())


class Reflecting(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="reflect"))


class InTraining(Conv2dSame):
    def forward(self, x):
        return super().forward(x).relu() if self.training else super().forward(x)


class Failing(nn.Conv2d):
    def forward(self, x):
        raise LookupError("never")


class Wide(Conv2dSame):
    """Another thing where there are more than two channels."""

    def forward(self, x):
        return super().forward(x) * (1 + (x.shape[1] > 2))


class Gated(Conv2dSame):
    """A convolution as long as nothing trains its gate."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gate * super().forward(x)


class Small(nn.Conv2d):
    """A convolution of small images only."""

    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[-1] < 20 else y.flip(-1)


@pytest.mark.parametrize("kind", [Scaled, Noisy, Reflecting, InTraining, Failing, Wide, Gated])
def test_what_is_no_such_convolution_stays_refused(kind):
    model = nn.Sequential(kind(4, 6, 3), nn.Flatten(), nn.LazyLinear(2))
    model[2] = nn.Linear(6 * 81, 2)
    row = RLSOptimizer(model).coverage()[0]
    assert (row.status, row.why) == ("fallback", f"{kind.__name__} has a forward of its own")
    with pytest.raises(ValueError, match="has a forward of its own"):
        calibrate(model[:1], [images()], layers=["0"])


def test_standardised_weights_stay_refused():
    with pytest.raises(ValueError, match="StdConv2dSame has a forward of its own"):
        RLSOptimizer(nn.Sequential(StdConv2dSame(4, 6, 3)), include=["0"])


def test_a_size_at_which_it_is_none_is_an_error():
    model = nn.Sequential(Small(4, 6, 3))
    optimizer = stepped(model, [images()])
    P = optimizer.inverse_autocorrelation("0").clone()
    with pytest.raises(RuntimeError, match=r"no convolution of a padded input.*\[9, 24\]"):
        model(images(4, 9, 24))
    assert torch.equal(P, optimizer.inverse_autocorrelation("0"))


def test_the_trial_leaves_no_trace():
    module, calls = Conv2dSameExport(4, 6, 3), []
    module.register_forward_hook(lambda *_: calls.append(1))
    state, stream = {n: v.clone() for n, v in module.state_dict().items()}, torch.get_rng_state()
    assert RLSOptimizer(nn.Sequential(module)).coverage()[0].status == "exact"
    assert module.pad is None and module.training and not calls
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(v, state[n]) for n, v in module.state_dict().items())


def test_layers_of_one_input_that_pad_otherwise_share_no_matrix():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Fixed(4, 6, 3, pad=(2, 0, 1, 1)), Fixed(4, 6, 3, pad=(0, 2, 1, 1))

        def forward(self, x):
            return self.a(x) + self.b(x)

    optimizer = stepped(Two(), [images() for _ in range(2)])
    a, b = (optimizer.inverse_autocorrelation(name) for name in "ab")
    assert not torch.allclose(a, b)
