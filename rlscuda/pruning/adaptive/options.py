"""The options of an `AdaptivePruner`, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from rlscuda._torch import unwrapped
from rlscuda.optim.discovery import modules_named
from rlscuda.optimizer import RLSOptimizer
from rlscuda.pruning.adaptive.listing import PRICES
from rlscuda.pruning.choice.targets import checked_target
from rlscuda.pruning.matrices.tracker import SketchTracker
from rlscuda.pruning.options import (
    check_number,
    check_repeatable,
    checked_compensation,
    checked_optimizers,
    checked_source,
)
from rlscuda.pruning.schedule import CURVES

WHAT = ("channels", "blocks")
PENALTIES = ("output", "scale")
_LEAST = {
    "rho": 0, "gain": 0, "lr": 0, "momentum": 0, "damping": 0, "tolerance": 0, "warmup": 0,
    "epochs": 1, "patience": 1, "every": 1, "round_to": 1,
}  # fmt: skip
_WHOLE = ("warmup", "epochs", "patience", "every", "round_to")


@dataclass(frozen=True, eq=False)
class Options:
    """What is pruned, by what, and what helps; see `AdaptivePruner`.

    Attributes:
        counted: What the target is of: `params` or `flops`.
        target: The target; below 1 a share.
        what: Some of `WHAT`.
        ignored: Names of modules that stay as they are.
        source: Of the matrices; `none` where there are none.
    """

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    inputs: Any
    counted: str
    target: float
    what: tuple[str, ...]
    penalty: str
    price_by: str
    curve: str
    ignored: tuple[str, ...]
    source: str
    tracker: SketchTracker | None
    loader: Iterable | None
    compensate: bool | str
    rho: float
    gain: float
    warmup: int
    epochs: int | None
    patience: int
    every: int
    lr: float
    momentum: float
    round_to: int
    tolerance: float | None
    damping: float


def checked(
    model: Any,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    inputs: Any,
    target_params: float | None,
    target_flops: float | None,
    what: str | Sequence[str],
    penalty: str,
    price_by: str | None,
    curve: str,
    ignored: str | nn.Module | Iterable[str | nn.Module],
    source: str | None,
    tracker: SketchTracker | None,
    loader: Iterable | None,
    compensate: bool | str,
    numbers: Mapping[str, Any],
) -> Options:
    """Options, as `AdaptivePruner` is given them; `numbers` are those of `Options` from `rho` on.

    Raises:
        ValueError: One is out of its range, or needs another that is missing.
        TypeError: One is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    model = unwrapped(model)
    optimizers = checked_optimizers(optimizer, model)
    if inputs is None:
        raise ValueError("example_inputs must be what the model can be called with, got None")
    if target_params is None and target_flops is None:
        target_params = 0.5
    kind, target = checked_target({"target_params": target_params, "target_flops": target_flops})
    counted = kind.removeprefix("target_")
    chosen = (what,) if isinstance(what, str) else tuple(what)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(WHAT):
        raise ValueError(f"what must be 'channels', 'blocks' or both, got {what!r}")
    for name, value, values in (("penalty", penalty, PENALTIES), ("curve", curve, tuple(CURVES)),
                                ("price_by", price_by or counted, PRICES)):  # fmt: skip
        if value not in values:
            raise ValueError(f"{name} must be {' | '.join(values)}, got {value!r}")
    for name, least in _LEAST.items():
        if numbers[name] is not None or name not in ("epochs", "tolerance"):
            check_number(name, numbers[name], least, whole=name in _WHOLE)
    if numbers["momentum"] >= 1:
        raise ValueError(f"momentum must be below 1, got {numbers['momentum']}")
    if loader is not None:
        check_repeatable("loader", loader)
    if tracker is not None and not isinstance(tracker, SketchTracker):
        raise TypeError(f"tracker must be a SketchTracker, got {type(tracker).__name__}")
    if "blocks" in chosen and tracker is not None:
        raise ValueError("blocks cannot be combined with tracker, which goes on tracking the "
                         "layers of those that go: give loader or an RLSOptimizer")  # fmt: skip
    if "blocks" in chosen and penalty == "output" and loader is None:
        raise ValueError("blocks with the penalty 'output' need loader, by which they are measured")
    own = any(isinstance(one, RLSOptimizer) for one in optimizers)
    there = {"sketch": tracker is not None, "own": own, "calibration": loader is not None}
    needed = "channels" in chosen and (penalty == "output" or any(there.values()))
    kept = modules_named(cast(Iterable, ignored), "ignored", model)
    inside = {module for _, modules in kept for module in modules}
    return Options(
        model, optimizers, inputs, counted, target, chosen, penalty, price_by or counted, curve,
        tuple(name for name, module in model.named_modules() if module in inside),
        checked_source(source, there, needed), tracker, loader,
        checked_compensation(compensate, loader), **numbers,
    )  # fmt: skip
