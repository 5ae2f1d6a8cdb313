"""
Schedules, of the rate and of pruning
=====================================

The default form of :class:`~rlscuda.RLSOptimizer` makes every step about equally long, however
small the gradient: it wants a schedule that lets the rate fall. Any scheduler of torch will do;
two are compared here. Then a second kind of schedule, :class:`~rlscuda.pruning.PruneSchedule`,
takes channels in rounds while the network trains, and waits after each until the loss is back.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, OneCycleLR

from rlscuda import RLSOptimizer
from rlscuda.pruning import PruneSchedule, RLSPruner

digits = load_digits()  # 1,797 images of 8 x 8
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, validation = order[:1200], order[1200:]


def network():
    """Two convolutions with batch norm, whose weights no RLS rule covers."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def epoch(model, optimizer, schedule=None):
    """One pass over the training digits, in 19 steps."""
    model.train()
    for rows in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


@torch.no_grad()
def loss(model):
    """On the validation digits."""
    return nn.functional.cross_entropy(model.eval()(x[validation]), y[validation]).item()


# %%
# The rate
# --------
# ``OneCycleLR`` starts low and warms up; ``CosineAnnealingLR`` starts at the top, for which the
# default is made. ``cycle_momentum=False`` leaves the momentum at .9. The scheduler moves ``lr``;
# parameters that no RLS rule covers, here those of batch norm, have a rate of their own,
# ``fallback_lr``, which follows the shape of ``lr``'s schedule by itself.

steps, rate = 8 * 19, 0.05
schedules = {
    "constant": lambda optimizer: ConstantLR(optimizer, 1.0),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, steps),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, rate, steps, cycle_momentum=False),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for (name, make), color in zip(schedules.items(), ("C7", "C0", "C3")):
    torch.manual_seed(0)
    model = network()
    optimizer = RLSOptimizer(model, lr=rate)
    schedule = make(optimizer)
    rates, losses = [], []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        epoch(model, optimizer, schedule)
        losses.append(loss(model))
    left.plot(range(8), rates, ".-", color=color, label=name)
    right.plot(range(1, 9), losses, ".-", color=color, label=name)
    print(f"{name:9} validation loss at the end {losses[-1]:.3f}, least {min(losses):.3f}")
left.set(xlabel="epochs", ylabel="lr", ylim=(0, None))
right.set(xlabel="epochs", ylabel="validation loss", yscale="log")
for axis in (left, right):
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
plt.show()

# %%
# Pruning in rounds
# -----------------
# The loop of Yu et al. 2022: train, prune a part, train until the validation loss is back, prune
# on. The schedule is told the loss after each epoch. Here four rounds take 75 % of the channels;
# a round counts as recovered at no more than a tenth above the loss before the first, and one
# that does not recover within five epochs is rolled back: network and optimizer are again as
# before its cut. The rate is constant and lower here, as nobody knows when the loop will end.
# ``loader`` shows batch norms what each cut has changed.

torch.manual_seed(0)
model = network()
optimizer = RLSOptimizer(model, lr=0.02)
pruner = RLSPruner(model, optimizer, x[:1], ratio=0.75, loader=x[train].split(300))
rounds = PruneSchedule(pruner, ratio=0.75, rounds=4, warmup=5, tolerance=0.1, budget=5)
losses, left_over, cuts = [], [], []
while not rounds.finished and len(losses) < 30:
    epoch(model, optimizer)
    losses.append(loss(model))
    if rounds.after_epoch(losses[-1]) == "pruned":
        cuts.append((len(losses), loss(model)))
    left_over.append(model[0].out_channels + model[4].out_channels)
for number, one in enumerate(rounds.rounds, 1):
    print(f"round {number}: {one.ratio:.0%} gone, {one.outcome} after {len(one.losses)} epochs")

# %%
# Each cross is the loss right after a cut, before any training: what the closed form could not
# make up for. Rounds get smaller towards the end, as ``curve="cubic"`` has it.

figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
epochs = range(1, len(losses) + 1)
axis.plot(epochs, losses, ".-", color="C3", label="validation loss")
axis.plot(*zip(*cuts), "x", ms=9, color="black", label="right after a cut")
axis.axhline(1.1 * rounds.reference, color="C7", ls="--", lw=1, label="counts as recovered")
axis.set(xlabel="epochs", ylabel="validation loss", yscale="log")
other = axis.twinx()
other.step(epochs, left_over, where="post", color="C0", alpha=0.6)
other.set_ylabel("channels left", color="C0")
other.set_ylim(0)
axis.legend(fontsize=8)
plt.show()
