"""The cut at the end of an epoch: blocks, then channels, in one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.optim.kept import Change
from rlscuda.pruning.adaptive.folding import fold_constants
from rlscuda.pruning.attention.scale import rescaled
from rlscuda.pruning.blocks.finding import Block
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.blocks.transaction import replace_modules
from rlscuda.pruning.choice.refitting import refit
from rlscuda.pruning.choice.targets import compensate_layers, lost_columns
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.matrices.calibration import Matrices
from rlscuda.pruning.matrices.tracker import SketchTracker
from rlscuda.pruning.running.batch_norms import Settled, check_finite, settle
from rlscuda.pruning.running.calls import inputs_of, isolated_copy, map_tensors, rng_kept, twice
from rlscuda.pruning.surgery.plan import Surgery, plan
from rlscuda.pruning.surgery.transaction import commit, operate, pruned_copy, revert


@dataclass(frozen=True, eq=False)
class Patient:
    """What is cut, and what follows.

    Attributes:
        model: The model.
        optimizers: All that train it.
        inputs: What it can be called with.
        loader: Batches that show batch norms what a cut changed, or None.
        tracker: Of its matrices, or None.
        compensate: How the remaining weights make up for what goes, as `RLSPruner` takes it.
        damping: Of the layers that are fitted in turn, see `refit`.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    inputs: Any
    loader: Iterable | None
    tracker: SketchTracker | None
    compensate: bool | str
    damping: float

    def remove_blocks(self, blocks: Sequence[Block], done: list[Change]) -> None:
        """Deletes branches; it completes, or leaves everything as it was.

        Args:
            blocks: Those that go.
            done: Is given what takes it back.
        """
        stand_ins = {name: one for block in blocks for name, one in block.stand_ins.items()}
        statistics: dict[str, Tensor] = {}
        if self.loader is not None:
            trial = with_stand_ins(self.model, stand_ins)
            statistics = settle(self.model, trial, {}, self._pairs()).statistics
            check_finite(statistics)
        own = {name: isolated_copy(one) for name, one in stand_ins.items()}
        replace_modules(self.model, self.optimizers, own, statistics, done)  # type: ignore[arg-type]

    def remove_channels(
        self,
        structure: Structure,
        removed: Mapping[str, Sequence[int]],
        matrices: Matrices,
        done: list[Change],
    ) -> tuple[Surgery, dict[str, Tensor]]:
        """Removes units of couplings; it completes, or takes back all that `done` has.

        Constants that they put out are folded into the next layer's bias, the remaining weights
        make up for the rest, and the statistics of batch norms follow.

        Args:
            structure: The couplings of the model as it is.
            removed: Units by coupling.
            matrices: Inverse autocorrelation matrices of its layers.
            done: Is given what takes it back.

        Returns:
            The surgery, and the columns that layers have lost.
        """
        modules = dict(self.model.named_modules())
        lost = lost_columns(structure.couplings, modules, removed)
        surgery = plan(structure, removed)
        with rng_kept(self.model):
            folded = fold_constants(self.model, lost, self._examples())
        values: dict[str, Tensor] = {}
        if self.compensate:
            values, _ = compensate_layers(_with(self.model, folded), matrices, lost)
        scaled = structure.families, removed, surgery.attributes
        values = rescaled(self.model, *scaled, folded | values)
        if self.compensate == "in turn":
            how = self._pairs, self._settled, self.damping
            values = refit(self.model, *how, surgery, values)
        statistics = self._settled(pruned_copy(self.model, surgery, values), surgery).statistics
        check_finite(statistics)
        columns = {} if self.tracker is None else self.tracker.kept_columns(surgery.tensors)
        try:
            first = islice(self._pairs(), 1)
            operate(self.model, self.optimizers, surgery, values, self.inputs, done, first)
            buffers = dict(self.model.named_buffers())
            commit([(buffers[n], "data", statistics[n].clone()) for n in statistics], done)
            if self.tracker is not None:
                self.tracker.follow(columns)
        except BaseException:
            revert(done)
            raise
        return surgery, lost

    def _pairs(self, surgery: Surgery | None = None) -> Iterator[tuple[Any, Any]]:
        """Batches of the loader, which whole and pruned model take alike."""
        return twice(self.loader)

    def _settled(self, pruned: nn.Module, surgery: Surgery) -> Settled:
        """Lets the batch norms of a pruned copy follow the cut where there is a loader."""
        if self.loader is None:
            return Settled({}, 0)
        return settle(self.model, pruned, surgery.tensors, self._pairs())

    def _examples(self) -> list[Any]:
        """Inputs that show what is constant: of the loader, or the example inputs and noise."""
        if self.loader is not None:
            return [inputs_of(self.model, next(iter(self.loader)))]
        return [self.inputs, map_tensors(_noise, self.inputs)]


def _noise(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor


@torch.no_grad()
def _with(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The model itself, or a copy of it with other values."""
    if not values:
        return model
    copy = isolated_copy(model)
    for name, value in values.items():
        copy.get_parameter(name).copy_(value)
    return copy
