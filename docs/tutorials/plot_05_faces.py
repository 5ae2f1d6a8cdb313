"""
Somebody else's network: a face detector
========================================

What if a network was trained elsewhere, by another optimizer, and all there is are its weights
and a few inputs? The pruner then measures its matrices itself, from a hundred inputs or so,
without labels. Here it is O-Net, a stage of the face detector MTCNN (Zhang et al. 2016): a patch
of 48 x 48 pixels goes in, and whether it is a face comes out.

The trained weights are in the package facenet-pytorch (MIT licence). `examples/mtcnn_weights.py`
in a checkout of this project reads them from its wheel of 2 MB, which pip downloads once into
PyTorch's folder of pretrained models. The patches come with scikit-image: 100 faces of Labeled
Faces in the Wild, and 100 patches of anything else.
"""

import copy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import skimage.data
import torch
from matplotlib.patches import Rectangle
from torch import nn

from rlscuda import pruning
from rlscuda.pruning import RLSPruner

try:
    folder = Path(__file__).resolve().parent
except NameError:  # in a notebook, and when this page is built
    folder = Path.cwd()
sys.path.insert(0, str(folder.parents[1] / "examples"))
import mtcnn_stages
import mtcnn_weights

torch.manual_seed(0)
network = mtcnn_stages.onet()
try:
    mtcnn_weights.load(network, "onet")
except SystemExit as missing:
    print(f"{missing}.\nWithout them its weights are random: the page runs, and shows nothing.")

patches = torch.from_numpy(skimage.data.lfw_subset()).float()  # [200, 25, 25], faces first
x = nn.functional.interpolate(patches[:, None], (48, 48), mode="bilinear", antialias=True)
x = ((x * 255 - 127.5) / 128).repeat(1, 3, 1, 1)  # as O-Net takes them
seen, unseen = x[::2], x[1::2]  # 50 faces and 50 others each
truth = torch.arange(100) < 50


@torch.no_grad()
def faces(model):
    """Which of the unseen patches the model takes for faces [100]."""
    return model(unseen)[0][:, 1] > 0.5


def right(model):
    """The share of unseen patches that are told rightly, in percent."""
    return 100 * (faces(model) == truth).float().mean().item()


# %%
# What can be cut?
# ----------------
# A pruner reads the network by running it once on an example. It finds which layers share
# channels through poolings, PReLUs, transpositions and flattening, and tries each cut on a copy.
# Three quarters of the channels of every layer go; the outputs stay. ``damping`` stands in for
# inputs that a calibration by so few samples lacks. Nothing is trained afterwards.

methods = {
    "closed form": {"source": "calibration", "damping": 0.01},
    "L2 magnitude": {"importance": "l2", "compensate": False},
}
models = {"whole": network}
for name, how in methods.items():
    models[name] = copy.deepcopy(network)
    pruner = RLSPruner(models[name], None, x[:1], ratio=0.75, loader=seen.split(25), **how)
    report = pruner.step()
    if name == "closed form":
        print(report)

# %%
# Every patch that calibration did not see, faces above, others below. What is taken for a face
# has a green frame, what is mistaken a red one.

figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
for axis, (name, model) in zip(axes, models.items()):
    found = faces(model)
    mosaic = patches[1::2].view(10, 10, 25, 25).transpose(1, 2).reshape(250, 250)
    axis.imshow(mosaic.numpy(), cmap="gray")
    for i in range(100):
        color = "red" if found[i] != truth[i] else "limegreen" if found[i] else None
        if color:
            corner = 25 * (i % 10) + 0.5, 25 * (i // 10) + 0.5
            axis.add_patch(Rectangle(corner, 23, 23, fill=False, ec=color, lw=1.2))
    count = sum(p.numel() for p in model.parameters())
    axis.set_title(f"{name}\n{count:,} parameters, {right(model):.0f} % right", fontsize=10)
    axis.axis("off")
plt.show()

# %%
# How far can it go?
# ------------------
# :meth:`~rlscuda.pruning.RLSPruner.copies` ranks once and gives the network at each of several
# ratios. With ``compensate="in turn"`` each layer is fitted anew to the whole network's outputs,
# on what the pruned layers before it give. Guessing is right half of the time.

methods["closed form, in turn"] = {**methods["closed form"], "compensate": "in turn"}
figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for (name, how), color in zip(methods.items(), ("C3", "C0", "C1")):
    pruner = RLSPruner(network, None, x[:1], ratio=0.5, loader=seen.split(25), **how)
    curve = [
        (pruning.measure(model, x[:1], repeats=1).parameters, right(model))
        for model in pruner.copies([0, 0.25, 0.5, 0.75, 0.85, 0.92])
    ]
    axis.semilogx(*zip(*curve), "o-", color=color, label=name)
axis.axhline(50, color="C7", lw=1, ls="--", label="guessing")
axis.set(xlabel="parameters left", ylabel="patches told rightly, %")
axis.legend(fontsize=8)
axis.grid(alpha=0.3)
plt.show()
