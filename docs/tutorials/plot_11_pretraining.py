"""
Pre-training and pruning: a controlled study
============================================

Hubens et al. 2020 found that a network which was pre-trained and fine-tuned can lose more of
itself than one trained from scratch. Whether that holds for a network and data of your own is one
call, :func:`~rlscuda.studies.pretraining`, or one command::

    rlscuda study pretraining --cell mnist --fairness epochs,plateau,accuracy

Both arms learn the same images in the same order, behind heads that start equal; then copies of
each are pruned along a ladder of ratios, by several rules. Here the source is the digits 0 to 4,
and the target 5 to 9, of 8 x 8 pixels, so that it takes seconds; two pairs of networks are too
few to conclude anything from.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from rlscuda.pruning import RLSPruner, load_matrices, load_pruned
from rlscuda.studies import Protocol, Split, Task, pretraining

digits = load_digits()
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
x = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
y = torch.tensor(digits.target)[order]


def task(first):
    """Five digits from `first` on: for training, validation and test."""
    mine = (y >= first) & (y < first + 5)
    images, labels = x[mine], y[mine] - first
    train, val, test = (slice(0, 400), slice(400, 550), slice(550, None))
    return Task(*(Split(images[part], labels[part]) for part in (train, val, test)), 5)


def network(classes):
    """Two convolutions and a head."""
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(192, classes))


source, target = task(0), task(5)
protocol = Protocol(
    seeds=(0, 1),
    ratios=(0.0, 0.2, 0.4, 0.6, 0.8, 0.9),
    rules=("saliency+", "l1"),
    fairness=("epochs", "accuracy"),
    rates=(0.05,),
    epochs=15,
    source_epochs=10,
    batch_size=32,
)
folder = tempfile.TemporaryDirectory()
study = pretraining(network, target, source, Path(folder.name), protocol, lambda line: None)
print(study.markdown())

# %%
# The folder holds a journal, so a study that is killed goes on where it was, to the same table. A
# rule is an importance of :class:`~rlscuda.pruning.RLSPruner`; with ``+`` what is left makes up
# for what went.
#
# What the table says
# -------------------
# a(0) is the test accuracy of the whole network, ρ the largest ratio up to which it falls by no
# more than a point, G the difference of ρ that the paper claims to be positive, and AUC the mean
# over the ladder of the share of the accuracy that is kept. Differences are those of pairs, with
# their standard error.
#
# A fine-tuned network is often the more accurate one, too, and what is accurate may be robust. So
# ``fairness`` says when trainings end: after as many epochs; each at its own plateau; or the
# pre-trained arm as soon as it is as accurate, on validation images, as the other one. What is
# left of G in the last case is pre-training's own.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for axis, fairness in zip(axes, protocol.fairness):
    for arm in study.arms:
        for curve in arm["curves"] if arm["fairness"] == fairness else ():
            name = f"{arm['arm']}, {curve['rule']}"
            axis.plot(
                protocol.ratios,
                [100 * accuracy for accuracy in curve["accuracy"]],
                "-" if arm["arm"] == "pretrained" else ":",
                color="C3" if curve["rule"] == "saliency+" else "C0",
                label=name if arm["seed"] == 0 else None,
            )
    axis.set(xlabel="share of channels gone", title=f"trainings ended by {fairness}")
    axis.grid(alpha=0.3)
axes[0].set(ylabel="test accuracy, %", ylim=(0, 102))
axes[0].legend(fontsize=8)
plt.show()

# %%
# Why: the redundancy of the inputs
# ---------------------------------
# The inverse autocorrelation matrix of a layer's input says how much of each channel the others
# explain: 1 - 1 / (A_jj P_jj). Where that is near 1, the rest can stand in for the channel,
# whichever arm it is of. :func:`~rlscuda.pruning.redundancies` gives it for a network of your
# own.

for layer, (pretrained, scratch) in study.redundancy("epochs").items():
    print(f"layer {layer}: pretrained {pretrained:.2f}, scratch {scratch:.2f}")

# %%
# Matrices that travel with the weights
# -------------------------------------
# An :class:`~rlscuda.RLSOptimizer` has these matrices anyway. Saved beside the weights, by
# ``save_matrices(own_matrices(optimizer), path)``, they let whoever has the network prune it,
# with compensation and without any data, at once or after fine-tuning. The study has written such
# files when it trained on the source.

networks = Path(folder.name) / "networks"
model = load_pruned(lambda: network(5), networks / "source-0.safetensors")
carried = load_matrices(model, networks / "source-0.matrices.safetensors")
folder.cleanup()


def accuracy(model):
    """On the test digits of the source, in percent."""
    with torch.no_grad():
        found = model(source.test.x).argmax(1)
    return 100 * (found == source.test.y).float().mean().item()


print(f"the source's network: {accuracy(model):.1f} %")
RLSPruner(model, None, source.val.x[:1], ratio=0.5, tracker=carried).step()
print(f"half of its channels, without data: {accuracy(model):.1f} %")
