"""What a model costs, counted by hand on small ones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.training import cnn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from rlscuda.cli.report.record import gains_of, size_of
from rlscuda.pruning import RLSPruner, SketchTracker
from rlscuda.pruning.running.measure import _UNCOUNTED, Measurement, compare, count_flops, measure


def three_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def test_counts_of_a_perceptron():
    found = measure(three_layers(), torch.randn(5, 8), repeats=1)
    assert found.parameters == 8 * 32 + 32 + 32 * 4 + 4
    assert found.flops == 2 * 5 * (8 * 32 + 32 * 4)
    # most lives when the ReLU has both its input and its output
    assert found.peak_memory_bytes == 4 * (found.parameters + 5 * 8 + 2 * 5 * 32)
    assert found.latency_seconds > 0
    assert (found.batch_size, found.device) == (5, "cpu")


def test_counts_of_a_convolution():
    model = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
    found = measure(model, torch.randn(2, 4, 5, 5), batch_size=7, repeats=1)
    assert found.parameters == 6 * 2 * 9
    assert found.flops == 2 * 7 * 25 * 6 * 2 * 9
    assert found.peak_memory_bytes == 4 * (found.parameters + 7 * 25 * (4 + 6))
    assert found.batch_size == 7


class Encoder(nn.Module):
    """A transformer layer of torch, which has an operator of its own for inference."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


@pytest.mark.parametrize("enabled", [True, False])
def test_counts_of_a_transformer(enabled):
    batch, length, width, hidden = 2, 5, 8, 32
    tokens = batch * length
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        flops = count_flops(Encoder(), torch.randn(batch, length, width))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    projections = 2 * tokens * (4 * width * width + 2 * width * hidden)
    attention = 2 * 2 * tokens * length * width  # scores, and sums of values
    assert flops == projections + attention + 2 * batch * width * 3


class SelfAttention(nn.Module):
    """Four heads over rows [batch, 5, 16], by the products that `way` names."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.layer = way, nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        if self.way == "module":
            return self.layer(x, x, x)[0]
        if self.way == "module without weights":
            return self.layer(x, x, x, need_weights=False)[0]
        rows = nn.functional.linear(x, self.layer.in_proj_weight, self.layer.in_proj_bias)
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in rows.chunk(3, -1))
        if self.way == "products":
            mixed = (q @ k.mT).softmax(-1) @ v
        elif self.way == "einsum":
            mixed = torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k), v)
        else:
            with sdpa_kernel(getattr(SDPBackend, self.way)):
                mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.layer.out_proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "way",
    ["module", "module without weights", "products", "einsum", "MATH", "FLASH_ATTENTION"],
)
def test_attention_counts_the_same_however_it_is_computed(way):
    model, x = SelfAttention(way), torch.randn(2, 5, 16)
    products = 2 * 10 * 4 * 16 * 16 + 2 * 2 * 2 * 25 * 16  # projections, and scores and their sums
    assert count_flops(model, x) == size_of(model, x)["flops"] == products


@pytest.mark.parametrize("layer, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_counts_of_a_recurrent_layer(layer, gates):
    model = layer(8, 16, num_layers=2, bidirectional=True)
    inputs = 2 * gates * 16 * (8 + 16) + 2 * gates * 16 * (32 + 16)  # both ways of each layer
    assert count_flops(model, torch.randn(5, 3, 8)) == 2 * 5 * 3 * inputs


class Packed(nn.Module):
    """A recurrent layer on sequences of several lengths."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(pack_padded_sequence(x, [5, 4, 2]))[0].data


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}]
)
def test_a_recurrent_layer_counts_the_same_fused_or_not(layer, options):
    model, x = layer(8, 16, **options), torch.randn(5, 3, 8)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert count_flops(model, x) == 2 * 15 * matrices  # in one operator of oneDNN, for an LSTM
    with FlopCounterMode(display=False) as counter:
        model.double()(x.double())
    assert counter.get_total_flops() == count_flops(model, x.double()) == 2 * 15 * matrices
    if not options.get("batch_first"):
        assert count_flops(Packed(model.float()), x) == 2 * 11 * matrices


def test_counts_of_the_recurrent_operator_of_cuda():
    weights = [torch.Size(shape) for shape in ((64, 8), (64, 16), (64,), (64,))]
    count = _UNCOUNTED[torch.ops.aten._cudnn_rnn]
    assert count(torch.Size((5, 3, 8)), weights, 4, None) == 2 * 15 * 64 * (8 + 16)


