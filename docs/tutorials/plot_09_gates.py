"""
Layer gates: training decides which branches stay
=================================================

How deep must a network be? :class:`~rlscuda.pruning.LayerGates` lets training answer. Every
residual branch x + F(x) gets a probability; a step draws which branches it computes, and skips
the others. What a branch lowers the loss by is measured on the way, against a price: the
probabilities of those worth it rise to 1, those of the others fall to 0, and they leave the
network and the optimizer while training goes on, in the spirit of "Concurrent Training and Layer
Pruning of Deep Neural Networks" (Guenter and Sideris 2024).
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import LayerGates

digits = load_digits()  # 1,797 images of 8 x 8
x = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1280], order[1280:]


class Residual(nn.Module):
    """A branch of two linear layers beside a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        """Maps [N, width] to the same shape."""
        return torch.relu(x + self.outer(torch.relu(self.inner(x))))


def network(depth):
    """A perceptron of so many residual blocks."""
    blocks = [Residual(32) for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), *blocks, nn.Linear(32, 10))


@torch.no_grad()
def accuracy(model):
    """On the test digits, in percent."""
    return 100 * (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()


# %%
# In the loop
# -----------
# One call between ``backward`` and the optimizer's step. It is given what computes the loss of
# the batch, to look at one branch with and without, and the loss that is already known. The price
# is in the units of the loss: a branch has to lower it by so much.


def fit(model, optimizer, epochs, gates=None):
    """Trains; the probability of each branch after each epoch, by name."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 20)
    history = []
    for _ in range(epochs):
        model.train()
        for rows in train[torch.randperm(1280)].split(64):

            def criterion(rows=rows):
                return nn.functional.cross_entropy(model(x[rows]), y[rows])

            optimizer.zero_grad()
            loss = criterion()
            loss.backward()
            if gates is not None:
                gates.step(criterion, loss)
            optimizer.step()
            schedule.step()
        if gates is not None:
            history.append({gate.name: gate.theta for gate in gates.report().gates})
    return history


epochs, histories = 14, {}
for price in (0.01, 0.1):
    torch.manual_seed(0)
    model = network(6)
    optimizer = RLSOptimizer(model, lr=0.02)
    gates = LayerGates(model, x[:2], optimizer, total_steps=epochs * 20, price=price)
    histories[price] = fit(model, optimizer, epochs, gates)
    report = gates.finish(loader=x[train].split(256))
    optimizer.restart()
    fit(model, optimizer, 3)
    print(f"price {price}: {accuracy(model):.1f} % right")
    print(report, end="\n\n")

# %%
# In eval mode nothing is drawn: branches above one half are on. ``finish`` removes what is below
# one half and leaves an ordinary network, which :func:`~rlscuda.pruning.save_pruned` and the
# exports take; the three epochs after it adapt it to its depth. For comparison, networks that
# have had few branches from the start, trained as long:

for depth in (6, 2, 1, 0):
    torch.manual_seed(0)
    shallow = network(depth)
    optimizer = RLSOptimizer(shallow, lr=0.02)
    fit(shallow, optimizer, epochs + 3)
    print(f"{depth} branches from the start: {accuracy(shallow):.1f} % right")

# %%
# Each line is the probability of a branch. At first gates are drawn but do not learn, since all
# branches, worth nothing yet, would die together. At the low price most stay up; at the higher
# one they part, and what is at 0 is no longer computed. What is between at the end is undecided:
# ``finish`` goes by one half, more steps would decide it.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for axis, (price, history) in zip(axes, histories.items()):
    for number, name in enumerate(history[0]):
        thetas = [entry.get(name, 0) for entry in history]
        axis.plot(range(1, epochs + 1), thetas, ".-", label=f"branch {number + 1}")
    axis.set(xlabel="epochs", title=f"price {price}")
    axis.grid(alpha=0.3)
axes[0].set(ylabel="probability of being computed", ylim=(-0.05, 1.05))
axes[1].legend(fontsize=8)
plt.show()

# %%
# Further: ``by="flops"`` or ``by="params"`` makes the price of a branch follow its size; with
# ``maps=loader`` a branch that goes leaves a small linear map that fits it, which is trained on.
# ``gates.state_dict()`` has all that the states of model and optimizer lack: to go on, make
# model, optimizer and gates as at the start and load the gates first. In several processes every
# one draws the same branches; a `DistributedDataParallel` model wants
# ``find_unused_parameters=True``, since a branch that is off has no gradient. On the command
# line, ``rlscuda train --gates 0.03`` does all of this.
