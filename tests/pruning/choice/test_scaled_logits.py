"""Attention divides its logits by the root of its width, also where nothing is compensated."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.learning.networks import Attention
from rlscuda.pruning import RLSPruner


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
