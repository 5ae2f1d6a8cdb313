"""Batch norms after a cut: their statistics estimated again from batches of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.pruning._inputs import feed
from rlscuda.pruning.isolation import rng_kept

_TOO_FEW = "Expected more than 1 value per channel"  # torch, of what has no variance


@torch.no_grad()
def settle(pruned: nn.Module, loader: Iterable) -> dict[str, Tensor]:
    """Estimates the statistics of all batch norms of a pruned copy again, all batches alike.

    Batches with one value a channel, such as a last one of one sample, are left out. A norm that
    no batch reaches in training mode keeps its statistics.

    Args:
        pruned: The copy; it is left in eval mode.
        loader: Batches as `feed` takes them.

    Returns:
        Their running statistics, by buffer name.

    Raises:
        TypeError: A batch is none that `feed` takes.
        ValueError: There is no batch with several values a channel.
    """
    norms: dict[str, Any] = {
        name: module
        for name, module in pruned.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    if not norms:
        return {}
    before = {
        name: ({k: b.clone() for k, b in norm.named_buffers(recurse=False)}, norm.momentum)
        for name, norm in norms.items()
    }
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    pruned.train()
    with rng_kept(pruned):
        taken = sum(_takes_in(pruned, norms.values(), batch) for batch in loader)
    if not taken:
        raise ValueError("loader must give batch norms a batch with several values a channel, got "
                         "none")  # fmt: skip
    pruned.eval()
    for name, norm in norms.items():
        buffers, norm.momentum = before[name]
        reached = bool(norm.num_batches_tracked)
        for key in ("num_batches_tracked",) if reached else tuple(buffers):
            getattr(norm, key).copy_(buffers[key])
    return {f"{n}.{k}": b for n, m in norms.items() for k, b in m.named_buffers(recurse=False)}


def _takes_in(model: nn.Module, norms: Iterable[nn.Module], batch: Any) -> bool:
    """Feeds a model in training mode a batch; False where that has one value a channel."""
    before = [(b, b.clone()) for norm in norms for b in norm.buffers(recurse=False)]
    try:
        feed(model, batch)
    except ValueError as error:
        if _TOO_FEW not in str(error):
            raise
        for buffer, value in before:  # norms before the one that refused it have taken it in
            buffer.copy_(value)
        return False
    return True


def check_finite(statistics: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a statistic of `settle` is NaN or infinite."""
    for name, values in statistics.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"loader must give {name!r} finite values, got NaN or infinite ones")
