"""Checks of options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rlscuda._torch import Convolution, is_wrapper, unwrapped


def check_number(
    name: str, value: object, least: float = -math.inf, *, whole: bool = False
) -> None:
    """Raises ValueError where an option is no number, or not in [least, inf).

    Args:
        name: Of the option.
        value: Given for it.
        least: The least that it may be.
        whole: Whether it must be an integer.
    """
    kind = numbers.Integral if whole else numbers.Real
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if not fits or not (math.isfinite(value) and value >= least):  # type: ignore
        what = "an integer" if whole else "a finite number"
        bound = "" if least == -math.inf else f" >= {least}"
        raise ValueError(f"{name} must be {what}{bound}, got {value!r}")


def checked_model(model: Any) -> nn.Module:
    """A model whose weights can be cut, also of a compiled one.

    Raises:
        TypeError: It is no module.
        ValueError: A part of it is compiled by TorchScript, quantised, or of tensors that stand for
            others.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    model = unwrapped(model)
    for name, module in model.named_modules():
        where = f"{name!r}, a {type(module).__name__}," if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a ScriptModule, whose code is fixed: prune the module "
                             "that it was made of, and script or trace it again")  # fmt: skip
        weights = dict(module.named_parameters(recurse=False)).values()
        layer = isinstance(module, (nn.Linear, Convolution))
        packed = ".quantized" in type(module).__module__ and type(module).__module__[:5] == "torch"
        if packed or layer and any(not w.is_floating_point() | w.is_complex() for w in weights):
            raise ValueError(f"{where} is quantised: prune the network first, then quantise it")
        for weight in filter(is_wrapper, weights):
            raise ValueError(f"{where} must hold plain tensors, got a {type(weight).__name__}: "
                             "prune it before it is quantised or distributed")  # fmt: skip
    return model


def checked_optimizers(optimizer: Any, model: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers of a model, of which none, one or several are given.

    Raises:
        TypeError: One is no torch optimizer.
        ValueError: One holds no parameter of the model.
    """
    several = isinstance(optimizer, (list, tuple))
    optimizers = tuple(optimizer) if several else () if optimizer is None else (optimizer,)
    parameters = set(model.parameters())
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(one).__name__}")
        held = [p for group in one.param_groups for p in group["params"]]
        if held and parameters.isdisjoint(held):  # one whose blocks are all gone holds none
            raise ValueError("optimizer must train the model, got one with none of its parameters")
    return optimizers


def checked_ranking(
    importance: str, known: Iterable[str], selection: str | None, scope: str
) -> str:
    """How units are chosen one after the other: `selection`, or what goes with the importance.

    Raises:
        ValueError: One of them is unknown, or they do not go together.
    """
    if importance not in known:
        raise ValueError(f"importance must be {' | '.join(known)}, got {importance!r}")
    selection = selection or ("greedy" if importance == "saliency" else "one-shot")
    if selection not in ("greedy", "one-shot"):
        raise ValueError(f"selection must be greedy | one-shot, got {selection!r}")
    if selection == "greedy" and importance != "saliency":
        raise ValueError(f"selection 'greedy' is for importance 'saliency', got {importance!r}")
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be layer | global, got {scope!r}")
    return selection


def checked_source(source: str | None, there: Mapping[str, bool], needed: bool | str) -> str:
    """Where the matrices come from: `source`, or by default the first that is there.

    Args:
        source: `sketch`, `own`, `calibration` or None.
        there: Whether each of these is there, in the order of preference.
        needed: Whether matrices are needed at all; else it is `none`.

    Raises:
        ValueError: It is unknown, or not there.
    """
    if source not in (None, *there):
        raise ValueError(f"source must be {' | '.join(there)}, got {source!r}")
    if not needed:
        return "none"
    if source is None:
        source = next((name for name, is_there in there.items() if is_there), None)
    if source is None:
        raise ValueError("matrices are needed: pass an RLSOptimizer, tracker= or loader=")
    if not there[source]:
        needs = {"sketch": "tracker=", "own": "an RLSOptimizer", "calibration": "loader="}
        raise ValueError(f"source {source!r} needs {needs[source]}, which is missing")
    return source


def checked_compensation(compensate: bool | str, loader: object) -> bool | str:
    """How the remaining weights make up for what goes: True, False or ``in turn``.

    Raises:
        ValueError: It is something else, or a loader is missing.
    """
    if compensate not in (True, False, "in turn"):
        raise ValueError(f"compensate must be True, False or 'in turn', got {compensate!r}")
    if compensate == "in turn" and loader is None:
        raise ValueError("compensate='in turn' needs loader=, which is missing")
    return compensate


def checked_what(what: str | Sequence[str], source: str, include_inputs: bool) -> tuple[str, ...]:
    """What is removed: `channels`, or `channels` and `blocks`.

    Args:
        what: One name, or several.
        source: Of the matrices.
        include_inputs: Whether inputs are to be removed, too.

    Raises:
        ValueError: It is something else, or the matrices are not those of the model without blocks,
            or inputs are to go with these.
    """
    chosen = (what,) if isinstance(what, str) else tuple(what)
    if chosen not in (("channels",), ("channels", "blocks"), ("blocks", "channels")):
        raise ValueError(f"what must be 'channels' or ('channels', 'blocks'), got {what!r}; "
                         "remove_blocks removes blocks alone")  # fmt: skip
    if "blocks" in chosen and source != "calibration":
        raise ValueError("with blocks the matrices are of the model without them: pass loader= and "
                         f"source='calibration', got {source!r}")  # fmt: skip
    if "blocks" in chosen and include_inputs:
        raise ValueError("blocks cannot be combined with include_inputs: what is compared would be "
                         "given other inputs")  # fmt: skip
    return chosen


def checked_loss(loss: Any, name: str = "evaluate") -> float:
    """The number that a function of the user's gave.

    Raises:
        TypeError: It is none.
    """
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must give a number, got {type(loss).__name__}") from None


def check_repeatable(name: str, batches: object) -> None:
    """Raises TypeError where batches cannot be gone through, or only once."""
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if not iterable or isinstance(batches, Iterator):
        raise TypeError(f"{name} must be one that can be gone through again, as a list or a "
                        f"DataLoader, got {type(batches).__name__}")  # fmt: skip


def check_evaluated(target: str, evaluate: object, include_inputs: bool) -> None:
    """Raises where `evaluate` is no function, or a target of loss cannot be evaluated.

    Raises:
        TypeError: It is something else.
        ValueError: The target ``max_loss`` has none, or is combined with `include_inputs`.
    """
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function, got {type(evaluate).__name__}")
    if target == "max_loss" and evaluate is None:
        raise ValueError("max_loss needs evaluate, which gives the validation loss of a model")
    if target == "max_loss" and include_inputs:
        raise ValueError(
            "max_loss cannot be combined with include_inputs: evaluate would not know which inputs "
            "are left"
        )
