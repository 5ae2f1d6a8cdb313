"""What the optimizer warns of by itself, since nobody prints `coverage()` and `health()`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from rlscuda.optim.forms import FORMS
from rlscuda.optim.layers import Layer, matrix_bytes
from rlscuda.optim.moves import Move

NOTHING_COVERED = (
    "no layer of the model is covered: the fallback rule trains everything, see coverage()"
)
NO_MODULE = (
    "no module that holds the parameters was found: the fallback rule trains them all, at lr; pass "
    "model= for the RLS rule"
)
_CUT_SHORT = (
    "step() was cut short by {error}: some parameters have moved and others have not; load a "
    "checkpoint to go on from a whole step"
)
PATIENCE = 3  # steps without an input: one may be no training step, as that of a checkpointer
_OVERSHOOT = (
    "one input row a step and lr above twice the gain: the step can go beyond the minimum and "
    "diverge, choose lr <= 2 * gain"
)
_SHARE = 0.25  # of a device's memory
_FAR_ABOVE = 10  # times the usual rate of the fallback rule
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_NOT_THE_USER = tuple(folder + os.sep for folder in (_PACKAGE, os.path.dirname(torch.__file__)))


def warn(text: str) -> None:
    """Warns at the line that led here, through whatever wrappers of torch: a scheduler adds one."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USER):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def warn_cut_short(error: BaseException) -> None:
    """Warns that a step has moved some of what it should."""
    warn(_CUT_SHORT.format(error=type(error).__name__))


def of_steps(moves: list[Move]) -> Iterator[str]:
    """Of layers that step while their input is not seen, and of a rate that overshoots."""
    blind = []
    for move in moves:
        stage = move.stage
        if not move.span:
            continue
        stage.missed = 0 if move.summary is not None else stage.missed + 1
        if stage.missed == PATIENCE:
            blind.append(move.layer.name)
        if stage.overshoots(move.group):
            yield _OVERSHOOT
    if blind:
        yield (
            f"no input was seen in the last {PATIENCE} steps of {', '.join(map(repr, blind))}: "
            "they train without P. Their forward is not that of the module itself "
            "(functional_call, torch.func, DataParallel), is an attention of more than one tensor, "
            "was compiled in eval mode or before the optimizer was made (call "
            "torch.compiler.reset()), has sparse input, does not happen while "
            "zero_grad(set_to_none=False) keeps a gradient, or somebody removed its hooks"
        )


def of_idle(steps: int) -> Iterator[str]:
    """Of steps in a row in which no parameter had a gradient, as they are no longer the model's."""
    if steps == PATIENCE:
        yield (
            f"no parameter of the optimizer had a gradient in the last {PATIENCE} steps: if the "
            "model has others now (fully_shard, to_empty, quantisation, a load that assigns), make "
            "the optimizer after that, or put them into its groups"
        )


def of_replaced(layers: list[str]) -> Iterator[str]:
    """Of layers whose weights have left the groups for parameters that are in no module."""
    if layers:
        yield (
            f"parameters of no module that is known have replaced those of "
            f"{', '.join(map(repr, layers))} in the groups: the fallback rule trains them; make "
            "the optimizer anew from the model that holds them"
        )


def of_groups(
    groups: list[dict], layers: Mapping[nn.Parameter, Layer], state: Mapping
) -> Iterator[str]:
    """Of what new groups will take of the memory, and of an `lr` of the layers put on the rest."""
    yield from _of_memory(groups, layers, state)
    for group in groups if layers else ():
        usual, own = FORMS[group["form"]]["fallback_lr"], group["fallback_lr"] is None
        if own and group["peak_lr"] > _FAR_ABOVE * usual:
            yield (
                f"a group without a covered layer has lr={group['peak_lr']:g}, which there is the "
                f"fallback rule's own: leave it out for {usual:g} at the peak, or set fallback_lr"
            )


def _of_memory(
    groups: list[dict], layers: Mapping[nn.Parameter, Layer], state: Mapping
) -> Iterator[str]:
    """Of matrices still to be allocated that will take a large share of their device's memory."""
    sizes: dict[torch.device, dict[str, int]] = {}
    for group in groups:
        for weight in group["params"]:
            if weight in layers and "P" not in state.get(weight, ()):
                size = matrix_bytes(layers[weight], group["dtype"])
                sizes.setdefault(weight.device, {})[layers[weight].name] = size
    for device, of in sizes.items():
        total, most, there = sum(of.values()), max(of, key=of.__getitem__), _memory_of(device)
        if there and total > _SHARE * there:
            yield (
                f"P of the covered layers will take {total / 2**30:.1f} of the {there / 2**30:.1f} "
                f"GiB of {device}, {of[most] / 2**30:.1f} of them for {most!r}; a smaller "
                "max_fan_in= splits them, layers named in exclude= are trained by the fallback "
                "rule, see coverage()"
            )


def _memory_of(device: torch.device) -> int | None:
    """Bytes, None where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
