"""What is remembered of each unit while a network shrinks under it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlscuda.pruning.couplings import Structure

BLOCK = "block "  # before the name of a block, among those of couplings
_KINDS = {
    "held": torch.int64, "dead": torch.bool, "gate": torch.float64, "velocity": torch.float64,
}  # fmt: skip

Entry = dict[str, Tensor]


class Ledger:
    """Steps at zero, whether it is dead, and the gate, of each unit of couplings and blocks.

    Attributes:
        entries: By coupling, or `BLOCK` and the name of a block: `held`, the steps that each unit
            has been at zero, int64 [units]; `dead`, bool; `gate` and its `velocity`, float64.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._members: dict[str, set[tuple[str, str]]] = {}

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def follow(
        self, structure: Structure, blocks: Iterable[str], removed: Mapping[str, list[int]]
    ) -> dict[str, str]:
        """Takes up the couplings and blocks of a model, which may have lost some.

        A coupling that has another name than before, since what named it is gone, is known by what
        it has in common with it.

        Args:
            structure: The couplings now.
            blocks: Names of the blocks now.
            removed: Units that couplings have lost since.

        Returns:
            New name of a coupling -> its old one, where it is another.
        """
        old = {name: _without(e, removed.get(name, ())) for name, e in self.entries.items()}
        fresh: dict[str, Entry] = {}
        members: dict[str, set[tuple[str, str]]] = {}
        renamed: dict[str, str] = {}
        for coupling in structure.couplings:
            own = {(member.name, member.kind) for member in coupling.members}
            members[coupling.name] = own
            alike = [coupling.name, *(n for n, m in self._members.items() if m & own)]
            fits = [n for n in alike if n in old and len(old[n]["held"]) == coupling.units]
            fresh[coupling.name] = old[fits[0]] if fits else _entry(coupling.units)
            if fits and fits[0] != coupling.name:
                renamed[coupling.name] = fits[0]
        for name in blocks:
            fresh[BLOCK + name] = old.get(BLOCK + name) or _entry(1)
        self.entries, self._members = fresh, members
        return renamed

    def count(self, zeros: Mapping[str, Tensor], steps: int) -> None:
        """Counts the steps of units at zero.

        Args:
            zeros: Whether each unit is at zero, bool [units], by name.
            steps: That went by.
        """
        for name, zero in zeros.items():
            entry = self.entries[name]
            entry["held"] = torch.where(zero.cpu(), entry["held"] + steps, 0)

    def ripe(self, patience: int) -> list[tuple[str, int]]:
        """The units that were at zero for so many steps and are not dead yet."""
        return [
            (name, unit)
            for name, entry in self.entries.items()
            for unit in ((entry["held"] >= patience) & ~entry["dead"]).nonzero().flatten().tolist()
        ]

    def kill(self, name: str, unit: int) -> None:
        """Declares a unit dead for good."""
        dead = self.entries[name]["dead"].clone()
        dead[unit] = True
        self.entries[name]["dead"] = dead

    def set_gate(self, name: str, value: float) -> None:
        """Sets the gate of a block; the entry becomes another one."""
        self.entries = {**self.entries}
        self.entries[name] = {**self.entries[name], "gate": torch.full((1,), value).double()}

    def state_dict(self) -> dict[str, Any]:
        """All entries; tensors are copied."""
        return {name: {k: t.clone() for k, t in e.items()} for name, e in self.entries.items()}

    def check(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raises ValueError where entries are not of the couplings and blocks that there are."""
        sizes = {name: len(entry["held"]) for name, entry in self.entries.items()}
        got = {name: len(entry["held"]) for name, entry in state.items()}
        if got != sizes:
            raise ValueError(f"the state must be of a model with the units {sizes}, got {got}")

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes up entries that were checked."""
        self.entries = {
            name: {kind: entry[kind].to("cpu", dtype, copy=True) for kind, dtype in _KINDS.items()}
            for name, entry in state.items()
        }


def _entry(units: int) -> Entry:
    entry = {kind: torch.zeros(units, dtype=dtype) for kind, dtype in _KINDS.items()}
    entry["gate"].fill_(1)
    return entry


def _without(entry: Entry, units: Iterable[int]) -> Entry:
    """An entry without some units."""
    kept = torch.ones(len(entry["held"]), dtype=torch.bool)
    kept[list(units)] = False
    return {kind: tensor[kept] for kind, tensor in entry.items()}
