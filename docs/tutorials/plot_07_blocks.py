"""
Fewer layers: residual branches removed or replaced
===================================================

A network of residual blocks computes x + F(x) again and again. Removing channels makes every
block thinner; removing a branch F makes the network shallower, which saves time even where thin
layers do not. Many trained branches are nearly linear, so a linear map T x + b in their place,
the least-squares fit to what they put out, keeps most of what they do.
"""

import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rlscuda import RLSOptimizer, zoo
from rlscuda.pruning import find_blocks, load_pruned, remove_blocks, save_pruned

digits = load_digits()  # 1,797 images of 8 x 8
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, validation, test = order[:1100], order[1100:1300], order[1300:]


def network():
    """A ResNet of two stages with three residual blocks each."""
    return zoo.resnet(zoo.ImageShape(1, 8, 8), 10, widths=(8, 16), blocks=3)


def fit(model, optimizer, epochs):
    """Trains by a cosine schedule."""
    model.train()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 18)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def loss(model):
    """On the validation digits."""
    return nn.functional.cross_entropy(model.eval()(x[validation]), y[validation]).item()


@torch.no_grad()
def accuracy(model):
    """On the test digits, in percent."""
    return 100 * (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()


torch.manual_seed(0)
model = network()
optimizer = RLSOptimizer(model)
fit(model, optimizer, 5)

# %%
# What can go
# -----------
# :func:`~rlscuda.pruning.find_blocks` runs the model once and reads its operators, so branches
# need not be modules of their own: here each is two convolutions and two norms that a block's
# forward calls one after the other. Each is proven on a copy. It works as well on models of
# torchvision and timm, and on transformers, whose attention and MLP are a branch each.

for block in find_blocks(model, x[:2]).found:
    print(f"{block.name}: {', '.join(block.modules)}, {block.parameters} parameters")

# %%
# Which go, and what becomes of them
# ----------------------------------
# :func:`~rlscuda.pruning.remove_blocks` takes one branch after the other: the one, and in the
# way, that costs the least validation loss for what it saves. The ways are ``delete``, a ``1x1``
# or a ``3x3`` convolution, and for tokens a ``linear`` layer. Nothing is trained in between. The
# picture is of deletions alone, and of all ways: maps cost FLOPs, and keep more. One branch goes
# at a time here, to look at the accuracy in between; ``count=4`` would do it at once.

batches = x[train[:256]].split(128)
rules = {"deleted": ("delete",), "deleted or replaced": ("delete", "1x1", "3x3")}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for (name, ways), color in zip(rules.items(), ("C0", "C3")):
    shorter, percent, flops, done = copy.deepcopy(model), [accuracy(model)], [], []
    options = {"count": 1, "evaluate": loss, "ways": ways}
    left_over = [block.name for block in find_blocks(model, x[:2]).found]
    for _ in range(4):
        report = remove_blocks(shorter, x[:1], batches, names=left_over, **options)
        left_over.remove(report.changes[0].name)  # a map that takes its place stays
        flops = flops or [report.gains.before.flops / 1e6]
        flops.append(report.gains.after.flops / 1e6)
        percent.append(accuracy(shorter))
        done += [f"{change.name}: {change.how}" for change in report.changes]
    left.plot(range(5), percent, "o-", color=color, label=name)
    right.plot(flops, percent, "o-", color=color, label=name)
    print(f"{name}: {', '.join(done)}")
left.set(xlabel="branches gone", ylabel="test accuracy, %", xticks=range(5), ylim=(0, 102))
right.set(xlabel="MFLOPs of a forward")
for axis in (left, right):
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
plt.show()

# %%
# Without ``evaluate`` the cost is how far the outputs are from what they were, which needs no
# labels; ``target_flops=.7`` or ``target_params=.5`` say how much has to go instead of how many.
# Channels and branches can go together, too: :class:`~rlscuda.pruning.RLSPruner` with
# ``what=("channels", "blocks")`` tries each number of branches, lets channels meet the rest of a
# target of size, and does what costs the least.
#
# Training goes on, and a file holds it
# -------------------------------------
# For good, with the optimizer: the parameters of a branch leave it with their matrices and
# moments, a map joins it, and the others keep theirs.

print(remove_blocks(model, x[:1], batches, optimizers=optimizer, count=2, evaluate=loss))
print(f"as cut {accuracy(model):.1f} %")
optimizer.restart()
fit(model, optimizer, 2)
print(f"trained on {accuracy(model):.1f} %")
with tempfile.TemporaryDirectory() as folder:
    save_pruned(model, Path(folder) / "smaller.safetensors", optimizer=optimizer)
    again = load_pruned(network, Path(folder) / "smaller.safetensors").eval()
assert torch.equal(again(x[test]), model(x[test]))
