"""The last layer of a classifier, exchanged for one of other classes."""

from __future__ import annotations

import torch
from torch import nn


def replace_head(model: nn.Module, classes: int, *, seed: int | None = None) -> str:
    """Puts a new last `nn.Linear` into a classifier, in place, with PyTorch's own initial values.

    Args:
        model: The classifier; its head is the last Linear that it registers.
        classes: Outputs of the new head.
        seed: Of the initial values, which are then the same for every model of these features; the
            global random state is left as it was. Without one they come from that state.

    Returns:
        Qualified name of the head.

    Raises:
        TypeError: `model` is no module.
        ValueError: It has no Linear, is one itself, or `classes` is no positive integer.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 10))
        >>> replace_head(model, 3, seed=0), model[2].out_features
        ('2', 3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes must be an integer >= 1, got {classes!r}")
    heads = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not heads or not heads[-1][0]:
        raise ValueError("model must have a Linear inside of it as its head, got none")
    name, old = heads[-1]
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        head = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    model.set_submodule(name, head.to(old.weight.device, old.weight.dtype).train(old.training))
    return name
