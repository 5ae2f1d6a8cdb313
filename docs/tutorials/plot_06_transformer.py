"""
A transformer: heads that lose dimensions
=========================================

What attention computes of queries and keys is qᵀk, and that is the same in every basis: with q ←
Tq and k ← T⁻ᵀk nothing changes. So the dimensions of a head, as they stand in the weights, mean
nothing by themselves. :class:`~rlscuda.pruning.RLSPruner` first turns each head into the basis in
which few dimensions carry nearly all of its logits, and then drops the others; values are turned
likewise. Or it takes whole heads, with ``heads=True``. Here both happen to a small vision
transformer that reads digits.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner

digits = load_digits()  # 1,797 images of 8 x 8
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1300], order[1300:]


class Block(nn.Module):
    """Attention and an MLP, each after a norm and beside a shortcut."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        """Maps tokens [N, 16, width] to the same shape."""
        y = self.norm1(x)
        parts = (self.query(y), self.key(y), self.value(y))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Of 16 patches of 2 x 2 pixels."""

    def __init__(self, width=48, heads=4, depth=3):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        """Maps images [N, 1, 8, 8] to logits [N, 10]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


@torch.no_grad()
def accuracy(model):
    """On the test digits, in percent."""
    return 100 * (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()


torch.manual_seed(0)
model, epochs = ViT(), 10
optimizer = RLSOptimizer(model)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, 21 * epochs, cycle_momentum=False)
for _ in range(epochs):
    for rows in train[torch.randperm(1300)].split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
print(f"whole: {accuracy(model):.1f} % right")

# %%
# One shot
# --------
# ``ratio`` is given by name here, so that only heads are touched; keys go with their queries. To
# turn heads the matrices must be exact: they come from ``loader``, without labels. Nothing is
# trained after the cut.

parts = {"dimensions": ("*.query", "*.value"), "heads": ("*.query",)}
methods = {"closed form": {}, "L2 magnitude": {"importance": "l2", "compensate": False}}
shares, curves, reports = [0.25, 0.5, 0.75], {}, {}
for what, names in parts.items():
    for method, how in methods.items():
        curves[what, method] = [accuracy(model)]
        how = {**how, "heads": what == "heads", "loader": x[train].split(260)}
        for share in shares:
            pruned, ratio = copy.deepcopy(model), dict.fromkeys(names, share)
            report = RLSPruner(pruned, None, x[:2], ratio=ratio, **how).step()
            curves[what, method].append(accuracy(pruned))
        reports[what, method] = report
print(reports["dimensions", "closed form"])

# %%
# On the left what is left of the accuracy. On the right why: what each dimension of the queries
# costs when it goes, least first, summed over the heads of a block. In the basis found, most cost
# next to nothing.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
gone = [0, *(100 * share for share in shares)]
for (what, method), percent in curves.items():
    style = f"{'-' if what == 'dimensions' else ':'}o"
    color = "C3" if method == "closed form" else "C0"
    left.plot(gone, percent, style, color=color, label=f"{what}, {method}")
for change in reports["dimensions", "closed form"].couplings:
    if change.name.endswith("query"):
        right.semilogy(range(1, len(change.cost) + 1), change.cost, "o-", label=change.name)
left.set(xlabel="gone, %", ylabel="test accuracy, %", ylim=(0, 102))
right.set(xlabel="dimension of a head, in the order of removal", ylabel="cost of its removal")
for axis in (left, right):
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
plt.show()

# %%
# FLOPs and memory shrink with the heads. Time follows only where an operator takes longer than
# its start, on networks that are wider than this one.
