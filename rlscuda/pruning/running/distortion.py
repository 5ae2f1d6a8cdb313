"""How far a model's outputs are from those of another, as from those it had before it was cut."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from rlscuda.pruning.running.calls import feed, inference, isolated_copy, output_tensors, twice


class Distortion:
    """How far a model's outputs over a loader are from those of the whole one.

    Both see each batch one after the other, for a loader that shuffles or augments never gives the
    same one again.

    Args:
        model: The whole one.
        loader: Batches as `feed` takes them.
    """

    def __init__(self, model: nn.Module, loader: Iterable):
        self._whole, self._loader = isolated_copy(model), loader

    def __call__(self, model: nn.Module) -> float:
        """See `distortion`."""
        return distortion(self._whole, model, twice(self._loader))


def distortion(whole: nn.Module, model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> float:
    """Mean squared difference of two models' outputs over the variance of the first's.

    It is that over all samples, on average over the output's tensors.

    Args:
        whole: The model that is compared with.
        model: The other.
        batches: The same batch for either, as `feed` takes them.

    Raises:
        ValueError: There is no batch, or the outputs of batches or models have several sizes.
    """
    sums: list[_Spread] = []
    with inference(whole), inference(model):
        for of_whole, of_model in batches:
            wanted = _outputs(whole, of_whole)
            sums = sums or [_Spread() for _ in wanted]
            for one, expected, got in zip(sums, wanted, _outputs(model, of_model), strict=True):
                one.add(expected, got)
    if not sums:
        raise ValueError("loader must give at least one batch, got none")
    return statistics.fmean(one.distance() for one in sums)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The tensors that a model puts out, each as [samples, values], those of integers aside."""
    tensors = output_tensors(feed(model, batch))
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not tensors:
        raise ValueError("the model must put out a tensor, or evaluate be given")
    return [t.reshape(len(t) if t.dim() else 1, -1).double() for t in floating or tensors]


class _Spread:
    """Sums over the samples of one tensor of the outputs: of the whole model's, and of the error.

    They are of the difference to the first sample, so that equal ones have no variance at all.
    """

    def __init__(self) -> None:
        self.samples, self.error = 0, 0.0
        self.first: Any = None
        self.sum: Any = 0.0
        self.square: Any = 0.0

    def add(self, whole: Tensor, got: Tensor) -> None:
        """Takes in what both models put out for a batch, [samples, values]."""
        if self.first is None:
            self.first = whole[0]
        if whole.shape[1] != len(self.first):
            raise ValueError(
                "outputs that are compared must have one size, got "
                f"{len(self.first)} and {whole.shape[1]} values a sample: give batches of one "
                "size, or evaluate="
            )
        if got.shape != whole.shape:
            raise ValueError(
                f"outputs that are compared must have one size, got {list(whole.shape)} of the "
                f"whole model and {list(got.shape)} of the other"
            )
        apart = whole - self.first
        self.samples += len(whole)
        self.sum, self.square = self.sum + apart.sum(0), self.square + apart.square().sum(0)
        self.error += float((got - whole).square().sum())

    def distance(self) -> float:
        """Mean squared error over the variance."""
        mean = self.sum / self.samples
        variance = float((self.square / self.samples - mean.square()).clamp_(min=0).sum())
        return self.error / self.samples / (variance or 1.0)
