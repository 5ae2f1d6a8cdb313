"""
Adaptive pruning: how many channels, how many layers?
=====================================================

Half of a network's parameters are to go. From which layers, and should whole branches go instead?
:class:`~rlscuda.pruning.AdaptivePruner` leaves that to the training: every channel and every
residual branch pays one price for each parameter that it takes up, and what is not worth it is
taken out at the end of an epoch, in closed form, while the same optimizer trains on.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rlscuda import RLSOptimizer, zoo
from rlscuda.pruning import AdaptivePruner, load_optimizer, load_pruned, save_pruned

digits = load_digits()  # 1,797 images of 8 x 8
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:960], order[1280:]
batches = x[train].split(240)


def network():
    """A ResNet of two stages with three residual blocks each."""
    return zoo.resnet(zoo.ImageShape(1, 8, 8), 10, widths=(8, 16), blocks=3)


@torch.no_grad()
def accuracy(model):
    """On the test digits, in percent."""
    return 100 * (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()


def size(model):
    """Its parameters, in thousands."""
    return sum(p.numel() for p in model.parameters()) / 1e3


# %%
# In the loop
# -----------
# Three calls: before the optimizer's step, where scales take theirs; after it, where the price is
# paid and zeros stay zeros; and after an epoch, where what is to go, goes.


def fit(model, optimizer, pruner=None, epochs=8):
    """Trains by a cosine schedule; size and accuracy after each epoch."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 15)
    history = []
    for _ in range(epochs):
        model.train()
        for rows in train[torch.randperm(960)].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            if pruner is not None:
                pruner.after_backward()
            optimizer.step()
            if pruner is not None:
                pruner.after_step()
            schedule.step()
        if pruner is not None:
            pruner.after_epoch()
        history.append((size(model), accuracy(model)))
    return history


# %%
# By what is lost, or by scales
# -----------------------------
# With the penalty ``output`` a channel pays for what the layers that take it could not make up
# for: the root of tr(W P⁻¹ Wᵀ) over its columns, from the matrices that an
# :class:`~rlscuda.RLSOptimizer` has anyway. A branch pays for how far the network's output moves
# without it, which is measured on ``loader``. With the penalty ``scale`` the weights of batch
# norms are shrunk themselves, as network slimming does, and each branch has a gate; that takes no
# matrices, and any optimizer.
#
# ``epochs`` is a deadline. There is a size for each epoch on the way to it; of what costs least of
# all that meets the target, the cheapest goes first, as much as that size has room for, and between
# two epochs the price shrinks the channels that will be next.

runs, reports = {}, {}
for name, options in {
    "nothing goes": None,
    "output, channels and blocks": {"every": 5},
    "output, channels": {"every": 5, "what": "channels"},
    "scale, channels": {"penalty": "scale", "what": "channels"},
}.items():
    torch.manual_seed(0)
    model = network()
    optimizer = RLSOptimizer(model)
    pruner = None
    if options is not None:
        options = {"target_params": 0.5, "warmup": 2, "epochs": 3, "loader": batches, **options}
        pruner = AdaptivePruner(model, optimizer, x[:2], **options)
    runs[name] = fit(model, optimizer, pruner)
    if pruner is not None:
        reports[name] = pruner.report()
    print(f"{name}: {runs[name][-1][0]:.1f} k parameters, {runs[name][-1][1]:.1f} % right")

# %%
# Nothing has to be told the optimizer: matrices, moments and parameter groups have followed. What
# goes here, goes while the network is still learning and the rate is high; so the accuracy falls,
# most where scales are shrunk, and the rest of the schedule makes up for it. (Beside one cut of
# the same size, the benchmarks of this project find a gain of half a point; and nobody has to say
# which layers shrink.)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for (name, history), color in zip(runs.items(), ("C7", "C3", "C1", "C0")):
    sizes, percent = zip(*history)
    left.plot(range(1, 9), sizes, ".-", color=color, label=name)
    right.plot(range(1, 9), percent, ".-", color=color, label=name)
left.set(xlabel="epochs", ylabel="thousands of parameters", ylim=(0, None))
right.set(xlabel="epochs", ylabel="test accuracy, %", ylim=(0, 102))
right.legend(fontsize=8)
for axis in (left, right):
    axis.grid(alpha=0.3)
plt.show()

# %%
# Which layers paid
# -----------------
# The report says of every coupling and branch what is left, what penalty is left in it, and when
# and why the rest went.

print(reports["output, channels and blocks"])

figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
for number, ((name, report), color) in enumerate(zip(reports.items(), ("C3", "C1", "C0"))):
    fates = [fate for fate in report.fates if fate.kind == "channels"]
    places = [place + 0.27 * (number - 1) for place in range(len(fates))]
    axis.bar(places, [fate.after / fate.before for fate in fates], 0.25, color=color, label=name)
axis.set_xticks(range(len(fates)), [fate.name for fate in fates], fontsize=8)
axis.set(ylabel="share of channels left", ylim=(0, 1.25))
axis.legend(fontsize=8, ncols=3, loc="upper center")
plt.show()

# %%
# Stop and go on
# --------------
# The pruner has a state of its own; the pruned model is rebuilt as any other. What goes on is the
# same to the bit.

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "model.safetensors"
    save_pruned(model, file, optimizer=optimizer)
    torch.save(pruner.state_dict(), Path(folder) / "pruner.pt")

    again = load_pruned(network, file)
    optimizer = RLSOptimizer(again)
    load_optimizer(optimizer, file)
    goes_on = AdaptivePruner(again, optimizer, x[:2], **options)
    goes_on.load_state_dict(torch.load(Path(folder) / "pruner.pt", weights_only=True))
assert goes_on.finished and goes_on.epoch == pruner.epoch
