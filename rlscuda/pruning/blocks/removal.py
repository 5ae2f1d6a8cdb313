"""Which blocks go, and what becomes of each: the least cost for what it saves, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rlscuda._torch import unwrapped
from rlscuda.pruning.blocks.choosing import DAMPING, PRICES, REPEATS, WAYS, Search
from rlscuda.pruning.blocks.finding import Blocks, find_blocks
from rlscuda.pruning.blocks.shortening import BlockChange, Shortening
from rlscuda.pruning.options import check_number, check_repeatable, checked_optimizers
from rlscuda.pruning.running.calls import isolated_copy
from rlscuda.pruning.running.distortion import Distortion
from rlscuda.pruning.running.measure import Gains, compare, count_flops, count_parameters, measure


@dataclass(frozen=True)
class BlockReport:
    """The result of `remove_blocks`; prints as tables.

    Attributes:
        changes: In the order of their removal.
        kept: Names of the blocks that stay.
        refused: Name of a branch that could not be removed -> why.
        gains: Parameters, FLOPs, memory and latency before and after.
    """

    changes: list[BlockChange]
    kept: list[str]
    refused: dict[str, str]
    gains: Gains

    def __str__(self):
        width = max([len("block"), *(len(change.name) for change in self.changes)])
        lines = [f"{'block':<{width}}  {'becomes':>8}  {'cost':>10}  {'explained':>9}"]
        lines += [
            f"{c.name:<{width}}  {c.how:>8}  {c.cost:>10.3g}  {c.explained:>9.1%}"
            for c in self.changes
        ]
        lines += [f"not removable: {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join([*lines, "", str(self.gains)])


def remove_blocks(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable,
    *,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
    count: int | None = None,
    target_params: float | None = None,
    target_flops: float | None = None,
    names: str | Iterable[str] = "*",
    ways: Sequence[str] = WAYS,
    evaluate: Callable[[nn.Module], float] | None = None,
    price: str = "flops",
    adapt_norms: bool = True,
    damping: float = DAMPING,
) -> BlockReport:
    r"""Removes residual branches x + F(x), or replaces them by linear maps in closed form.

    One branch goes after the other: the one, and in the way, that costs the least loss for what it
    saves. A map T is the least-squares fit of the branch's output to its input over the loader; it
    is measured like a deletion. Exactly one of `count`, `target_params` and `target_flops` says how
    many go. Model and optimizers are changed together at the end, or not at all; training then goes
    on with the same optimizers. What a branch does besides its output, as filling a cache of keys,
    is gone with it: decoders of transformers count by that of one layer, whose attention has to
    stay. They are known where the example inputs let the model put the cache out.

    Args:
        model: The model.
        example_inputs: What it can be called with: a tensor, a tuple of arguments, or a mapping of
            named ones.
        loader: Batches of inputs, of tuples or lists whose first item they are, or of mappings;
            gone through several times for each removal. A thousand samples will do.
        optimizers: One, or all, that train the model.
        count: Blocks to remove.
        target_params: Parameters at most; a number, or as a float in (0, 1) a share of those now.
        target_flops: FLOPs of a forward of the example inputs at most; likewise.
        names: Shell patterns of the blocks that may go, see `find_blocks`.
        ways: What may become of a branch: some of ``delete``, ``1x1``, ``3x3`` (convolutions with a
            bias, of images) and ``linear`` (of tokens).
        evaluate: The validation loss of a model. By default how far the outputs over the loader are
            from what they were: mean squared difference over their variance.
        price: What is saved is measured in ``flops``, ``params`` or seconds of ``latency``.
        adapt_norms: Whether the running statistics of batch norms follow.
        damping: Added to the diagonal of autocorrelations before they are inverted, relative to its
            mean.

    Returns:
        What changed.

    Raises:
        ValueError: An option is out of its range; the model has no block, or too few; the target is
            out of reach.
        TypeError: An argument is not of the type above.

    Example:
        >>> report = remove_blocks(model, images, loader, count=3)  # doctest: +SKIP
        >>> print(report)                                           # doctest: +SKIP

    Sources: Elkerdawy et al. 2020; Shopkhoev et al. 2025 (ReplaceMe: maps of transformers).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    model = unwrapped(model)
    held = checked_optimizers(optimizers, model)
    check_repeatable("loader", loader)
    check_number("damping", damping, 0)
    unknown = [way for way in ways if way not in WAYS]
    if unknown or not ways:
        raise ValueError(f"ways must be some of {' | '.join(WAYS)}, got {unknown or 'none'}")
    if price not in PRICES:
        raise ValueError(f"price must be {' | '.join(PRICES)}, got {price!r}")
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function, got {type(evaluate).__name__}")
    reached = _target(model, example_inputs, count, target_params, target_flops)
    blocks = find_blocks(model, example_inputs)
    patterns = [names] if isinstance(names, str) else list(names)
    may_go = [b for b in blocks.found if any(fnmatchcase(b.name, p) for p in patterns)]
    if not may_go:
        raise ValueError(f"no block of the model may go: {_listed(blocks)}")
    search = Search(example_inputs, loader, ways, price, adapt_norms, damping)
    shorter = Shortening(model, may_go, search, evaluate or Distortion(model, loader))
    while not reached(shorter.model, len(shorter.changes)):
        if not shorter.advance():
            raise ValueError("the target is out of reach, even with all blocks gone that may go: "
                             f"{[c.name for c in shorter.changes]}")  # fmt: skip
    whole = isolated_copy(model)  # so that nobody's hooks see the forwards
    gains = compare(*(measure(m, example_inputs, repeats=REPEATS) for m in (whole, shorter.model)))
    gone = [change.name for change in shorter.changes]
    shorter.install(model, held, len(gone), [])
    kept = [block.name for block in blocks.found if block.name not in gone]
    return BlockReport(shorter.changes, kept, blocks.refused, gains)


def _listed(blocks: Blocks) -> str:
    names = [block.name for block in blocks.found] + list(blocks.refused)
    return f"it has {', '.join(names[:5])}{', ...' * (len(names) > 5)}" if names else "it has none"


def _target(
    model: nn.Module, inputs: Any, count: Any, params: Any, flops: Any
) -> Callable[[nn.Module, int], bool]:
    """What tells whether a model, and so many blocks gone, have reached what was asked for.

    Raises:
        ValueError: None or several are given, or one is out of its range.
    """
    given = {"count": count, "target_params": params, "target_flops": flops}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError("exactly one of count, target_params, target_flops must be given, got "
                         f"{', '.join(given) or 'none'}")  # fmt: skip
    ((name, value),) = given.items()
    check_number(name, value, 0, whole=name == "count")
    if name == "count":
        return lambda _, gone: gone >= value
    if not value:
        raise ValueError(f"{name} must be above 0, got {value}")

    def size(one: nn.Module) -> int:
        return count_parameters(one) if name == "target_params" else count_flops(one, inputs)

    limit = value if value >= 1 else value * size(isolated_copy(model))
    return lambda one, _: size(one) <= limit
