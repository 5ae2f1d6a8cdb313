"""Copies of a network that have lost single weights of each layer, by masks that hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rlscuda.closed_form.single_weights import refit
from rlscuda.pruning.masks.layers import MaskLayer, mask_layer, write_mask
from rlscuda.pruning.masks.weights import prune_weights


def kept_by_quantile(scores: Tensor, share: float) -> Tensor:
    """Which scores are at or above the quantile of a share, at least the largest.

    Of n distinct scores exactly ceil(share (n - 1)) fall below it, as `torch.quantile` interpolates
    linearly; so at a share of 1 the largest one stays. It is found by sorting, for any n.

    Args:
        scores: Any shape, at least one.
        share: In [0, 1].

    Returns:
        bool, of the shape of `scores`.

    Raises:
        ValueError: There is no score, or the share is out of range.

    Source: the thresholds of the sparsifier of `fasterai` (N. Hubens).
    """
    if not scores.numel() or not 0 <= share <= 1:
        raise ValueError(f"expected scores and a share in [0, 1], got {scores.numel()} and {share}")
    place = math.ceil(round(share * (scores.numel() - 1), 9))
    return scores >= scores.flatten().sort().values[place]


@torch.no_grad()
def weight_copies(
    model: nn.Module,
    matrices: Mapping[str, Tensor],
    importance: str,
    compensate: bool,
    ratios: Sequence[float],
    seed: int,
) -> Iterator[nn.Module]:
    """Copies of a model in eval mode, at each ratio without that share of each layer's weights.

    Args:
        model: It stays as it is.
        matrices: Inverse autocorrelation matrices of the layers to prune.
        importance: ``l1``, ``random`` or ``saliency``, which is w^2 / P_jj; with compensation
            greedily, see `prune_weights`.
        compensate: Whether what is left is refitted.
        ratios: In [0, 1).
        seed: Of the importance ``random``.
    """
    for ratio in ratios:
        pruned = copy.deepcopy(model).eval()
        if ratio and importance == "saliency" and compensate:
            prune_weights(pruned, matrices, sparsity=ratio)
        elif ratio:
            generator = torch.Generator().manual_seed(seed)
            for name in matrices:
                layer = mask_layer(pruned, name, matrices)
                scores = _scores(layer, importance, generator)
                keep = torch.ones_like(layer.rows(), dtype=torch.bool)
                keep[:, : layer.columns] = kept_by_quantile(scores, ratio)
                write_mask(layer, keep, _rows(layer, keep, compensate), [], permanent=False)
        yield pruned


def _scores(layer: MaskLayer, importance: str, generator: torch.Generator) -> Tensor:
    """[c, columns]."""
    W = layer.rows()[:, : layer.columns]
    if importance == "random":
        return torch.rand(W.shape, generator=generator, dtype=W.dtype).to(W.device)
    if importance == "l1":
        return W.abs()
    assert layer.P is not None
    diagonals = layer.P.diagonal(dim1=1, dim2=2)[:, : layer.columns]
    return W.square() / diagonals.repeat_interleave(len(W) // len(layer.P), 0)


def _rows(layer: MaskLayer, keep: Tensor, compensate: bool) -> Tensor:
    W = layer.rows()
    if not compensate:
        return W * keep
    assert layer.P is not None
    count = len(layer.P)
    parts = zip(layer.P, W.chunk(count), keep.chunk(count))
    return torch.cat([refit(*part)[0] for part in parts])
