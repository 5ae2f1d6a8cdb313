"""Somebody else's network, pruned without training: the face detector MTCNN, on real patches.

R-Net and O-Net say whether a patch is a face and where exactly its box lies. Each loses three
quarters of the channels of every layer, by `RLSPruner`, which sees a hundred patches without being
told what they are, and by L2 magnitude; a hundred other patches show what is left.

    python examples/mtcnn_faces.py --out faces.png
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import mtcnn_stages
import skimage.data
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlscuda.pruning import RLSPruner, load_pruned, save_pruned

STAGES = {"R-Net": (mtcnn_stages.rnet, 24), "O-Net": (mtcnn_stages.onet, 48)}
METHODS = {
    "ours": {"source": "calibration", "damping": 0.01},  # ten times the default: few samples
    "L2 magnitude": {"importance": "l2", "compensate": False},
}
LEGEND = "100 test patches: faces above, others below. Green: rightly called a face. Red: mistaken."
GREEN, RED, WHITE = (0.1, 0.7, 0.2), (0.9, 0.1, 0.1), (1.0, 1.0, 1.0)

patches = torch.from_numpy(skimage.data.lfw_subset()).float()  # [200, 25, 25] in [0, 1]
calibration, test = slice(0, None, 2), slice(1, None, 2)  # 100 patches each,
truth = torch.arange(100) < 50  # of which 50 are faces, from Labeled Faces in the Wild


def inputs(size: int) -> Tensor:
    """All patches as a stage takes them [200, 3, size, size]."""
    x = F.interpolate(patches[:, None], (size, size), mode="bilinear", antialias=True)
    return ((x * 255 - 127.5) / 128).repeat(1, 3, 1, 1)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the test patches are faces [100], and the offsets of their boxes [100, 4]."""
    face, boxes, *_ = model(x[test])
    return face[:, 1] > 0.5, boxes


def mosaic(faces: Tensor) -> Tensor:
    """The test patches in their frames [rows, columns, 3]: green are faces, red is wrong."""
    colors = torch.tensor([WHITE, GREEN])[faces.long()]
    colors[faces != truth] = torch.tensor(RED)
    tiles = colors[:, None, None].repeat(1, 35, 35, 1)
    tiles[:, 4:-4, 4:-4] = 1
    tiles[:, 5:-5, 5:-5] = patches[test][..., None]
    return tiles.view(10, 10, 35, 35, 3).transpose(1, 2).reshape(350, 350, 3)


def main() -> None:
    """Prunes both stages by both methods, prints what is left, draws and saves it."""
    parser = argparse.ArgumentParser(description="Prunes the face detector MTCNN.")
    parser.add_argument("--out", type=Path, default=Path("faces.png"), help="the picture")
    out = parser.parse_args().out
    if not out.parent.is_dir() or out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out must be a .png, .pdf or .svg in a folder there is, got {out}")

    figure = Figure(figsize=(9, 7.2), layout="constrained")
    figure.suptitle(LEGEND, size=10)
    panels = iter(figure.subplots(2, 3).flat)
    row = "{:<6} {:<13} {:>10} {:>7} {:>7} {:>12}".format
    print(row("", "", "parameters", "MFLOPs", "right %", "boxes move %"))
    for name, (make, size) in STAGES.items():
        whole, x = mtcnn_stages.load(make(), make.__name__), inputs(size)
        models, costs = {"whole": whole}, {}
        for method, how in METHODS.items():
            models[method] = copy.deepcopy(whole)
            how = {"ratio": 0.75, "loader": x[calibration].split(25), **how}
            gains = RLSPruner(models[method], None, x[:1], **how).step().gains
            costs |= {"whole": gains.before, method: gains.after}
        _, boxes = run(whole, x)
        for method, model in models.items():
            faces, moved = run(model, x)
            right = f"{100 * (faces == truth).float().mean():.0f}"
            move = f"{100 * (moved - boxes)[truth].abs().mean():.1f}"  # of the patch's side
            parameters, flops = f"{costs[method].parameters:,}", f"{costs[method].flops / 1e6:.2f}"
            print(row(name, method, parameters, flops, right, move))
            panel = next(panels)
            panel.imshow(mosaic(faces).numpy())
            panel.set_title(f"{name}, {method}: {right} % right\n{parameters} parameters", size=9)
            panel.axis("off")
        file = out.with_suffix(f".{make.__name__}.safetensors")
        save_pruned(models["ours"], file)
        assert torch.equal(run(load_pruned(make, file), x)[1], run(models["ours"], x)[1])
        print(f"       ours is saved: load_pruned(mtcnn_stages.{make.__name__}, {str(file)!r})")
    figure.savefig(out, dpi=150)
    print(f"all decisions are drawn in {out}")


if __name__ == "__main__":
    main()
