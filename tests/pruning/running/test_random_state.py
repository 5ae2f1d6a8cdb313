"""What goes through a loader that shuffles leaves the random state as it was."""

import pytest
import torch
from support.blocks import resnet
from torch.utils.data import DataLoader

from rlscuda import RLSOptimizer
from rlscuda.pruning import (
    AdaptivePruner,
    LayerGates,
    RLSPruner,
    calibrate,
    prune_relief,
    prune_weights,
    remove_blocks,
)

IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def step(**options):
    def run(model, loader):
        options.setdefault("target_flops", 0.6)
        RLSPruner(model, None, IMAGES[:2], loader=loader, **options).step()

    return run


def copies(model, loader):
    list(RLSPruner(model, None, IMAGES[:2], loader=loader, ratio=0.5).copies([0.2, 0.5]))


def own(model, loader):
    optimizer = RLSOptimizer(model)
    model(IMAGES[:16]).sum().backward()
    optimizer.step()
    RLSPruner(model, optimizer, IMAGES[:2], loader=loader, ratio=0.5).step()


def adaptive(model, loader):
    optimizer = RLSOptimizer(model)
    options = {"source": "calibration", "warmup": 0, "epochs": 1, "compensate": "in turn"}
    pruner = AdaptivePruner(
        model, optimizer, IMAGES[:2], target_params=0.5, loader=loader, **options
    )
    model(IMAGES[:16]).sum().backward()
    pruner.after_backward()
    optimizer.step()
    pruner.after_step()
    pruner.after_epoch()


def gates(model, loader):
    optimizer = RLSOptimizer(model)
    gates = LayerGates(model, IMAGES[:2], optimizer, total_steps=4, maps=loader, tolerance=0.5)
    gates._alive[0].theta = 0.1
    gates.finish(loader)


def weights(model, loader):
    prune_weights(model, calibrate(model, loader), sparsity=0.5)


def relief(model, loader):
    prune_relief(model, loader)


WAYS = {
    "layer": step(), "global": step(scope="global"), "in turn": step(compensate="in turn"),
    "blocks": step(scope="global", what=("channels", "blocks")),
    "removed blocks": lambda model, loader: remove_blocks(model, IMAGES[:2], loader, count=1),
    "copies": copies, "own": own, "adaptive": adaptive, "gates": gates, "weights": weights,
    "relief": relief,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_loader_that_shuffles_leaves_random_numbers_alone(way):
    states = []
    for shuffle in (False, True):  # which draws a seed for its workers, too
        torch.manual_seed(0)
        model = resnet((4, 8))
        torch.manual_seed(3)
        WAYS[way](model, DataLoader(IMAGES, 16, shuffle=shuffle) if shuffle else IMAGES.split(16))
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)
