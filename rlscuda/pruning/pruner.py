"""`RLSPruner`: removes the channels that the rest can stand in for, and lets training go on."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda.optim.discovery import modules_named
from rlscuda.optim.kept import Change
from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.attention.basis import in_basis
from rlscuda.pruning.blocks.shortening import shortening_of
from rlscuda.pruning.choice.measuring import in_halves, measured
from rlscuda.pruning.choice.ranking import IMPORTANCES, WITHOUT_MATRIX, rank, targeted, units_gone
from rlscuda.pruning.choice.refitting import refit
from rlscuda.pruning.choice.targets import TARGETS, Cut, Ladder, Search, changes_of, checked_target
from rlscuda.pruning.jointly import SIZES, best_mix
from rlscuda.pruning.matrices.calibration import disagreement
from rlscuda.pruning.matrices.needed import calibrate_some, matrices_from, needed_layers
from rlscuda.pruning.matrices.tracker import SketchTracker
from rlscuda.pruning.options import (
    check_evaluated,
    check_number,
    check_repeatable,
    checked_compensation,
    checked_loss,
    checked_model,
    checked_optimizers,
    checked_ranking,
    checked_source,
    checked_what,
)
from rlscuda.pruning.report import PruneReport
from rlscuda.pruning.running.batch_norms import Settled, check_finite, settle, warn_of_few
from rlscuda.pruning.running.calls import SlicedBatches, all_tensors, isolated_copy, running
from rlscuda.pruning.running.distortion import Distortion
from rlscuda.pruning.running.measure import compare, measure
from rlscuda.pruning.running.watching import unreached
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.metadata import outdated
from rlscuda.pruning.surgery.plan import Surgery
from rlscuda.pruning.surgery.snapshot import Snapshot
from rlscuda.pruning.surgery.transaction import operate, pruned_copy, revert

_REPEATS = 5  # forwards timed for the report
_PASSED_ON = (
    "importance", "selection", "scope", "source", "loader", "compensate", "adapt_norms",
    "round_to", "include_inputs", "damping", "seed", "ignored", "heads",
)  # fmt: skip


class RLSPruner:
    r"""Removes channels and nodes in closed form, and everything that belongs to them.

    The inverse autocorrelation matrices say which units the others can stand in for and how the
    remaining weights must change. One `step` cuts weights, biases, norm layers, matrices, moments
    and parameter groups together, or nothing at all; training then goes on with the same optimizer.

    Exactly one of `ratio`, `target_params`, `target_flops` and `max_loss` says how much goes.

    Args:
        model: The model.
        optimizer: What trains it: an `RLSOptimizer`, any other torch optimizer, a list of all
            that train it, or None.
        example_inputs: What the model can be called with: a tensor, a tuple of arguments, or a
            mapping of named ones; one or two samples will do, where they take every branch.
        ratio: Share of each coupling's original units that is gone after the step, in [0, 1); or
            such shares by name or shell pattern, 0 where none matches. In scope ``global`` the
            share of all units.
        target_params: Parameters at most; a number, or as a float in (0, 1) a share of those now.
        target_flops: FLOPs of a forward of the example inputs at most; likewise.
        max_loss: How far `evaluate` may rise above its value before the step, relative to it. As
            much is cut as a search by halving finds allowed.
        importance: What ranks the units, a name in `rlscuda.pruning.IMPORTANCES`.
        selection: ``greedy`` (default for ``saliency``: one at a time, all else downdated exactly)
            or ``one-shot`` (all by their first scores).
        scope: ``layer`` cuts every coupling by the same share. ``global`` cuts what is cheapest of
            all, for what it saves where the target is a size; where the loader gives two batches or
            more, what each coupling costs is measured: its cheapest quarter and three quarters go
            of a copy, made up for from every other batch, and the rest show what the output loses.
        source: Where the matrices come from: ``own`` (those of the `RLSOptimizer`), ``sketch``
            (of `tracker`) or ``calibration`` (exact, from `loader`). By default the first of
            tracker, optimizer and loader that is there.
        tracker: A `SketchTracker` that saw the training, or what `load_matrices` gives.
        loader: Batches of inputs, of tuples or lists whose first item they are, or of mappings, of
            which the model's forward gets the items it names; gone through several times. They
            calibrate, where that is asked for, and show batch norms what the cut changed.
        evaluate: The validation loss of a model, for `max_loss`.
        compensate: Whether the remaining weights change to make up for what went; ``in turn`` then
            fits each layer over `loader` to the whole model's, on what the pruned ones give it.
        adapt_norms: Whether the running statistics of batch norms follow the cut, where there is a
            `loader`: by the difference between what they are given before and after it. A warning
            says where it gives fewer than 16 samples.
        round_to: What stays of each coupling is a multiple of it, where there is as much.
        ignored: Modules, names or shell patterns whose outputs keep all their channels.
        include_inputs: Whether the model's raw input features are candidates too; it then takes
            fewer of them, see `PruneReport.kept_inputs`.
        damping: Added to the diagonal of autocorrelations before they are inverted, relative to
            its mean.
        seed: Of the importance ``random``.
        what: ``"channels"``, or ``("channels", "blocks")``: residual branches may go as a whole, or
            become linear maps, see `remove_blocks`. For each number of them, those of the least
            price, channels meet the rest of the target; what then has the least loss (`evaluate`,
            or how far the outputs are from before, over every other batch of a `loader` of four and
            more) is done. It takes a target of size, a `loader` and ``source="calibration"``.
        heads: Whether attention loses whole heads, with the keys they share; by default each head
            loses dimensions, in the basis where that costs least.

    Raises:
        ValueError: An option is out of its range, or one needs another that is missing.
        TypeError: `model` is no module, `optimizer` no torch optimizer, or another option not of
            the type above.

    Example:
        >>> pruner = RLSPruner(model, opt, torch.randn(1, 3, 32, 32), ratio=0.5)  # doctest: +SKIP
        >>> print(pruner.step())                                                  # doctest: +SKIP

    Sources: Yu et al. 2022 (arXiv 2201.04813); Leung et al. 2001; Hassibi and Stork 1993.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        example_inputs: Any = None,
        *,
        ratio: float | Mapping[str, float] | None = None,
        target_params: float | None = None,
        target_flops: float | None = None,
        max_loss: float | None = None,
        importance: str = "saliency",
        selection: str | None = None,
        scope: str = "layer",
        source: str | None = None,
        tracker: SketchTracker | None = None,
        loader: Iterable | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        compensate: bool | str = True,
        adapt_norms: bool = True,
        round_to: int = 1,
        ignored: str | nn.Module | Iterable[str | nn.Module] = (),
        include_inputs: bool = False,
        damping: float = 1e-3,
        seed: int = 0,
        what: str | Sequence[str] = "channels",
        heads: bool = False,
    ):
        model = checked_model(model)
        self.optimizers = checked_optimizers(optimizer, model)
        if tracker is not None and not isinstance(tracker, SketchTracker):
            raise TypeError(f"tracker must be a SketchTracker, got {type(tracker).__name__}")
        if loader is not None:
            check_repeatable("loader", loader)
        if example_inputs is None:
            raise ValueError("example_inputs must be what the model can be called with, got None")
        named = isinstance(example_inputs, Mapping)
        self.model, self.example_inputs = model, dict(example_inputs) if named else example_inputs
        targets = dict(zip(TARGETS, (ratio, target_params, target_flops, max_loss)))
        self.target = checked_target(targets)
        check_evaluated(self.target[0], evaluate, include_inputs)
        selection = checked_ranking(importance, IMPORTANCES, selection, scope)
        check_number("round_to", round_to, 1, whole=True)
        check_number("damping", damping, 0)
        check_number("seed", seed, whole=True)
        self.importance, self.selection, self.scope = importance, selection, scope
        self.tracker, self.loader, self.evaluate = tracker, loader, evaluate
        there = {"sketch": tracker is not None, "own": self._own()}
        there["calibration"] = loader is not None
        self.compensate, self.adapt_norms = checked_compensation(compensate, loader), adapt_norms
        self.source = checked_source(source, there, compensate or importance not in WITHOUT_MATRIX)
        self.round_to, self.damping = round_to, damping
        inside = {m for _, ms in modules_named(cast(Any, ignored), "ignored", model) for m in ms}
        self.ignored = [name for name, module in model.named_modules() if module in inside]
        self.include_inputs, self.seed, self.heads = include_inputs, seed, bool(heads)
        self.what = checked_what(what, self.source, include_inputs)
        self._original: dict[str, int] = {}
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._order = itertools.count()

    def step(
        self,
        ratio: float | Mapping[str, float] | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> PruneReport:
        """Prunes once; it completes, or leaves model and optimizer as they were.

        Args:
            ratio: In place of the constructor's target.
            progress: Called with what is done next, as "trying conv1 and 8 more".

        Returns:
            What changed. A step that finds its target reached already changes nothing.

        Raises:
            ValueError: The target is out of reach; the model cannot be traced; the pruned model
                does not run on the example inputs.
        """
        target = self.target if ratio is None else checked_target({"ratio": ratio})
        cut = self._cut_jointly if "blocks" in self.what else self._cut
        return cut(*target, progress)

    def _cut_jointly(self, kind: str, value: Any, progress: Callable[[str], None]) -> PruneReport:
        """Removes blocks, then channels, as many of each as cost the least loss."""
        if kind not in SIZES:
            raise ValueError(f"{kind} is of channels alone: with blocks give {' or '.join(SIZES)}")
        assert self.loader is not None
        inputs, size = self.example_inputs, partial(SIZES[kind], inputs=self.example_inputs)
        before = measure(whole := isolated_copy(self.model), inputs, repeats=_REPEATS)
        limit = value if value >= 1 else value * size(whole)
        fitted, judged = in_halves(self.loader) if self.evaluate is None else (self.loader,) * 2
        options = {name: getattr(self, name) for name in _PASSED_ON} | {"loader": fitted}
        loss = self._loss if self.evaluate is not None else Distortion(self.model, judged)
        rest = (kind.removeprefix("target_"), self.adapt_norms, self.ignored)
        shorter, refused = shortening_of(self.model, inputs, fitted, loss, *rest)

        def cut(trial: nn.Module) -> None:
            RLSPruner(trial, None, inputs, **{kind: limit}, **options).step()

        count = best_mix(shorter, lambda trial: size(trial) <= limit, cut, loss)
        done, names = cast(list[Change], []), all_tensors(self.model).keys()
        for snapshot in self._snapshots:
            snapshot.changes.append(done)
        shorter.install(self.model, self.optimizers, count, done)
        try:
            report = self._cut(kind, limit, progress)
        except BaseException:
            revert(done)
            raise
        for snapshot in self._snapshots:
            snapshot.expected ^= names ^ all_tensors(self.model).keys()
        return replace(
            report, blocks=shorter.changes[: count], refused={**refused, **report.refused},
            gains=compare(before, report.gains.after),
        )  # fmt: skip

    def _cut(self, kind: str, value: Any, progress: Callable[[str], None]) -> PruneReport:
        """Removes channels."""
        search, ladder, unscored = self._ranked(progress, value)
        structure, matrices = search.structure, search.matrices
        cut = search.find(ladder, kind, value, self._loss)
        values, uncompensated = search.compensated(cut)
        off = self._disagreement(matrices)
        matrices.clear()  # most of the memory, and the downdates of P are still to come
        whole = isolated_copy(self.model)  # so that nobody's hooks see the forwards
        before = measure(whole, self.example_inputs, repeats=_REPEATS)
        missed = unreached(whole, self.example_inputs)
        pruned = pruned_copy(self.model, cut.surgery, values)
        settled = self._settle(pruned, cut.surgery) if cut.removed else Settled({}, 0)
        with running("the pruned model fails on the example inputs"):
            after = measure(pruned, cut.surgery.slice_inputs(self.example_inputs), repeats=_REPEATS)
        del whole, pruned
        if settled.statistics:
            check_finite(settled.statistics)
            warn_of_few(settled.samples, stacklevel=4 + ("blocks" in self.what))
        self._operate(cut, values, settled.statistics)  # the last that can fail
        return PruneReport(
            couplings=changes_of(structure, ladder.candidates, cut.removed),
            importance=self.importance,
            selection=self.selection,
            source=self.tracker.kind if self.source == "sketch" and self.tracker else self.source,
            disagreement=off,
            uncompensated=uncompensated,
            refused={**structure.refused, **unscored, **missed},
            kept_inputs={name: kept.tolist() for name, kept in cut.surgery.inputs.items()},
            gains=compare(before, after),
            outdated=outdated(self.model, cut.surgery),
        )

    def copies(self, ratios: Iterable[float]) -> Iterator[nn.Module]:
        """The model as a step to each ratio would leave it, in eval mode; itself it stays whole.

        Matrices and ranking are made once, so a curve costs little more than one step.
        """
        search, ladder, _ = self._ranked()
        for ratio in ratios:
            cut = search.find(ladder, *checked_target({"ratio": ratio}), self._loss)
            pruned = pruned_copy(self.model, cut.surgery, search.compensated(cut)[0])
            if cut.removed:
                check_finite(self._settle(pruned, cut.surgery).statistics)
            yield pruned

    def _ranked(
        self, progress: Callable[[str], None] = lambda text: None, value: Any = None
    ) -> tuple[Search, Ladder, dict[str, str]]:
        """What finds a cut, the order of removals, and the couplings that have none, and why."""
        with running("the model cannot be traced"):
            how = self.ignored, self.include_inputs, self.heads, progress
            structure = trace(self.model, self.example_inputs, *how)
        wanted = targeted(structure.couplings, value)
        needed = needed_layers(structure, wanted)
        matrices = matrices_from(self.source, needed, self.model, self.optimizers, self.tracker,
                                 self.loader, self.damping)  # fmt: skip
        turned: dict[str, Tensor] = {}
        exact = self.source == "calibration" and self.tracker is None and not self._own()
        if exact and self.compensate and self.importance == "saliency":  # else P would stay behind
            structure, turned = in_basis(structure, matrices, self.example_inputs, wanted)
        modules = dict(structure.model.named_modules())
        gone = units_gone(self._original, structure.couplings)
        settings = self.importance, self.selection, gone, self.seed, progress
        candidates, unscored = rank(structure, modules, matrices, *settings, wanted)
        where = structure.model, structure, self.example_inputs, matrices, bool(self.compensate)
        fit = partial(refit, self.model, self._pairs, self._settle, self.damping)
        search = Search(*where, self._settle, fit if self.compensate == "in turn" else None,
                        turned)  # fmt: skip
        if self.scope == "global" and self.loader is not None:
            half = partial(calibrate_some, names=needed, damping=self.damping, few=True)
            again = half if self.source == "calibration" else None
            tried = self.loader, self._pairs, again, self.adapt_norms, progress
            candidates = measured(search, candidates, *tried)
        return search, Ladder(candidates, self.scope, self.round_to), unscored

    def state_dict(self) -> dict[str, Any]:
        """What a pruner of the pruned model must know of the whole one: units by coupling."""
        return {"original": dict(self._original)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counts ratios from the units of the model that `state_dict` remembers."""
        self._original = dict(state["original"])

    def snapshot(self) -> Snapshot:
        """The values and shapes of now, to which `Snapshot.restore` returns across prunings."""
        inputs, loader, order = self.example_inputs, self.loader, next(self._order)

        def back(changed: set[str]) -> None:
            self.example_inputs, self.loader = inputs, loader
            for other in self._snapshots:
                other.void |= other.order > order
                other.expected ^= changed

        snapshot = Snapshot(self.model, self.optimizers, self.tracker, back, order)
        self._snapshots.add(snapshot)
        return snapshot

    def _own(self) -> bool:
        """Whether an optimizer keeps matrices, in the basis that the weights are in."""
        return any(isinstance(one, RLSOptimizer) for one in self.optimizers)

    def _disagreement(self, matrices: Mapping[str, Tensor]) -> dict[str, float] | None:
        """How far matrices that were tracked are from a calibration, where there is a loader."""
        if self.loader is None or self.source not in ("own", "sketch"):
            return None
        exact = calibrate_some(self.model, self.loader, matrices, self.damping)
        return disagreement({name: matrices[name] for name in exact}, exact)

    def _loss(self, pruned: nn.Module) -> float:
        """What `evaluate` gives."""
        assert self.evaluate is not None
        return checked_loss(self.evaluate(pruned))

    def _settle(self, pruned: nn.Module, surgery: Surgery) -> Settled:
        """Lets the batch norms of a pruned copy follow the cut where there is a loader."""
        if self.loader is None or not self.adapt_norms:
            return Settled({}, 0)
        return settle(self.model, pruned, surgery.tensors, self._pairs(surgery))

    def _pairs(self, surgery: Surgery, given: Iterable | None = None) -> Iterator[tuple[Any, Any]]:
        """Batches, by default all, each as the whole model and as the pruned one takes it."""
        given = self.loader if given is None else given  # which may have no length to ask for
        cut = self._sliced_loader(surgery).slice if surgery.inputs else lambda batch: batch
        for batch in (
            () if given is None else given
        ):  # begun where it is used, with its random state
            yield batch, cut(batch)

    def _sliced_loader(self, surgery: Surgery) -> Any:
        """The loader as the model takes its batches after a surgery."""
        if self.loader is None or not surgery.inputs:
            return self.loader
        return SlicedBatches(self.loader, surgery.slice_inputs, self.model, self.example_inputs)

    def _operate(
        self, cut: Cut, values: Mapping[str, Tensor], statistics: Mapping[str, Tensor]
    ) -> None:
        """Carries out a cut and all that follows from it, or leaves everything as it was."""
        surgery = cut.surgery
        columns = {} if self.tracker is None else self.tracker.kept_columns(surgery.tensors)
        done: list[Change] = []  # which a snapshot knows of before there is anything to take back
        for snapshot in self._snapshots:
            snapshot.changes.append(done)
        batches = itertools.islice(self._pairs(surgery), 1)
        operate(self.model, self.optimizers, surgery, values, self.example_inputs, done, batches)
        if self.tracker is not None:
            try:
                self.tracker.follow(columns)
            except BaseException:
                revert(done)
                raise
        for name, new in statistics.items():
            self.model.get_buffer(name).copy_(new)
        if surgery.inputs:
            self.loader = self._sliced_loader(surgery)
            self.example_inputs = surgery.slice_inputs(self.example_inputs)
