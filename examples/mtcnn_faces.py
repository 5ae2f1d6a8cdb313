"""Somebody else's network, pruned without training: the face detector MTCNN, on real patches.

R-Net and O-Net say whether a patch is a face and where exactly its box lies. Each loses three
quarters of the channels of every layer, by `RLSPruner`, which sees a hundred patches without being
told what they are, and by L2 magnitude; a hundred other patches show what is left.

    python examples/mtcnn_faces.py --out faces.png
"""

import argparse
import copy
from pathlib import Path

import mtcnn_stages
import mtcnn_weights
import torch
from mtcnn_patches import calibration, draw, inputs, test, truth

from rlscuda.pruning import RLSPruner, load_pruned, measure, save_pruned

STAGES = {"R-Net": (mtcnn_stages.rnet, 24), "O-Net": (mtcnn_stages.onet, 48)}
METHODS = {
    "ours": {"source": "calibration", "damping": 0.01},  # ten times the default: few samples
    "L2 magnitude": {"importance": "l2", "compensate": False},
}


@torch.no_grad()
def main():
    """Prunes both stages by both methods, prints what is left, draws and saves it."""
    parser = argparse.ArgumentParser(description="Prunes the face detector MTCNN.")
    parser.add_argument("--out", type=Path, default=Path("faces.png"), help="the picture")
    out, panels = parser.parse_args().out, {}
    if not out.parent.is_dir() or out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out must be a .png, .pdf or .svg in a folder there is, got {out}")
    row = "{:<6} {:<13} {:>10} {:>7} {:>7} {:>12}".format
    print(row("", "", "parameters", "MFLOPs", "right %", "boxes move %"))
    for name, (make, size) in STAGES.items():
        whole, x = mtcnn_weights.load(make(), make.__name__), inputs(size)
        models = {"whole": whole} | {method: copy.deepcopy(whole) for method in METHODS}
        for method, how in METHODS.items():
            how = {"ratio": 0.75, "loader": x[calibration].split(25), **how}
            RLSPruner(models[method], None, x[:1], **how).step()
        for method, model in models.items():
            (probability, boxes, *_), cost = model(x[test]), measure(model, x[:1])
            faces, whole_boxes = probability[:, 1] > 0.5, whole(x[test])[1]
            right = f"{100 * (faces == truth).float().mean():.0f}"
            move = f"{100 * (boxes - whole_boxes)[truth].abs().mean():.1f}"  # of the patch's side
            print(row(name, method, f"{cost.parameters:,}", f"{cost.flops / 1e6:.2f}", right, move))
            panels[f"{name}, {method}: {right} % right\n{cost.parameters:,} parameters"] = faces
        file = out.with_suffix(f".{make.__name__}.safetensors")
        save_pruned(models["ours"], file)
        assert torch.equal(load_pruned(make, file)(x[test])[1], models["ours"](x[test])[1])
        print(f"       ours is saved: load_pruned(mtcnn_stages.{make.__name__}, {str(file)!r})")
    draw(out, panels)
    print(f"all decisions are drawn in {out}")


if __name__ == "__main__":
    main()
