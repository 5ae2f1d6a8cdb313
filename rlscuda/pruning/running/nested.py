"""What values are nested of: tuples, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from rlscuda._torch import tree_leaves

_TRANSPARENT = (Tensor, Number, str, bytes, type(None), torch.dtype, torch.device)  # hide no tensor


def leaves(value: Any) -> Iterator[Any]:
    """What a value is nested of, also in dataclasses and in subclasses of mappings and sequences.

    Pytrees, which torch goes by, know neither unless they are registered.
    """
    for leaf in tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            inside: Iterable[Any] = [getattr(leaf, f.name) for f in dataclasses.fields(leaf)]
        elif isinstance(leaf, Mapping):
            inside = leaf.values()
        elif isinstance(leaf, (list, tuple)):
            inside = leaf
        else:
            yield leaf
            continue
        for part in inside:
            yield from leaves(part)


def checked_outputs(output: Any) -> list[Tensor]:
    """The tensors that a model puts out, whose channels are to stay.

    The cache of keys and values of a Hugging Face language model is none of them: it goes back into
    the model, whatever its width.

    Raises:
        ValueError: There may be some where they cannot be looked for, or no gradient reaches any.
    """
    found = [leaf for leaf in leaves(output) if not _is_cache(leaf)]
    opaque = {type(leaf).__name__ for leaf in found if not isinstance(leaf, _TRANSPARENT)}
    if opaque:
        raise ValueError("the model must put out tensors in tuples, lists, mappings or dataclasses,"
                         f" got {', '.join(sorted(opaque))}")  # fmt: skip
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
    if not any(tensor.requires_grad for tensor in tensors):
        raise ValueError("the model must put out a tensor that a gradient reaches, which the "
                         f"couplings are found by, got {len(tensors)} without")  # fmt: skip
    return tensors


def _is_cache(value: Any) -> bool:
    kinds = ((kind.__module__.partition(".")[0], kind.__name__) for kind in type(value).__mro__)
    return any(library == "transformers" and name.endswith("Cache") for library, name in kinds)
