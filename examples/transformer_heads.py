"""A vision transformer loses half of its heads and of its MLPs, and is not trained afterwards.

python examples/transformer_heads.py
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from train_digits import accuracy, splits, train

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner

WIDTH, HEAD = 48, 8  # of a token, and of each of its six heads
CUT = {"*.query": 0.5, "*.mlp.0": 0.5}  # shares that go: of the heads, of the hidden units
METHODS = {"ours": {"compensate": "in turn"}, "L2": {"importance": "l2", "compensate": False}}


class Tokens(nn.Module):
    """Images [N, 1, 8, 8] to 16 patches with their positions [N, 16, width]."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.positions = nn.Parameter(0.1 * torch.randn(16, WIDTH))

    def forward(self, x):  # noqa: D102
        return self.patches(x).flatten(2).mT + self.positions


class Block(nn.Module):
    """Attention and an MLP, each beside the identity [N, 16, width]."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    def forward(self, x):  # noqa: D102
        projected = (layer(self.norms[0](x)) for layer in (self.query, self.key, self.value))
        heads = (p.unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in projected)
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


if __name__ == "__main__":
    (x, y), test = splits()
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(2)))
    read_out = nn.Sequential(nn.LayerNorm([16, WIDTH]), nn.Flatten(), nn.Linear(16 * WIDTH, 10))
    model = nn.Sequential(Tokens(), blocks, read_out)
    list(train(model, RLSOptimizer(model), x, y, epochs=6))
    print(f"trained: {accuracy(model, *test):.1f} %")
    for name, how in METHODS.items():
        pruned = copy.deepcopy(model)
        pruner = RLSPruner(pruned, None, x[:1], ratio=CUT, heads=True, loader=x.split(256), **how)
        print(pruner.step(), f"{name}: {accuracy(pruned, *test):.1f} %", sep="\n\n")
