"""Machine code as nvdisasm prints it: instructions, the source lines they come from, branches.

`nvdisasm -gi -c` prints a section a kernel, an instruction a line, labels in front of what is
jumped to and, wherever the source changes, the lines it comes from, the innermost first and each
with the call by which it was inlined. Modifiers of an opcode say how wide an access is
(`LDG.E.128`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

Line = tuple[str, int]  # name of a source file, number of the line

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_SOURCE = re.compile(r'\s*//## File "(.*?)", line (\d+)')
_LABEL = re.compile(r"(\S+):\s*$")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_JUMP = re.compile(r"`\((\S+?)\)")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_BITS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: Bytes from the start of the kernel.
        opcode: With its modifiers.
        operands: As printed.
        predicate: Under which it does something, or "".
        source: The lines it comes from, from the innermost to that of the kernel.
    """

    address: int
    opcode: str
    operands: str
    predicate: str = ""
    source: tuple[Line, ...] = ()

    @property
    def kind(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def loads(self) -> bool:
        """Whether it reads global memory."""
        return self.kind in ("LDG", "LD", "LDGSTS")

    @property
    def stores(self) -> bool:
        """Whether it writes global memory."""
        return self.kind in ("STG", "ST")

    @property
    def multiplies(self) -> bool:
        """Whether it is a multiply-add of floating-point numbers."""
        return self.kind in ("FFMA", "DFMA")

    @property
    def width(self) -> int:
        """Bytes that one thread reads or writes."""
        return next((_BITS[m] for m in self.opcode.split(".") if m in _BITS), 4)

    @property
    def target(self) -> str | None:
        """The label that it names, if any."""
        found = _JUMP.search(self.operands)
        return found[1] if found else None

    def written(self) -> set[int]:
        """Registers of the result of a load."""
        first = _REGISTER.match(self.operands)
        return set() if first is None else _span(int(first[1]), self.width)

    def read(self) -> set[int]:
        """Registers that it reads, some that it may not (as wide as its opcode says)."""
        operands = self.operands
        if not (self.stores or self.kind in ("STS", "ATOMG", "RED")):
            operands = operands.partition(",")[2]  # the first one is written
        wide = self.width if self.stores or self.kind == "STS" else 8 if self.kind[0] == "D" else 4
        registers: set[int] = set()
        for found in _REGISTER.finditer(operands):
            registers |= _span(int(found[1]), 8 if found[2] else wide)
        return registers


def _span(first: int, width: int) -> set[int]:
    return set(range(first, first + max(1, width // 4)))


@dataclass(eq=False)
class Function:
    """One kernel: its instructions, and the positions in them that labels stand for."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> list[Function]:
    """The kernels that `nvdisasm -gi -c` has printed.

    Raises:
        ValueError: There is none.
    """
    functions: list[Function] = []
    source: list[Line] = []
    begun = True  # whether an instruction has used `source`
    for line in text.splitlines():
        if found := _SECTION.match(line):
            functions.append(Function(found[1]))
            source, begun = [], True
        elif not functions:
            continue
        elif found := _SOURCE.match(line):
            if begun:
                source, begun = [], False
            source.append((found[1].rpartition("/")[2], int(found[2])))
        elif found := _INSTRUCTION.match(line):
            begun = True
            address, predicate, opcode, operands = found.groups()
            functions[-1].instructions.append(
                Instruction(int(address, 16), opcode, operands, predicate or "", tuple(source))
            )
        elif found := _LABEL.match(line):
            functions[-1].labels[found[1]] = len(functions[-1].instructions)
    if not functions:
        raise ValueError(f"expected a disassembly with a section .text.*, got {text[:80]!r}")
    return functions
