"""Attributes that hold numbers of channels follow a cut, each its own axis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.transaction import pruned_copy


class Attention(nn.Module):
    """Queries and keys of one width, values of another, as many heads as a key has dimensions."""

    def __init__(self, width=12, num_heads=4, key_dim=4, value_dim=6):
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.q, self.k = nn.Linear(width, num_heads * key_dim), nn.Linear(width, 16)
        self.v, self.out = nn.Linear(width, num_heads * value_dim), nn.Linear(24, width)

    def forward(self, x):
        count, tokens, _ = x.shape
        q = self.q(x).view(count, tokens, self.num_heads, self.key_dim).transpose(1, 2)
        k = self.k(x).view(count, tokens, self.num_heads, self.key_dim).transpose(1, 2)
        v = self.v(x).view(count, tokens, self.num_heads, self.value_dim).transpose(1, 2)
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [False, True])
def test_heads_and_dimensions_of_one_number(heads):
    attention = Attention()
    model = nn.Sequential(nn.Linear(5, 12), attention, nn.Linear(12, 3))
    x = torch.randn(2, 7, 5)
    structure = trace(model, x, heads=heads)
    assert structure.refused == {}
    widths = {c.name: c.units for c in structure.couplings}
    assert widths == ({"0": 12, "1.q": 4, "1.out": 12} if heads else
                      {"0": 12, "1.q": 4, "1.v": 6, "1.out": 12})  # fmt: skip
    for name in ("1.q", "1.v"):
        if name in widths:
            pruned = pruned_copy(model, plan(structure, {name: [1]}), {})
            assert pruned(x).shape == (2, 7, 3)
            got = (pruned[1].num_heads, pruned[1].key_dim, pruned[1].value_dim)
            assert got == ((3, 4, 6) if heads else (4, 3, 6) if name == "1.q" else (4, 4, 5))
