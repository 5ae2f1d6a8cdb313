"""Random crops of the photographs of scikit-image, as networks of ImageNet take them."""

from __future__ import annotations

import skimage.data
import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "hubble_deep_field")


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
