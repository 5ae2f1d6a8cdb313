"""The three forms of the RLS rule: their constants, their validation and one layer's step.

paper     W <- W - (lr / h) G P_old    (Zhang et al. 2021, Yu et al. 2022), with momentum
natural   W <- W - lr G P_new          likewise
adaptive  D = G P_new;  per output row v <- b2 v + (1 - b2) sum(D o G);
          M <- b1 M + (1 - b1) D;  W <- W - lr M^ / (sqrt(v^) + eps), P drifting to A^(-1/2)
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from rlscuda.layers import SUMMARIES, Layer
from rlscuda.staging import Factors, Summary

_rls_update = torch.ops.rlscuda.rls_update_.default
_weight_step = torch.ops.rlscuda.weight_step_.default
_adaptive_weight_step = torch.ops.rlscuda.adaptive_weight_step_.default

FORMS: dict[str, dict[str, Any]] = {
    "adaptive": {
        "lr": 0.1, "forgetting": 1.0, "gain": 0.01, "momentum": 0.9, "weight_decay": 0.05,
        "rank": 16, "summary": "sample", "drift": 0.3, "fallback_lr": 0.01,
    },
    "paper": {
        "lr": 0.3, "forgetting": 1.0, "gain": 0.1, "momentum": 0.0, "weight_decay": 0.0,
        "rank": 1, "summary": "mean", "drift": None, "fallback_lr": 1e-3,
    },
    "natural": {
        "lr": 0.3, "forgetting": 1.0, "gain": 0.01, "momentum": 0.0, "weight_decay": 0.0,
        "rank": 1, "summary": "sketch", "drift": None, "fallback_lr": 1e-3,
    },
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "shrinkage": None, "initial_scale": 1.0, "beta2": 0.99, "eps": 1e-8, "seed": 0, "dtype": None,
}  # fmt: skip
OPTIONS = frozenset({"form", "fallback_ratio", "fallback_weight_decay", *_COMMON, *FORMS["paper"]})


def _require(ok: bool, name: str, expected: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _real(value: Any) -> float:
    """`value` as a float, NaN where it is no number, so that every range check fails."""
    return float(value) if isinstance(value, (Real, Tensor)) else math.nan


def resolve_options(given: dict[str, Any]) -> dict[str, Any]:
    """Fills in the constants of the chosen form and checks every value.

    Args:
        given: Options by name; None stands for the form's own constant.

    Raises:
        ValueError: An option is out of its range.
    """
    form = given.get("form", "adaptive")
    _require(isinstance(form, str) and form in FORMS, "form", " | ".join(FORMS), form)
    chosen = {name: value for name, value in given.items() if value is not None}
    o = {**_COMMON, **FORMS[form], **chosen, "form": form}
    if isinstance(o["lr"], Tensor) and o["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {list(o['lr'].shape)}")
    _require(0 <= _real(o["lr"]) < math.inf, "lr", ">= 0 and finite", o["lr"])
    _require(0 < _real(o["forgetting"]) <= 1, "forgetting", "in (0, 1]", o["forgetting"])
    _require(0 < _real(o["gain"]) < math.inf, "gain", "> 0 and finite", o["gain"])
    if form == "adaptive":
        _require(o["gain"] <= 1, "gain", "at most 1 in the adaptive form, an average", o["gain"])
    _require(0 <= _real(o["momentum"]) < 1, "momentum", "in [0, 1)", o["momentum"])
    _require(0 <= _real(o["beta2"]) < 1, "beta2", "in [0, 1)", o["beta2"])
    _require(0 < _real(o["eps"]) < math.inf, "eps", "> 0 and finite", o["eps"])
    _require(0 <= _real(o["weight_decay"]) < math.inf, "weight_decay", ">= 0 and finite",
             o["weight_decay"])  # fmt: skip
    _require(isinstance(o["rank"], int) and o["rank"] >= 1, "rank", "an int >= 1", o["rank"])
    _require(o["summary"] in SUMMARIES, "summary", " | ".join(SUMMARIES), o["summary"])
    _require(0 < _real(o["initial_scale"]) < math.inf, "initial_scale", "> 0 and finite",
             o["initial_scale"])  # fmt: skip
    _require(0 <= _real(o["fallback_lr"]) < math.inf, "fallback_lr", ">= 0 and finite",
             o["fallback_lr"])  # fmt: skip
    _require(isinstance(o["seed"], int), "seed", "an int", o["seed"])
    _require(o["dtype"] in (None, torch.float32, torch.float64), "dtype",
             "None, torch.float32 or torch.float64", o["dtype"])  # fmt: skip
    if o["shrinkage"] is None:
        o["shrinkage"] = min(1.0, 2 * (1 - o["forgetting"]))
    _require(0 <= _real(o["shrinkage"]) <= 1, "shrinkage", "in [0, 1]", o["shrinkage"])
    if o["drift"] is not None:
        _require(_real(o["drift"]) >= 0, "drift", "None or >= 0", o["drift"])
        most = 1 / gain_at(o, 0)  # P keeps the part 1 - gain * drift of itself
        _require(o["drift"] <= most, "drift", f"at most {most:g}, or P could turn negative",
                 o["drift"])  # fmt: skip
    return o


def gain_at(group: dict[str, Any], updates: int) -> float:
    """kappa_t: the adaptive form starts as a plain average, 1/(t+1), and ends at `gain`."""
    if group["form"] != "adaptive":
        return group["gain"]
    return max(group["gain"], 1 / (updates + 1))


def update_matrix(
    group: dict[str, Any],
    state: dict[str, Any],
    S: Tensor,
    gain: float,
    found_inf: Tensor | None,
    projection: Tensor | None = None,
    projected: Tensor | None = None,
) -> Tensor:
    """The rank-r update of `P` in place; returns h, NaN where the update was refused.

    `projected` are rows X P, turned into rows of the new `P` but for its diffusion.
    """
    decay, diffusion = decay_and_diffusion(group, gain)
    _, h = _rls_update(
        state["P"], S, group["forgetting"], gain, decay, diffusion, group["initial_scale"],
        state.get("power"), state["health"], found_inf, projection, projected,
    )  # fmt: skip
    return h


def decay_and_diffusion(group: dict[str, Any], gain: float) -> tuple[float, float]:
    """P <- decay P + diffusion I after each update: shrinkage towards the start, then drift."""
    decay, diffusion = 1 - group["shrinkage"], group["shrinkage"] * group["initial_scale"]
    if group["drift"]:
        keep = 1 - gain * group["drift"]
        decay, diffusion = decay * keep, diffusion * keep + gain
    return decay, diffusion


def product(layer: Layer, P: Tensor, G: Tensor, out: Tensor) -> Tensor | None:
    """Writes G P into `out` [c, n], without a bias' part.

    Returns:
        The row of `P` [n] or [groups, n] that the bias' part takes, for the weight step to add.
    """
    n = layer.columns
    if layer.groups == 1:
        torch.mm(G, P[:n], out=out)
    else:
        split = (layer.groups, G.shape[0] // layer.groups)
        torch.bmm(G.view(*split, n), P[:, :n], out=out.view(*split, layer.fan_in))
    return P[..., n, :] if layer.bias else None


def factored_step(
    layer: Layer,
    group: dict[str, Any],
    state: dict[str, Any],
    summary: Summary,
    factors: Factors,
    gain: float,
    out: Tensor,
) -> Tensor:
    """Update of `P` and product through the factors of the gradient: (X P)^T delta.

    X P, which the product needs, also holds what the update needs where the summary is the mean of
    the rows X; and it is turned from the old P to the new one by the thin factors of the update.

    Returns:
        h of the update; `out` [c, n] is complete, bias included.
    """
    P, n, X = state["P"], layer.columns, factors.x
    projected = P.new_empty(len(X), layer.fan_in)  # given as out=, which autocast leaves alone
    if layer.bias:
        torch.addmm(P[n], X, P[:n], out=projected)
    else:
        torch.mm(X, P, out=projected)
    projection = None
    if group["summary"] == "mean" and group["rank"] == 1:
        projection = projected.mean(0, keepdim=True)
    S = summary.rows[0]
    if group["form"] == "paper":
        h = update_matrix(group, state, S, gain, None, projection)
    else:
        h = update_matrix(group, state, S, gain, None, projection, projected)
        _, diffusion = decay_and_diffusion(group, gain)
        projected[:, :n].add_(X, alpha=diffusion)
        if layer.bias:
            projected[:, n].add_(diffusion)
    torch.mm(factors.delta.t(), projected, out=out)
    return h


def may_factor(layer: Layer, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the factored product (P X^T) delta is possible and takes fewer operations than G P.

    That is N (n + c) < n c for N input rows, asked for with a margin that pays for the probe.
    """
    if layer.weight.dim() != 2 or layer.shared or not x.dtype == layer.weight.dtype == dtype:
        return False
    outputs, n = layer.weight.shape
    return 2 * (x.numel() // n) * (n + outputs) < n * outputs


def move_weight(
    layer: Layer,
    group: dict[str, Any],
    state: dict[str, Any],
    G: Tensor,
    product: Tensor,
    bias_row: Tensor | None,
    h: Tensor | None,
    gain: float,
) -> None:
    """Everything of the weight update that follows the product, in one fused pass."""
    bias: Tensor | None = layer.bias_parameter if layer.bias else None
    grad_bias, weight = None, layer.weight
    if bias is not None:
        frozen = bias.grad is None
        grad_bias = torch.zeros_like(bias) if frozen else bias.grad
        bias = bias.clone() if frozen else bias
    lr, decay = float(group["lr"]), group["weight_decay"]
    if group["form"] == "adaptive":
        # P is still far from the input's statistics while its gain is large: warm up with it
        _adaptive_weight_step(
            weight, bias, product, G, bias_row, grad_bias, h, state["first_moment"],
            state["second_moment"], lr * group["gain"] / gain, group["momentum"], group["beta2"],
            decay, group["eps"], state["step"],
        )  # fmt: skip
    else:
        buffer = state.get("momentum_buffer")
        if buffer is None and group["momentum"]:  # a scheduler turned momentum on
            buffer = state["momentum_buffer"] = torch.zeros_like(product)
        _weight_step(
            weight, bias, product, bias_row, grad_bias, h, buffer, lr, group["momentum"], decay,
            group["form"] == "paper",
        )  # fmt: skip
