"""The baselines of the benchmark of transformers: what they cut, and what they leave alone."""

import copy

import pytest
import torch

from benchmarks.pruning.methods.heads import flap, slim
from benchmarks.pruning.transformers import Llama, counts_of
from rlscuda.pruning.running.measure import count_parameters

METHODS = [slim, flap]


@pytest.fixture
def decoder():
    return Llama(width=32, heads=4, keys=2, hidden=24, depth=2).eval()


@pytest.fixture
def texts():
    return list(torch.randint(0, 96, (8, 32)).split(4))


@pytest.mark.parametrize("method", METHODS)
def test_units_that_nothing_reads_go_first_and_change_nothing(decoder, texts, method):
    with torch.no_grad():
        for block in decoder.blocks:
            block.attention.o_proj.weight[:, 16:] = 0  # of the second group of heads
            block.down_proj.weight[:, 5:12] = 0
    cut = copy.deepcopy(decoder)
    method(cut, texts, {"heads": 1, "mlp": 7})
    with torch.no_grad():
        for x in texts:
            torch.testing.assert_close(cut(x), decoder(x), rtol=1e-4, atol=1e-4)
    for old, new in zip(decoder.blocks, cut.blocks, strict=True):
        assert torch.equal(new.attention.q_proj.weight, old.attention.q_proj.weight[:16])
        assert torch.equal(new.gate_proj.weight[5:], old.gate_proj.weight[12:])


@torch.no_grad()
def test_biases_keep_the_mean_of_the_first_layer(decoder, texts):
    seen = {}
    for name, model in (("whole", decoder), ("cut", copy.deepcopy(decoder))):
        if name == "cut":
            flap(model, texts, {"heads": 1, "mlp": 0})
        model.blocks[0].attention.o_proj.register_forward_hook(
            lambda _, inputs, output, name=name: seen.setdefault(name, []).append(output)
        )
        for x in texts:
            model(x)
    whole, cut = (torch.cat(seen[name]).mean((0, 1)) for name in ("whole", "cut"))
    torch.testing.assert_close(cut, whole, rtol=1e-2, atol=2e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.2, 0.4])
def test_the_share_of_parameters_is_met(decoder, texts, method, share):
    before = count_parameters(decoder)
    one = 3 * decoder.blocks[0].down_proj.out_features * len(decoder.blocks)
    method(decoder, texts, counts_of(decoder, share))
    biases = sum(p.numel() for n, p in decoder.named_parameters() if n.endswith("bias"))
    assert share * before <= before + biases - count_parameters(decoder) < share * before + one
