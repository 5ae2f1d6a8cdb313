"""Arguments that nobody should pass: changes of valid ones, drawn from a seeded generator."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

REAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1.0, 1e-308, 1e38, 1e300, -1e300, 0.5, 2]
WHOLE = [
    0,
    -1,
    1,
    2,
    3,
    63,
    2**15,
    2**27,
    2**31 - 1,
    2**31,
    2**40,
    2**62,
    2**63 - 1,
    -(2**63),
    2**70,
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
          torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2, torch.uint16]  # fmt: skip
VALUES = [math.nan, math.inf, -math.inf, 1e21, -1e38, 3e38, 1e-42, 0.0]


class Hostile:
    """Draws changes of arguments.

    Args:
        seed: Of the draws.

    Attributes:
        plain: Whether nothing but the layout of tensors was changed since `start`.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.plain = True
        self._tensors: list[Tensor] = []
        self._arrays: list[np.ndarray] = []

    def start(self, arguments: list[Any]) -> None:
        """Takes note of what other arguments may share memory with."""
        self.plain = True
        flat = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
        self._tensors = [t for t in flat if isinstance(t, Tensor)]
        self._arrays = [a for a in arguments if isinstance(a, np.ndarray)]

    def changed(self, value: Any) -> Any:
        """A change of one argument."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, list):
            return self._list(value)
        self.plain = False
        if self.random.random() < 0.1:
            return self.random.choice([None, "x", [], [1], torch.ones(1)])
        if isinstance(value, bool):
            return not value
        return self.random.choice(WHOLE if isinstance(value, int) else REAL)

    def _list(self, values: list[Any]) -> Any:
        if values and self.random.random() < 0.7:
            place = self.random.randrange(len(values))
            return [self.changed(v) if i == place else v for i, v in enumerate(values)]
        self.plain = False
        ways: list[Callable[[], Any]] = [
            lambda: [], lambda: values[:-1], lambda: values + values[:1], lambda: values[::-1],
            lambda: None, lambda: values[0] if values else 1, lambda: [None, *values[1:]],
            lambda: values * 30,
        ]  # fmt: skip
        return self.random.choice(ways)()

    def _tensor(self, t: Tensor) -> Any:
        if self.random.random() < 0.4:
            return self._layout(t)
        self.plain = False
        return self.random.choice([
            self._shape, self._shape, self._storage, self._alias, self._alias, self._values,
            self._values, self._kind, self._dtype,
        ])(t)  # fmt: skip

    def _layout(self, t: Tensor) -> Tensor:
        """The same elements, in another place and order of memory."""
        way = self.random.randrange(4)
        if way == 0 and t.dim() > 1:
            a, b = self.random.sample(range(t.dim()), 2)
            return t.transpose(a, b).contiguous().transpose(a, b)
        if way == 1 and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if way == 2 and t.dim():  # a slice of something larger, at any distance
            wide = t.new_full(
                [2 * size + 1 for size in t.shape], 77 if t.dtype != torch.bool else 1
            )
            view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
            return view.copy_(t)
        memory = t.new_empty(t.numel() + 1)
        return memory[1:].view(t.shape).copy_(t)

    def _shape(self, t: Tensor) -> Tensor:
        way, dim = self.random.randrange(8), self.random.randrange(max(1, t.dim()))
        if t.dim() == 0:
            return t.reshape(self.random.choice([[1], [1, 1], [1, 1, 1, 1, 1]]))
        if way == 0:
            return t.narrow(dim, 0, self.random.randrange(t.shape[dim] + 1))
        if way == 1:
            return torch.cat([t, t], dim)
        if way == 2:
            return t.unsqueeze(dim)
        if way == 3:
            return t.flatten()
        if way == 4:
            return t.transpose(dim, -1)
        if way == 5:  # of so many elements, and of so little memory
            size = self.random.choice([2, 7, 2**20, 2**40])
            return t.narrow(dim, 0, min(1, t.shape[dim])).expand(
                [size if d == dim else s for d, s in enumerate(t.shape)]
            ) if t.shape[dim] else t  # fmt: skip
        if way == 6:  # of no elements, and a huge size
            shape = [self.random.choice([2**20, 2**31, 2**60])] * t.dim()
            shape[dim] = 0
            return t.new_empty(shape) if t.dim() < 3 else t[:0]
        return t.as_strided(t.shape, [self.random.choice([0, s, 1]) for s in t.stride()])

    def _storage(self, t: Tensor) -> Tensor:
        other = t.clone()
        size = other.untyped_storage().nbytes()
        other.untyped_storage().resize_(self.random.choice([0, size // 2, max(0, size - 1)]))
        return other

    def _alias(self, t: Tensor) -> Tensor:
        other = self.random.choice(self._tensors)
        if other.dtype == t.dtype and t.numel() <= other.numel() and self.random.random() < 0.7:
            start = self.random.randrange(other.numel() - t.numel() + 1)
            if other.is_contiguous():
                return other.view(-1)[start : start + t.numel()].view(t.shape)
        return other

    def _values(self, t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.numel() == 0:
            return t
        other = t.clone(memory_format=torch.contiguous_format)
        value = torch.tensor(self.random.choice(VALUES)).to(t.dtype)
        if self.random.random() < 0.5:
            return other.fill_(value)
        other.view(-1)[self.random.randrange(t.numel())] = value
        return other

    def _kind(self, t: Tensor) -> Any:
        return self.random.choice([
            lambda: t.to("meta"), lambda: None, lambda: 3, lambda: "x", lambda: [t],
            lambda: t.to_sparse(), lambda: t.clone().requires_grad_(t.is_floating_point()),
            lambda: torch.nn.Parameter(t, requires_grad=False), lambda: t.to_mkldnn()
            if t.dtype == torch.float32 and t.dim() else t,
        ])()  # fmt: skip

    def _dtype(self, t: Tensor) -> Tensor:
        return t.to(self.random.choice(DTYPES))

    def _array(self, a: np.ndarray) -> Any:
        self.plain = False
        other = self.random.choice(self._arrays)
        shift = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        shift[...] = a
        fixed = a.copy()
        fixed.flags.writeable = False
        wild = a.copy()
        wild.flat[: self.random.randrange(a.size + 1)] = self.random.choice(VALUES)
        ways: list[Callable[[], Any]] = [
            lambda: a.T,
            lambda: a[..., ::-1],
            lambda: a[:0],
            lambda: a[..., None],
            lambda: a.ravel(),
            lambda: np.repeat(a, 2, 0)[::2],
            lambda: np.broadcast_to(a[:1], (2**40, *a.shape[1:])),
            lambda: np.concatenate([a, a]),
            lambda: np.zeros((0, 0), a.dtype),
            lambda: a.astype(self.random.choice(["f2", ">f4", "f4", "f8"])),
            lambda: a.tolist(),
            lambda: other,
            lambda: other[:1],
            lambda: self.random.choice([shift, fixed, None, "x"]),
            lambda: wild,
            lambda: wild,
        ]
        return self.random.choice(ways)()
