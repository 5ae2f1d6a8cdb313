"""Batch norms after a cut: their statistics follow what it changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import BatchNorm
from rlscuda.optim.kept import Kept
from rlscuda.pruning.running.calls import feed, isolated_copy, rng_kept
from rlscuda.pruning.running.watching import branched

FEWEST_SAMPLES = 16  # below which what a batch shows is as much chance as the cut


@dataclass(frozen=True)
class Settled:
    """What `settle` found.

    Attributes:
        statistics: Running statistics of the batch norms, by buffer name; of none where no batch
            norm has any.
        samples: Of dimension 0 that the norm which saw fewest was given.
    """

    statistics: dict[str, Tensor]
    samples: int


class Seen:
    """What the batch norms of a model are given by batches, for many cuts of it.

    Args:
        whole: The model; a copy of it is run.
        batches: As `feed` takes them.

    Attributes:
        after: The moments of each norm's input by its name, after each batch.
    """

    @torch.no_grad()
    def __init__(self, whole: nn.Module, batches: Iterable[Any]):
        model = isolated_copy(whole).eval()
        norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
        moments = {name: _Moments() for name in norms}
        self.after: list[dict[str, _Moments]] = []
        with rng_kept(model), ExitStack() as hooks:
            for name, norm in norms.items():
                hook = norm.register_forward_pre_hook(_showing(moments[name].add))
                hooks.callback(hook.remove)
            for batch in batches:
                feed(model, batch)
                self.after.append({name: copy.deepcopy(one) for name, one in moments.items()})


@torch.no_grad()
def settle(
    whole: nn.Module | Seen,
    pruned: nn.Module,
    kept: Mapping[str, Kept],
    batches: Iterable[tuple[Any, Any]],
) -> Settled:
    r"""Moves the statistics of a pruned copy's batch norms by what the cut did to their inputs.

    Whole and pruned model see the same batches, in eval mode. With the mean and the variance of a
    norm's input over the n samples so far, m and v in the pruned model and m', v' in the whole one,
    its running statistics become

    .. math::
        \mu \leftarrow \mu + \tfrac{n}{n + 1} (m - m'), \qquad
        \sigma^2 + \epsilon \leftarrow (\sigma^2 + \epsilon)
        \frac{n (v + \epsilon) + \sigma^2 + \epsilon}{n (v' + \epsilon) + \sigma^2 + \epsilon}

    What chance the samples share cancels, and the statistics of training stay where nothing was
    cut. They count as one sample more. Moments are those of all batches together, so their size
    does not matter; later norms see their input as normalised by what is known so far.

    A norm without running statistics, one whose `train` refuses training mode, and one that no
    batch reaches stay as they are.

    Args:
        whole: The model before the cut, of which a copy is run; or what its norms see of these
            batches.
        pruned: The copy, with the statistics of the whole model; it is left in eval mode.
        kept: What the cut keeps, by name of a parameter or buffer.
        batches: The same batch for either, as `feed` takes them.

    Raises:
        TypeError: A batch is none that `feed` takes.
        ValueError: There is no batch, or the pruned copy fails on one.
    """
    norms = _norms(pruned)
    if not norms:
        return Settled({}, 0)
    found = {name: _Shift(norm, kept.get(f"{name}.running_mean")) for name, norm in norms.items()}
    shown = [(norms[name], shift.follow) for name, shift in found.items()]
    model = None if isinstance(whole, Seen) else isolated_copy(whole).eval()
    if model is not None:
        modules = dict(model.named_modules())
        shown += [(modules[name], shift.whole.add) for name, shift in found.items()]
    count = 0
    with rng_kept(pruned if model is None else model), ExitStack() as hooks:
        for norm, see in shown:
            hooks.callback(norm.register_forward_pre_hook(_showing(see)).remove)
        for of_whole, of_pruned in batches:
            if model is not None:
                feed(model, of_whole)
            elif isinstance(whole, Seen):
                for name, shift in found.items():
                    shift.whole = whole.after[count][name]
            try:
                feed(pruned, of_pruned)
            except Exception as error:  # the whole model has run
                raise branched(error) from error
            count += 1
    if not count:
        raise ValueError("loader must give at least one batch, got none")
    reached = [shift.pruned.samples for shift in found.values() if shift.pruned.samples]
    buffers = {f"{n}.{k}": b for n, m in norms.items() for k, b in m.named_buffers(recurse=False)}
    return Settled(buffers, min(reached, default=0))


@torch.no_grad()
def measure_again(model: nn.Module, loader: Iterable) -> None:
    """Gives batch norms the statistics of a loader, the mean over its batches.

    What `settle` would not move stays as it is. The statistics change at the end, or not at all.

    Args:
        model: The model.
        loader: Batches as `feed` takes them.

    Raises:
        ValueError: There is no batch, or a statistic is NaN or infinite.
    """
    again = isolated_copy(model)
    norms = _norms(again)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    empty = True
    with rng_kept(again):
        for batch in loader:
            feed(again, batch)
            empty = False
    if empty:
        raise ValueError("loader must give at least one batch, got none")
    reached = {name: norm for name, norm in norms.items() if norm.num_batches_tracked}
    found = {f"{n}.{k}": b for n, m in reached.items() for k, b in m.named_buffers(recurse=False)}
    check_finite(found)
    for name, values in found.items():
        model.get_buffer(name).copy_(values)


def check_finite(statistics: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a statistic of `settle` is NaN or infinite."""
    for name, values in statistics.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"loader must give {name!r} finite values, got NaN or infinite ones")


def warn_of_few(samples: int, stacklevel: int) -> None:
    """Warns where statistics follow by so few samples that what they show is chance."""
    if samples < FEWEST_SAMPLES:
        warnings.warn(
            f"batch norms adapt to the cut by {samples} samples of loader: give {FEWEST_SAMPLES} "
            "or more, or adapt_norms=False",
            stacklevel=stacklevel,
        )


def _norms(model: nn.Module) -> dict[str, Any]:
    """The batch norms with running statistics that would train; the model is left in eval mode."""
    model.train()
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.training and module.running_mean is not None
    }
    model.eval()
    return norms


def _showing(see: Callable[[Tensor], None]) -> Callable[[nn.Module, Any], None]:
    """A hook that shows what a norm is given, before it is normalised."""
    return lambda _, args: see(args[0])


class _Moments:
    """Mean and variance [channels] of all that a norm was given, float64."""

    def __init__(self) -> None:
        self.samples = self.values = 0
        self.mean: Any = 0.0
        self.variance: Any = 0.0

    def add(self, x: Tensor) -> None:
        """Takes in x [samples, channels, ...]."""
        values = x.numel() // x.shape[1]
        if not values:
            return
        self.samples, self.values = self.samples + len(x), self.values + values
        single = x if x.dtype == torch.float64 else x.float()
        axes = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(single, axes, correction=0)
        share, step = values / self.values, mean.double() - self.mean
        self.variance += share * (variance - self.variance) + share * (1 - share) * step.square()
        self.mean += share * step


class _Shift:
    """How the running statistics of a norm of the pruned copy follow those of its inputs.

    Args:
        norm: Of the pruned copy.
        kept: What the cut keeps of the whole norm's channels; None for all.
    """

    def __init__(self, norm: Any, kept: Kept | None):
        self.norm, self.kept = norm, kept
        self.whole, self.pruned = _Moments(), _Moments()
        self.mean = norm.running_mean.to(torch.float64, copy=True)
        self.variance = norm.running_var.double() + norm.eps

    def follow(self, x: Tensor) -> None:
        """Takes in what the pruned norm is given, after the whole one was given the same."""
        self.pruned.add(x)
        n, norm = self.pruned.samples, self.norm
        if not (n and self.whole.samples):
            return
        before = [v if self.kept is None else self.kept.take(v)
                  for v in (self.whole.mean, self.whole.variance)]  # fmt: skip
        norm.running_mean.copy_(self.mean + n / (n + 1) * (self.pruned.mean - before[0]))
        now, then = (n * (v + norm.eps) + self.variance for v in (self.pruned.variance, before[1]))
        norm.running_var.copy_((self.variance * now / then - norm.eps).clamp_(min=0))
