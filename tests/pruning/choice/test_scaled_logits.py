"""Attention divides its logits by the root of its width, also where nothing is compensated."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.learning.networks import Attention
from rlscuda.pruning import RLSPruner
from rlscuda.pruning.structure.trace import trace


@pytest.mark.parametrize("options", [{"importance": "l2", "compensate": False}, {}])
@torch.no_grad()
def test_dimensions_of_queries_and_keys_that_are_zero_cost_nothing(options):
    model = nn.Sequential(Attention(12, 3, causal=False)).eval()
    for layer in (model[0].query, model[0].key):
        for head in range(3):
            layer.weight[4 * head : 4 * head + 2] = 0
            layer.bias[4 * head : 4 * head + 2] = 0
    x = torch.randn(4, 5, 12)
    pruned = copy.deepcopy(model)
    RLSPruner(
        pruned, None, x[:2], ratio={"*query": 0.5}, source="calibration", loader=[x], **options
    ).step()
    assert pruned[0].query.out_features == pruned[0].key.out_features == 6
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-3, atol=1e-4)


class Attended(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.inner = nn.Linear(6, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.inner(x)
        return self.head(torch.tanh(x + self.attention(x, x, x, need_weights=False)[0]))


@pytest.mark.parametrize("width, heads", [(24, 4), (16, 4)])  # also where a head is heads wide
@torch.no_grad()
def test_multihead_attention_keeps_heads_and_scale(width, heads):
    torch.manual_seed(0)
    model, x = Attended(width, heads).eval(), torch.randn(4, 5, 6)
    model.attention.in_proj_bias.normal_()
    coupling = trace(model, x).couplings[0]
    for (name, axis), places in coupling.places.items():
        model.get_parameter(name).index_fill_(axis, places[::2].flatten(), 0)
    pruned = copy.deepcopy(model)
    RLSPruner(pruned, None, x, ratio=0.5, importance="l2", compensate=False).step()
    assert (pruned.attention.embed_dim, pruned.attention.num_heads) == (width // 2, heads)
    torch.testing.assert_close(pruned(x), model(x))
