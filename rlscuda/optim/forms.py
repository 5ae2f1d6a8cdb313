"""The four forms of the RLS rule: their constants and their validation.

spectral  N the momentum of G, looked ahead;  W <- W - lr sqrt(c / min(c, n)) O,
          O = (N P N^T)^(-1/2) N P of at most 64 rows at a time, P drifting to A^(-1/2)
paper     W <- W - (lr / h) G P_old    (Zhang et al. 2021, Yu et al. 2022), with momentum
natural   W <- W - lr G P_new          likewise; in both no step is longer than a part of W
adaptive  D = G P_new;  per output row v <- b2 v + (1 - b2) sum(D o G);
          M <- b1 M + (1 - b1) D;  W <- W - lr M^ / (sqrt(v^) + eps), P as in spectral
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rlscuda.optim.layers import SUMMARIES

FORMS: dict[str, dict[str, Any]] = {
    "spectral": {
        "lr": 0.05, "forgetting": 1.0, "gain": 0.01, "momentum": 0.9, "weight_decay": 0.2,
        "rank": 16, "summary": "sample", "drift": 0.3, "trust_ratio": math.inf,
        "interval": 4, "fallback_lr": 1e-2,
    },
    "adaptive": {
        "lr": 0.1, "forgetting": 1.0, "gain": 0.01, "momentum": 0.9, "weight_decay": 0.05,
        "rank": 16, "summary": "sample", "drift": 0.3, "trust_ratio": math.inf,
        "interval": 4, "fallback_lr": 3e-3,
    },
    "paper": {
        "lr": 0.3, "forgetting": 1.0, "gain": 0.1, "momentum": 0.0, "weight_decay": 0.0,
        "rank": 1, "summary": "mean", "drift": None, "trust_ratio": 0.1,
        "interval": 1, "fallback_lr": 1e-3,
    },
    "natural": {
        "lr": 0.3, "forgetting": 1.0, "gain": 0.01, "momentum": 0.0, "weight_decay": 0.0,
        "rank": 1, "summary": "sketch", "drift": None, "trust_ratio": 0.1,
        "interval": 1, "fallback_lr": 1e-3,
    },
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "ridge": None, "shrinkage": 0.0, "initial_scale": 1.0, "beta2": 0.99, "eps": 1e-8, "seed": 0,
    "dtype": None, "max_fan_in": 8192,
}  # fmt: skip
_IN: dict[str, Callable[[float], bool]] = {
    ">= 0 and finite": lambda x: 0 <= x < math.inf,
    "> 0 and finite": lambda x: 0 < x < math.inf,
    "> 0, inf for none": lambda x: x > 0,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
}
_RANGES = {
    "lr": ">= 0 and finite", "forgetting": "in (0, 1]", "gain": "> 0 and finite",
    "momentum": "in [0, 1)", "beta2": "in [0, 1)", "eps": "> 0 and finite",
    "weight_decay": ">= 0 and finite", "trust_ratio": "> 0, inf for none",
    "initial_scale": "> 0 and finite", "fallback_lr": ">= 0 and finite", "shrinkage": "in [0, 1]",
}  # fmt: skip
_KEPT = {"fallback_decays", "peak_lr"}  # the optimizer's own notes
NORMALISED = frozenset({"adaptive", "spectral"})  # what they see of inputs, and their steps
OPTIONS = frozenset({"form", *_KEPT, *_COMMON, *FORMS["paper"]})
_OTHER_THAN_LR = sorted(OPTIONS - {"lr", *_KEPT})

# What other optimizers do with these would change a result; what is neutral there is neutral here.
_OF_OTHERS = {
    "betas": "momentum and beta2", "beta1": "momentum", "maximize": "a negated loss",
    "learning_rate": "lr", "wd": "weight_decay", "decay": "weight_decay",
    "nesterov": "momentum", "dampening": "momentum", "amsgrad": "beta2", "alpha": "beta2",
    "centered": "beta2", "lambd": "forgetting", "differentiable": "no such step",
    "decoupled_weight_decay": "weight_decay, which is decoupled",
}  # fmt: skip
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"}


def _require(ok: bool, name: str, expected: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _real(value: Any) -> float:
    """`value` as a float, NaN where it is no number, so that every range check fails."""
    try:
        return float(value) if isinstance(value, (Real, Tensor)) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan  # several numbers, a complex one, or an int beyond every float


def as_now(state_dict: Any) -> Any:
    """A saved state, of before there were ridges and intervals, as one of groups without any."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return state_dict
    then = {"ridge": 0.0, "interval": 1}
    lacking = [then.keys() - group.keys() if "shrinkage" in group else () for group in groups]
    old = [{**group, **{k: then[k] for k in some}} for group, some in zip(groups, lacking)]
    return {**state_dict, "param_groups": old}


def check_names(group: dict[str, Any]) -> None:
    """Refuses options of other optimizers and misspelt ones; notes of frameworks may stay.

    Raises:
        ValueError: An entry asks for something that this optimizer does not do.
    """
    public = sorted(OPTIONS - _KEPT)
    for name, value in group.items():
        if name in OPTIONS or name in _OF_SCHEDULERS:
            continue
        close = difflib.get_close_matches(str(name), public, n=1, cutoff=0.8)
        instead = _OF_OTHERS.get(name) or (close[0] if close else None)
        if instead and value is not None and value is not False:
            raise ValueError(f"group option {name!r} is unknown, there is: {instead} "
                             f"(all options: {', '.join(public)})")  # fmt: skip


