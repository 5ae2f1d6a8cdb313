"""
Relief: masks by neural activity
================================

"Neural network relief" (Dekhovich et al. 2024) keeps, of every unit, the few connections that
carry most of its signal. A connection is a weight of a linear layer, a kernel of a convolution,
or a bias; its signal is the mean of abs(w h) over some hundred samples.
:func:`~rlscuda.pruning.prune_relief` does one round of it, which takes a moment, since nothing
but the mean of abs(h) is needed of the data.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune

from rlscuda.pruning import calibrate, prune_relief, remove_unread

digits = load_digits()  # 1,797 images of 8 x 8
x = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1200], order[1200:]
seen = x[train].split(300)  # what the rounds look at

torch.manual_seed(0)
layers = [nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)]
model = nn.Sequential(*layers)
optimizer = torch.optim.Adam(model.parameters(), 3e-3)


def fit(model, optimizer, epochs):
    """Trains on."""
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model):
    """On the test digits, in percent."""
    return 100 * (model(x[test]).argmax(1) == y[test]).float().mean().item()


fit(model, optimizer, 15)
print(f"whole: {accuracy(model):.1f} %")

# %%
# One round
# ---------
# ``alpha`` is the share of its signal that every unit keeps, so in the mean over the samples its
# pre-activation moves by no more than ``1 - alpha`` of it. The masks are those of
# `torch.nn.utils.prune`, on weights and on biases; the parameters stay the same objects, so the
# same optimizer, an :class:`~rlscuda.RLSOptimizer` or any other, trains on. Units that no
# connection reads any more lose those that make them.

once = copy.deepcopy(model)
report = prune_relief(once, seen, alpha=0.8)
print(report)
print(f"{report.left:.0%} of the connections are left, {accuracy(once):.1f} % right")

# %%
# Weights that make up for what went
# ----------------------------------
# What is left of a unit can be fitted, in closed form, to what the unit put out before. It takes
# the inverse autocorrelation matrices: of :func:`~rlscuda.pruning.calibrate`, of a
# :class:`~rlscuda.pruning.SketchTracker`, or an RLSOptimizer's own. Below, each share is cut in
# one round and nothing is trained since; beside it, as many of each unit's connections by size.


def by_size(model, report):
    """Keeps of each unit as many weights as a round of relief did, those of the largest size."""
    for row in report:
        layer = model.get_submodule(row.name)
        ranks = layer.weight.abs().argsort(1, descending=True).argsort(1)
        prune.custom_from_mask(layer, "weight", ranks < row.mask.sum(1, keepdim=True))


alphas = 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5
curves = {"relief": [], "relief, refitted": [], "as many by size": []}
matrices = calibrate(model, seen)
for alpha in alphas:
    models = {name: copy.deepcopy(model) for name in curves}
    report = prune_relief(models["relief"], seen, alpha=alpha)
    prune_relief(models["relief, refitted"], seen, alpha=alpha, matrices=matrices)
    by_size(models["as many by size"], report)
    for name, cut in models.items():
        curves[name].append((100 * report.left, accuracy(cut)))

# %%
# Rounds, with training between them
# ----------------------------------
# The same optimizer trains on, through six rounds of two epochs each. (The paper's loop for small
# networks returns to the initial weights after each round; masks hold by themselves, so to rewind
# is to copy values back and to load the optimizer's first state.)

rounds = []
for _ in range(6):
    report = prune_relief(model, seen, alpha=0.85, matrices=matrices, optimizers=optimizer)
    fit(model, optimizer, 2)
    rounds.append((100 * report.left, accuracy(model)))
    matrices = calibrate(model, seen)

shape = {"figsize": (9, 3.8), "width_ratios": (3, 2)}
figure, (left, right) = plt.subplots(1, 2, layout="constrained", **shape)
for (name, curve), color in zip(curves.items(), ("C0", "C3", "C7")):
    left.semilogx(*zip(*curve), "o-", color=color, label=f"{name}: one round, untrained")
left.semilogx(*zip(*rounds), "k*-", ms=9, label="refitted: rounds, two epochs each")
left.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
left.minorticks_off()
left.set(xlabel="connections left, %", ylabel="test accuracy, %")
left.legend(fontsize=7)
left.grid(alpha=0.3)
reads = model[0].weight_mask.sum(0).view(8, 8)
image = right.imshow(reads.numpy(), cmap="viridis")
right.set_title("connections left of each pixel", fontsize=10)
right.axis("off")
figure.colorbar(image, ax=right)
plt.show()

# %%
# What to look at: how little the ranking does beside the fit. Size, which looks at no data, ranks
# no worse here than signal; refitting makes up for either. On the right what rounds have left of
# the first layer: pixels where there is seldom ink are no longer read.
#
# A network that is really smaller
# --------------------------------
# Masks make nothing faster. Units that have lost all their connections can leave for good, and
# the model puts out what it did before; masks of the rest and optimizers follow.

with torch.no_grad():
    before = model(x[test])
removed = remove_unread(model, x[:2], optimizer)
print({name: len(units) for name, units in removed.items()}, "units removed:", model)
assert torch.allclose(model(x[test]), before, atol=1e-4)
