"""What a piece of code asks of the processor, of memory and of other processes, counted as it runs.

On meta tensors as well as on real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rlscuda._torch import onednn_linear
from rlscuda.optim.layers import Layer
from rlscuda.optim.ranks.shards import local

COLLECTIVES = (
    "all_reduce", "broadcast", "all_to_all_single",  # which a step may call
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_to_all",
    "broadcast_object_list", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter", "send", "isend", "recv", "irecv", "barrier",
)  # fmt: skip
OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_"}  # what is in their first argument


@dataclass(frozen=True)
class Call:
    """A collective.

    Attributes:
        kind: Its function in `torch.distributed`.
        bytes: Of what it leaves on this process.
        sent: Of what this process gives to others, where they do not all get the same.
    """

    kind: str
    bytes: int
    sent: int = 0

    def wire(self, size: int) -> float:
        """Bytes that a process sends or takes, whichever are more, of a ring of `size`.

        What is broadcast goes whole from one to the next.

        Raises:
            KeyError: A step calls no such collective.
        """
        return {
            "all_reduce": 2 * self.bytes * (size - 1) / size,
            "broadcast": self.bytes,
            "all_to_all_single": max(self.bytes, self.sent),
        }[self.kind]

    def rounds(self, size: int) -> int:
        """Messages that wait for one another, in a tree of `size`; none of an all-to-all does.

        Raises:
            KeyError: A step calls no such collective.
        """
        depth = (size - 1).bit_length()
        return {"all_reduce": 2 * depth, "broadcast": depth, "all_to_all_single": 1}[self.kind]


@contextmanager
def collectives(really: bool) -> Iterator[list[Call]]:
    """The collectives that are called inside, in turn.

    Args:
        really: Whether they are to be done, too.
    """
    calls: list[Call] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    inside = False  # of one that calls another

    def noting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if not inside:
                filled = args[0] if args and isinstance(args[0], Tensor) else None
                sent = size_of(args[1]) if name == "all_to_all_single" else 0
                calls.append(Call(name, 0 if filled is None else size_of(filled), sent))
            if not really:
                return None
            before, inside = inside, True
            try:
                return originals[name](*args, **kwargs)
            finally:
                inside = before

        return call

    with mock.patch.multiple(dist, **{name: noting(name) for name in originals}):
        yield calls


@dataclass
class Work:
    """What a step asks of one process.

    Attributes:
        product: FLOP of the products with `P`.
        direction: FLOP of all other matrix products, which make the spectral direction.
        update: Bytes that the updates of `P` read and write.
        passes: Bytes that everything else reads and writes.
    """

    product: int = 0
    direction: int = 0
    update: int = 0
    passes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(sum, zip(astuple(self), astuple(other))))

    def most(self, other: Work) -> Work:
        """The larger of each."""
        return Work(*map(max, zip(astuple(self), astuple(other))))


class Counter(TorchDispatchMode):
    """Counts the work inside.

    Attributes:
        work: So far.
    """

    def __init__(self):
        super().__init__()
        self.work, self._multiplying = Work(), False

    @contextmanager
    def counting(self) -> Iterator[Counter]:
        """Counts inside, and knows which products are those with `P`."""
        multiply = Layer.multiply

        def noted(layer: Layer, *args: Any, **kwargs: Any) -> None:
            self._multiplying = True
            try:
                multiply(layer, *args, **kwargs)
            finally:
                self._multiplying = False

        with mock.patch.object(Layer, "multiply", noted), self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it comes again with what is here of each
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry or packet in PRODUCTS:
            count = PRODUCTS.get(packet) or flop_registry[packet]
            flops = count(*args, **kwargs, out_val=out)
            if self._multiplying:
                self.work.product += flops
            else:
                self.work.direction += flops
        elif not func.is_view:
            moved = _moved(func, args, kwargs, out)
            if packet is torch.ops.rlscuda.foreach_rls_update_:
                self.work.update += moved
            else:
                self.work.passes += moved
        return out


def _linear_flops(x: Tensor, weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    return 2 * x.numel() * len(weight)


def _root_flops(
    gram: list[Tensor], peak: Any, length: Any, power: Any, block: list[int], rows: Any,
    columns: list[int], coefficients: list[float], eps: float, out_val: Any = None,
) -> int:  # fmt: skip
    """FLOP of the products that make the roots, half of each where it is symmetric."""
    return sum(len(K) * _of_a_root(m, n, coefficients) for K, m, n in zip(gram, block, columns))


def _of_a_root(block: int, columns: int, coefficients: list[float]) -> int:
    products = 4 * len(coefficients) // 3 - 3
    return products * min(block, columns) ** 3 * (1 if block <= columns else 2)


def _direction_flops(
    momentum: Any, product: Any, P: list[Tensor], peak: Any, length: Any, power: Any,
    blocks: list[int], block: list[int], rows: Any, columns: list[int], coefficients: list[float],
    eps: float, out_val: Any = None,
) -> int:  # fmt: skip
    """FLOP of the products left to be made, the grams, their roots and the directions."""
    flops = 0
    for matrix, count, m, n in zip(P, blocks, block, columns):
        least = min(m, n)
        grams = least * (least + 1 if m <= n else 2 * m) * n
        each = grams + _of_a_root(m, n, coefficients) + 2 * m * n * least
        flops += count * (each + (2 * m * n * n if matrix.numel() else 0))
    return flops


PRODUCTS = {
    torch.ops.rlscuda.foreach_spectral_root_: _root_flops,
    torch.ops.rlscuda.foreach_spectral_direction_: _direction_flops,
    onednn_linear: _linear_flops,
}


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operator reads and writes."""
    name = func.overloadpacket.__name__
    if name.startswith(("empty", "new_empty")) or name == "detach":
        return 0
    given = [*zip(func._schema.arguments, args), *((None, x) for x in kwargs.values())]
    written = [x for a, x in given if a is not None and a.alias_info and a.alias_info.is_write]
    read = [x for _, x in given]
    if name in OVERWRITING or name.startswith(("new_", "zeros", "ones")):
        read = read[1:]
    known = {id(x) for x in tree_leaves([args, kwargs])}
    fresh = [x for x in tree_leaves(out) if id(x) not in known]
    return sum(size_of(x) for x in tree_leaves([read, written, fresh]) if isinstance(x, Tensor))


def size_of(tensor: Tensor) -> int:
    """Bytes of what is here of a tensor."""
    own = local(tensor)
    return own.numel() * own.element_size()


def held(tensors: Any) -> int:
    """Bytes of the tensors in nested containers, those that are there twice once."""
    return sum(size_of(x) for x in {id(x): x for x in tree_leaves(tensors)}.values()
               if isinstance(x, Tensor))  # fmt: skip