COUNTS = ("step", "since")  # of a layer's state, on the host: its steps, and those before `age_of`


def age_of(state: Mapping[str, Any]) -> int:
    """Steps of a layer since the start of its averages, which a restart of them has put off."""
    return state.get("step", 0) - state.get("since", 0)


def span_of(group: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    """How many steps the update of `P` in the next one stands for; 0 where `P` rests.

    Each step has one until the gain has come down to `gain`, then the last of each `interval`.
    """
    age, interval = age_of(state), group["interval"]
    if interval == 1 or age < 1 / group["gain"]:
        return 1
    return 0 if (age + 1) % interval else interval


def rank_of(group: Mapping[str, Any], span: int, fan_in: int) -> int:
    """Rows of a summary for an update that stands for `span` steps: as many as theirs together.

    But no more than a kernel takes at once, or than a small `P` needs: of twice its columns, all
    that it keeps, some 50 updates, is off by a tenth. Means over parts of a minibatch are others
    than over all of it.
    """
    rank = group["rank"]
    return rank if group["summary"] == "mean" else min(rank * span, max(rank, min(64, 2 * fan_in)))


def compounded(group: dict[str, Any], span: int) -> dict[str, Any]:
    """A group whose constants of one update do what those of `span` do, one after another."""
    if span == 1:
        return group
    return {
        **group,
        "forgetting": group["forgetting"] ** span,
        "gain": 1 - (1 - group["gain"]) ** span,
        "shrinkage": 1 - (1 - group["shrinkage"]) ** span,
    }


def check_edited(groups: list[dict[str, Any]], checked: list[tuple]) -> None:
    """Checks the options of groups before a step, which must not fail half-way for one of them.

    Args:
        groups: Parameter groups, whose options anybody may have set since they were made.
        checked: What was checked last, so that a rate that changes every step costs little.

    Raises:
        ValueError: An option is out of its range.
    """
    for group in groups:
        lr = group["lr"]
        if not (isinstance(lr, Tensor) and lr.is_cuda):  # which would have to be waited for
            _require(math.isfinite(_real(lr)), "lr", "finite", lr)
    values = [tuple(group[name] for name in _OTHER_THAN_LR) for group in groups]
    if values != checked:
        for group in groups:
            check_complete({**group, "lr": 0.0})
        checked[:] = values


def check_complete(group: Mapping[str, Any]) -> None:
    """Checks the options of a group that was made already, which lacks none.

    Raises:
        ValueError: An option is out of its range or None.
    """
    resolved = resolve_options({name: group[name] for name in OPTIONS})
    for name in sorted(OPTIONS - {"fallback_lr"}):
        if group[name] is None and resolved[name] is not None:
            raise ValueError(f"{name} must have a value, got None")


def resolve_options(given: dict[str, Any]) -> dict[str, Any]:
    """Fills in the constants of the chosen form and checks every value.

    Args:
        given: Options by name; None stands for the form's own constant.

    Raises:
        ValueError: An option is out of its range.
    """
    form = given.get("form", "spectral")
    _require(isinstance(form, str) and form in FORMS, "form", " | ".join(FORMS), form)
    chosen = {name: value for name, value in given.items() if value is not None}
    o = {**_COMMON, **FORMS[form], **chosen, "form": form}
    if isinstance(o["lr"], Tensor) and o["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {list(o['lr'].shape)}")
    for name, expected in _RANGES.items():
        _require(_IN[expected](_real(o[name])), name, expected, o[name])
    if form in NORMALISED:
        _require(o["gain"] <= 1, "gain", f"at most 1 in the {form} form, an average", o["gain"])
        _require(o["trust_ratio"] == math.inf, "trust_ratio", f"inf in the {form} form, which "
                 "normalises its steps", o["trust_ratio"])  # fmt: skip
    _require(isinstance(o["rank"], int) and 1 <= o["rank"] <= 2**16, "rank",
             "an int >= 1 and at most 65536", o["rank"])  # fmt: skip
    _require(type(o["max_fan_in"]) is int and o["max_fan_in"] >= 1, "max_fan_in", "an int >= 1",
             o["max_fan_in"])  # fmt: skip
    _require(type(o["interval"]) is int and o["interval"] >= 1, "interval", "an int >= 1",
             o["interval"])  # fmt: skip
    _require(form in NORMALISED or o["interval"] == 1, "interval", f"1 in the {form} form, whose "
             "P is no average", o["interval"])  # fmt: skip
    _require(o["summary"] in SUMMARIES, "summary", " | ".join(SUMMARIES), o["summary"])
    _require(isinstance(o["seed"], int), "seed", "an int", o["seed"])
    _require(o["dtype"] in (None, torch.float32, torch.float64), "dtype",
             "None, torch.float32 or torch.float64", o["dtype"])  # fmt: skip
    if o["ridge"] is not None:
        _require(_IN[">= 0 and finite"](_real(o["ridge"])), "ridge", "None or >= 0", o["ridge"])
    if o["drift"] is not None:
        _require(_real(o["drift"]) >= 0, "drift", "None or >= 0", o["drift"])
        # P keeps the part 1 - gain * drift of itself; the first gain of an average is 1
        most = 1.0 if form in NORMALISED else 1 / o["gain"]
        _require(o["drift"] <= most, "drift", f"at most {most:g}, or P could turn negative",
                 o["drift"])  # fmt: skip
    return o
