"""The matrices that a pruning needs, and what they take."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rlscuda.optim.kinds.modules import is_consumer
from rlscuda.optim.layers import Layer
from rlscuda.pruning.couplings import Coupling, Structure
from rlscuda.pruning.matrices.calibration import accumulated, inverses, pruning_layers
from rlscuda.pruning.matrices.own import of_model
from rlscuda.pruning.matrices.tracker import SketchTracker

_ANNOUNCED = 1e9  # bytes


def needed_layers(structure: Structure, wanted: Mapping[str, Coupling]) -> set[str]:
    """The layers whose matrices cutting some couplings takes: those that read them, and heads."""
    modules = dict(structure.model.named_modules())
    reading = {
        member.name
        for coupling in wanted.values()
        for member in coupling.members
        if member.kind == "in" and member.name in modules and is_consumer(modules[member.name])
    }
    heads = (family for family in structure.families if family.coupling in wanted)
    return reading.union(*((*family.left, *family.right) for family in heads))


def matrices_from(
    source: str,
    needed: Container[str],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    tracker: SketchTracker | None,
    loader: Iterable | None,
    damping: float,
) -> dict[str, Any]:
    """Inverse autocorrelation matrices by layer, from where a pruner takes them.

    Args:
        source: `sketch`, `calibration`, `own`, or anything else for none.
        needed: Names of the layers that a calibration is for.
        model: The model.
        optimizers: Those that train it.
        tracker: That of a sketch.
        loader: Batches of a calibration.
        damping: See `calibrate`.

    Raises:
        ValueError: The tracker has seen no forward yet; and see `calibrate`.
    """
    if source == "sketch" and tracker is not None:
        tracked = tracker.matrices()
        if not tracked:
            raise ValueError("the tracker's matrices are needed: it has seen no forward yet")
        return tracked
    if source == "calibration" and loader is not None:
        return calibrate_some(model, loader, needed, damping, few=True)
    return of_model(model, optimizers, damping) if source == "own" else {}


def calibrate_some(
    model: nn.Module, loader: Iterable, names: Container[str], damping: float, few: bool = False
) -> dict[str, Any]:
    """A calibration of the layers of some names, but those that cannot have one, see `calibrate`.

    Args:
        model: The model.
        loader: Batches.
        names: Of the layers.
        damping: See `calibrate`.
        few: Whether a wide layer that sees few rows has them, as `FewRows`, in place of a matrix.

    Raises:
        TypeError, ValueError: See `calibrate`.
    """
    layers = [one for one in pruning_layers(model, None, others=True) if one.name in names]
    if not layers:
        return {}
    _announce(layers)
    return inverses(accumulated(model, loader, layers, few=few), damping)


def _announce(layers: list[Layer]) -> None:
    """Warns of matrices that take a gigabyte and more, the largest of them by name."""
    sizes = {layer.name: 8 * layer.groups * layer.fan_in**2 for layer in layers}
    if (total := sum(sizes.values())) >= _ANNOUNCED:
        largest = max(sizes, key=lambda name: sizes[name])
        warnings.warn(
            f"the matrices of {len(sizes)} layers take up to {total / 1e9:.1f} GB, that of "
            f"{largest!r} {sizes[largest] / 1e9:.1f} GB: less where it sees few rows, none where "
            "what feeds it is ignored",
            stacklevel=7,
        )
