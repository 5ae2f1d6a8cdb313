"""Patches that show a face or none, from scikit-image, and a picture of what is called a face."""

from __future__ import annotations

from pathlib import Path

import skimage.data
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

LEGEND = "100 test patches: faces above, others below. Green: rightly called a face. Red: mistaken."
GREEN, RED, WHITE = (0.1, 0.7, 0.2), (0.9, 0.1, 0.1), (1.0, 1.0, 1.0)

patches = torch.from_numpy(skimage.data.lfw_subset()).float()  # [200, 25, 25] in [0, 1]
calibration, test = slice(0, None, 2), slice(1, None, 2)  # 100 patches each,
truth = torch.arange(100) < 50  # of which 50 are faces, from Labeled Faces in the Wild


def inputs(size: int) -> Tensor:
    """All patches as a stage takes them [200, 3, size, size]."""
    x = F.interpolate(patches[:, None], (size, size), mode="bilinear", antialias=True)
    return ((x * 255 - 127.5) / 128).repeat(1, 3, 1, 1)


def mosaic(faces: Tensor) -> Tensor:
    """The test patches in their frames [rows, columns, 3]: green are faces, red is wrong."""
    colors = torch.tensor([WHITE, GREEN])[faces.long()]
    colors[faces != truth] = torch.tensor(RED)
    tiles = colors[:, None, None].repeat(1, 35, 35, 1)
    tiles[:, 4:-4, 4:-4] = 1
    tiles[:, 5:-5, 5:-5] = patches[test][..., None]
    return tiles.view(10, 10, 35, 35, 3).transpose(1, 2).reshape(350, 350, 3)


def draw(file: Path, panels: dict[str, Tensor]) -> None:
    """Writes a picture of six panels: a title and which patches are called faces [100], each."""
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    figure.suptitle(LEGEND, size=10)
    for axes, (title, faces) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        axes.imshow(mosaic(faces).numpy())
        axes.set_title(title, size=9)
        axes.axis("off")
    figure.savefig(file, dpi=150)
