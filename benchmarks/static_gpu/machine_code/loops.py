"""Loops of a kernel, and which of them is the main one.

A loop is what a backward branch closes: an edge of the control flow to a block that dominates its
origin, and all that leads there without passing that block. Collectives that the compiler has put
behind the end of a kernel jump back, too, and close none.

The main loop of a kernel, for the loads that a stream of data comes by, is the innermost loop that
reads most of it in one turn; where these loads are in no loop, it is the straight code that they
share their source lines with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from benchmarks.static_gpu.machine_code.sass import Function, Instruction


@dataclass(frozen=True)
class Loop:
    """Positions of instructions: of all of a loop, and of those in no loop inside of it."""

    head: int
    body: frozenset[int]
    own: tuple[int, ...]


@dataclass(frozen=True)
class Main:
    """The main loop, or straight code, of a stream.

    Attributes:
        instructions: Of one turn, in order, without loops inside.
        loads: Those among them that belong to the stream: loads, or multiply-adds.
        looped: Whether it is a loop.
    """

    instructions: tuple[Instruction, ...]
    loads: tuple[Instruction, ...]
    looped: bool

    @property
    def bytes(self) -> int:
        """That a thread loads in one turn."""
        return sum(i.width for i in self.loads)

    @property
    def load_width(self) -> int:
        """Bytes of a load; where widths differ, the one by which most is read."""
        return _widest_part(self.loads)

    @property
    def store_width(self) -> int | None:
        """Bytes of a store likewise; None without stores to global memory."""
        stores = [i for i in self.instructions if i.stores]
        return _widest_part(stores) if stores else None

    @property
    def in_flight(self) -> int:
        """Most bytes that a thread has asked for and not yet used."""
        return in_flight(self.instructions, self.loads, self.looped)


def _widest_part(accesses: Sequence[Instruction]) -> int:
    amount: dict[int, int] = {}
    for i in accesses:
        amount[i.width] = amount.get(i.width, 0) + i.width
    return max(amount, key=lambda width: (amount[width], width))


def in_flight(
    instructions: Sequence[Instruction], loads: Sequence[Instruction], looped: bool
) -> int:
    """Most bytes of some global loads between their issue and the first use of their registers."""
    waiting: dict[int, Instruction] = {}  # register -> the load that fills it
    asked = {i.address for i in loads}
    most = 0
    for _ in range(2 if looped else 1):
        for i in instructions:
            used = {waiting[r].address for r in i.read() if r in waiting}
            waiting = {r: load for r, load in waiting.items() if load.address not in used}
            if i.address in asked:
                waiting |= dict.fromkeys(i.written(), i)
                flying = {load.address: load.width for load in waiting.values()}
                most = max(most, sum(flying.values()))
    return most


def _conditional(i: Instruction) -> bool:
    """Whether what follows a jump can be next, too."""
    return bool(i.predicate) or not i.operands.startswith("`") or i.kind in ("CALL", "WARPSYNC")


def _successors(function: Function) -> tuple[list[int], list[list[int]]]:
    """Starts of the basic blocks, and the blocks that may follow each."""
    code, labels = function.instructions, function.labels
    ends = ("BRA", "EXIT", "RET", "BRX", "JMP", "CALL", "WARPSYNC", "BSYNC")
    leaders = {0, *(p for p in labels.values() if p < len(code))}
    leaders |= {p + 1 for p, i in enumerate(code) if i.kind in ends and p + 1 < len(code)}
    starts = sorted(leaders)
    block_at = {start: b for b, start in enumerate(starts)}
    barriers: dict[str, str] = {}  # convergence barrier -> the label where its threads meet
    edges: list[list[int]] = []
    for b, start in enumerate(starts):
        end = starts[b + 1] if b + 1 < len(starts) else len(code)
        for i in code[start:end]:
            if i.kind == "BSSY" and i.target:
                barriers[i.operands.partition(",")[0]] = i.target
        last, follows = code[end - 1], []
        goes_to = barriers.get(last.operands) if last.kind == "BSYNC" else last.target
        if last.kind in ends and goes_to in labels and labels[goes_to] < len(code):
            follows.append(block_at[labels[goes_to]])
            falls = _conditional(last) if last.kind != "BSYNC" else bool(last.predicate)
        else:
            falls = last.kind not in ("BRA", "EXIT", "RET", "BRX", "JMP") or bool(last.predicate)
        if falls and b + 1 < len(starts):
            follows.append(b + 1)
        edges.append(follows)
    return starts, edges


def _dominators(edges: Sequence[Sequence[int]]) -> list[int]:
    """Bit sets: the blocks that every way from the first block to a block passes; 0 for none."""
    order, seen, stack = [], {0}, [(0, iter(edges[0]))]
    while stack:
        block, rest = stack[-1]
        step = next((e for e in rest if e not in seen), None)
        if step is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(edges[step])))
    before: list[list[int]] = [[] for _ in edges]
    for block in seen:
        for e in edges[block]:
            before[e].append(block)
    sets = [0] * len(edges)
    everything = sum(1 << b for b in seen)
    for block in seen:
        sets[block] = everything
    sets[0] = 1
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            common = everything
            for b in before[block]:
                common &= sets[b]
            common |= 1 << block
            if common != sets[block]:
                sets[block], changed = common, True
    return sets


_known: WeakKeyDictionary[Function, list[Loop]] = WeakKeyDictionary()


def loops(function: Function) -> list[Loop]:
    """All loops, the innermost first; backward branches to one head close one loop."""
    if function not in _known:
        _known[function] = _loops(function)
    return _known[function]


def _loops(function: Function) -> list[Loop]:
    starts, edges = _successors(function)
    dominators = _dominators(edges)
    before: list[list[int]] = [[] for _ in edges]
    for block, follows in enumerate(edges):
        for e in follows:
            before[e].append(block)
    bodies: dict[int, set[int]] = {}
    for block, follows in enumerate(edges):
        for head in follows:
            if not dominators[block] >> head & 1:
                continue
            body, stack = bodies.setdefault(head, {head}), [block]
            while stack:
                b = stack.pop()
                if b not in body and dominators[b]:
                    body.add(b)
                    stack += before[b]
    ends = [*starts[1:], len(function.instructions)]
    found: list[Loop] = []
    for head, body in sorted(bodies.items(), key=lambda item: len(item[1])):
        positions = frozenset(p for b in body for p in range(starts[b], ends[b]))
        inner = [other.body for other in found if other.body < positions]
        own = positions.difference(*inner)
        found.append(Loop(starts[head], positions, tuple(sorted(own))))
    return found


def main_loop(
    function: Function,
    belongs: Callable[[Instruction], bool],
    near: Callable[[Instruction], bool | None] = lambda i: True,
    products: bool = False,
    narrow: bool = False,
) -> Main:
    """The main loop of the loads that belong to a stream.

    Args:
        function: The kernel.
        belongs: Whether a load is of the stream's line.
        near: Whether an instruction comes by the call that the stream is of; None where the
            compiler does not tell, which is then as the other loads of its loop.
        products: Whether the stream is of multiply-adds instead of loads.
        narrow: Of loops that read as much, whether the one of the narrowest loads is meant.

    Raises:
        LookupError: Nothing belongs to the stream.
    """
    code = function.instructions
    kind = {p for p, i in enumerate(code) if (i.multiplies if products else i.loads)}
    everywhere = {p for p in kind if belongs(code[p])}
    stream = {p for p in everywhere if near(code[p])}
    unknown = {p for p in everywhere if near(code[p]) is None}
    others = everywhere - stream - unknown
    if not stream:
        what = "multiply-add" if products else "load from global memory"
        raise LookupError(f"no {what} comes from that source line")

    def of_stream(positions: Iterable[int]) -> set[int]:
        known = stream.intersection(positions)
        return known | unknown.intersection(positions) if known else set()

    def weight(positions: Iterable[int]) -> int:
        return sum(code[p].width for p in positions)

    def rank(loop: Loop) -> tuple[int, int]:  # most bytes, of those by the widest loads
        own = of_stream(loop.own)
        widest = max((code[p].width for p in own), default=0)
        return weight(own), -widest if narrow else widest

    every = loops(function)
    inside = frozenset().union(*(loop.body for loop in every))
    best = max(every, key=rank, default=None)
    taken = stream - inside
    own: Iterable[int] = (p for p in range(len(code)) if p not in inside)
    if looped := best is not None and weight(taken) <= rank(best)[0]:
        own, taken = best.own, of_stream(best.own)
    if not looped or others.intersection(own):  # ways of other streams pass there, too
        own = [p for p in own if p in taken or near(code[p])]
    return Main(tuple(code[p] for p in own), tuple(code[p] for p in sorted(taken)), looped)
