"""What a pruned copy must put out before the model is cut; boxes, as many as it finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.pruning_surgery import operate
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Detector(nn.Module):
    """Puts out the boxes of each image whose score is above the mean, and in training all."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3)
        self.score, self.box = nn.Conv2d(12, 1, 1), nn.Conv2d(12, 4, 1)

    def forward(self, images):
        x = self.second(self.first(images).relu()).relu()
        scores, boxes = self.score(x).flatten(1), self.box(x).flatten(2).mT
        if self.training:
            return {"scores": scores, "boxes": boxes}
        kept = [one > one.mean() for one in scores]
        return [
            {"boxes": box[keep], "scores": score[keep], "labels": keep.nonzero().flatten()}
            for box, score, keep in zip(boxes, scores, kept)
        ]


def counts(model):
    return [len(found["boxes"]) for found in model.eval()(IMAGES)]


def test_a_detector_may_find_more_or_fewer_boxes():
    torch.manual_seed(0)
    model = Detector()
    optimizer = RLSOptimizer(model, lr=0.01)
    sum(v.square().mean() for v in model(IMAGES).values()).backward()
    optimizer.step()
    before = counts(model)
    RLSPruner(model, optimizer, IMAGES, ratio=0.5, loader=[IMAGES], source="calibration").step()
    assert (model.first.out_channels, model.second.out_channels) == (8, 6)
    assert counts(model) != before
    sum(v.square().mean() for v in model.train()(IMAGES).values()).backward()
    optimizer.step()


class Fixed(Detector):
    """Puts out as many boxes, whatever it sees."""

    def forward(self, images):
        x = self.second(self.first(images).relu()).relu()
        return self.box(x).flatten(2).mT


@pytest.mark.parametrize(
    ("make", "change"),
    [(Fixed, lambda s: (s[0] + 1, *s[1:])), (Detector, lambda s: (*s, 1)),
     (Detector, lambda s: (*s[:-1], s[-1] + 1) if len(s) > 1 else s)],
)  # fmt: skip
def test_other_differences_of_shape_are_refused(make, change):
    model = make()
    structure = trace(model, IMAGES)
    surgery = plan(structure, {"first": [0, 1]})
    surgery = replace(surgery, output_shapes=list(map(change, surgery.output_shapes)))
    with pytest.raises(ValueError, match="the pruned model must put out"):
        operate(model, [], surgery, {}, IMAGES)
    assert model.first.out_channels == 16