def test_hooks_change_no_report():
    whole, image = Encoder().eval(), torch.randn(1, 5, 8)
    hooked = copy.deepcopy(whole)
    tracker = SketchTracker(hooked)  # on whose hooks torch leaves its operator
    assert tracker.layers and size_of(hooked, image) == size_of(whole, image)
    ratios = gains_of(whole, hooked, image, 4).ratios
    assert ratios.pop("latency_seconds") > 0  # which two measurements may share
    assert set(ratios.values()) == {1}


def test_a_target_of_flops_is_met_by_a_transformer():
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(16, 5, 8)
    for part in (model, model.layer.linear1):
        part.register_forward_hook(lambda *_: None)  # with which torch leaves its operator
    flops = count_flops(model, x[:2])
    report = RLSPruner(model, None, x[:2], target_flops=0.7, loader=[x]).step()
    assert report.gains.before.flops == flops
    assert 0.6 * flops < report.gains.after.flops == count_flops(model, x[:2]) <= 0.7 * flops


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Linear(3, 3), layer)
    model[1].weight = layer.weight
    found = measure(model, torch.randn(1, 3), repeats=1)
    assert found.parameters == 9 + 3 + 3
    assert found.flops == 3 * 2 * 9


def test_a_freed_tensor_stops_counting():
    class Wide(nn.Module):
        def forward(self, x):
            for _ in range(4):
                x = (x.repeat(1, 10) * 2)[:, :4].clone()
            return x

    found = measure(Wide(), torch.randn(1, 4), repeats=1)
    assert found.peak_memory_bytes == 4 * (4 + 4 + 2 * 40)


def test_nothing_of_the_model_changes():
    model = cnn()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    measure(model, torch.randn(4, 2, 6, 6, generator=torch.Generator()), repeats=1)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_modes_return_after_an_error():
    model = three_layers()
    with pytest.raises(RuntimeError):
        measure(model, torch.randn(2, 9))
    assert all(module.training for module in model.modules())


def test_named_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, scale, shift=None):
            return self.layer(x) * scale + (0 if shift is None else shift)

    x, scale = torch.randn(2, 4), torch.randn(3)[0]
    for inputs in ((x, scale), [x, scale], {"x": x, "scale": scale, "shift": torch.randn(2, 2)}):
        found = measure(Two(), inputs, batch_size=6, repeats=1)
        assert found.flops == 2 * 6 * 8


def test_ratios_and_table():
    before = Measurement(100_000, 3_000_000, 64 << 20, 2e-3, 8, "cpu")
    after = Measurement(25_000, 300_000, 16 << 20, 5e-4, 8, "cpu")
    gains = compare(before, after)
    assert gains.ratios == pytest.approx(
        {"parameters": 4, "flops": 10, "peak_memory_bytes": 4, "latency_seconds": 4}
    )
    lines = str(gains).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["parameters", "FLOPs", "peak", "latency"]
    assert lines[0].split() == ["batch", "of", "8,", "cpu", "before", "after", "ratio"]
    assert "100 k" in lines[1] and "25.0 k" in lines[1] and "4.00x" in lines[1]
    assert "3.00 M" in lines[2] and "300 k" in lines[2]
    assert "64.0 MiB" in lines[3] and "2.00 ms" in lines[4] and "500 µs" in lines[4]
    assert len({len(line) for line in lines}) == 1


def test_ratio_to_nothing():
    before = Measurement(0, 5, 1, 1.0, 1, "cpu")
    ratios = compare(before, Measurement(0, 0, 1, 1.0, 1, "cpu")).ratios
    assert ratios["parameters"] == 1 and math.isinf(ratios["flops"])


def test_errors():
    model = three_layers()
    with pytest.raises(TypeError, match="model must be a module, got int"):
        measure(3, torch.randn(1, 8))
    with pytest.raises(TypeError, match="with a tensor among its values, got list"):
        measure(model, [1, 2])
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        measure(model, torch.randn(1, 8), batch_size=0)
    with pytest.raises(ValueError, match="repeats must be positive, got -1"):
        measure(model, torch.randn(1, 8), repeats=-1)
    with pytest.raises(ValueError, match=r"must not be empty, got \[0, 8\]"):
        measure(model, torch.randn(0, 8))
    first = Measurement(1, 1, 1, 1.0, 1, "cpu")
    with pytest.raises(ValueError, match="same batch_size, got 1 and 2"):
        compare(first, Measurement(1, 1, 1, 1.0, 2, "cpu"))
