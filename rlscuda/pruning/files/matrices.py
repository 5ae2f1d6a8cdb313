"""Inverse autocorrelation matrices beside a checkpoint, for pruning without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

import rlscuda
from rlscuda.pruning.files.sealed import StrPath, read_sealed, write_sealed
from rlscuda.pruning.matrices.carried import CarriedMatrices, check_spd

FORMAT = "rlscuda-matrices"
VERSION = 1


class MatricesManifest(TypedDict):
    """What a file says of its matrices."""

    torch: str
    rlscuda: str


def save_matrices(matrices: Mapping[str, Tensor], path: StrPath) -> None:
    """Writes the matrices of a network's layers to a safetensors file.

    Kept beside the network's weights, they let `RLSPruner` prune it, or what it is fine-tuned to,
    with compensation and without data.

    Args:
        matrices: [groups, n, n] by layer name, as `own_matrices`, `calibrate` and
            `SketchTracker.matrices` give them.
        path: The file; it is replaced in one step, or stays as it was.

    Raises:
        TypeError: A matrix is no tensor of floating-point numbers.
        ValueError: There is none, or one is not [groups, n, n], finite, symmetric and positive
            definite.
        ImportError: safetensors is missing.

    Example:
        >>> save_matrices(own_matrices(optimizer), "source.matrices")            # doctest: +SKIP
        >>> carried = load_matrices(model, "source.matrices")                    # doctest: +SKIP
        >>> RLSPruner(model, None, example, ratio=0.5, tracker=carried).step()   # doctest: +SKIP
    """
    if not matrices:
        raise ValueError("matrices must be those of at least one layer, got none")
    for name, P in matrices.items():
        check_spd(name, P)
    manifest = {"torch": str(torch.__version__), "rlscuda": rlscuda.__version__}
    tensors = {name: P.detach().to("cpu", copy=True).contiguous() for name, P in matrices.items()}
    write_sealed(path, (FORMAT, VERSION), manifest, tensors)


def load_matrices(model: nn.Module, path: StrPath) -> CarriedMatrices:
    """Reads matrices that `save_matrices` wrote, for a model that has their layers.

    Args:
        model: The model whose layers they are of; other layers of it have no matrix.
        path: The file.

    Returns:
        What to pass as `tracker` to `RLSPruner`; its `matrices()` are those of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, of another format or version, or the model lacks
            a layer of it, or has one with other inputs.
        TypeError: `model` is no module.
        ImportError: safetensors is missing.
    """
    _, tensors = read_sealed(path, (FORMAT, VERSION), MatricesManifest, "save_matrices")
    try:
        return CarriedMatrices(model, dict(sorted(tensors.items())))
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from None
