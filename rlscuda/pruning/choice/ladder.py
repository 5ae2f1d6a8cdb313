"""How many units of each coupling go: from a ratio, a size or a loss to counts.

Every coupling is a *candidate* with an order in which its units would be removed, and what each
removal costs. A *ladder* climbs all candidates together, from removing nothing to removing all
that may go, and a target is a height on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

Counts = dict[str, int]  # units removed, by coupling


@dataclass(frozen=True)
class Candidate:
    """The order in which the units of one coupling are removed.

    Attributes:
        order: int64 [k], the units, first the one that is removed first.
        cost: float64 [k], what each removal costs, in units that all couplings share.
        units: Units the coupling has, k or more.
        gone: Units that earlier prunings have removed.
    """

    order: Tensor
    cost: Tensor
    units: int
    gone: int = 0

    def removable(self, ratio: float, round_to: int) -> int:
        """Units to remove so that `ratio` of the original ones is gone.

        At least one stays, and a multiple of `round_to` where there are as many.
        """
        wanted = int(ratio * (self.units + self.gone) + 1e-9) - self.gone
        return self.rounded(wanted, round_to)

    def rounded(self, removed: int, round_to: int) -> int:
        """At most `removed` units, so many that a multiple of `round_to` stays."""
        kept = self.units - max(0, min(removed, len(self.order)))
        return self.units - min(self.units, max(1, -(-kept // round_to)) * round_to)


def check_ratio(ratio: object) -> None:
    """Raises ValueError where `ratio` is not a share in [0, 1) or a mapping of names to such."""
    shares = ratio if isinstance(ratio, Mapping) else {"": ratio}
    for name, value in shares.items():
        if not isinstance(name, str):
            raise ValueError(f"ratio must be by name or shell pattern, got the key {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"ratio must be in [0, 1), got {value!r}")


def ratio_of(name: str, ratio: float | Mapping[str, float]) -> float:
    """The ratio of one coupling: its own, or that of the first shell pattern that it matches."""
    if not isinstance(ratio, Mapping):
        return float(ratio)
    return next((float(v) for pattern, v in ratio.items() if fnmatchcase(name, pattern)), 0.0)


@dataclass(frozen=True)
class Ladder:
    """Counts as a monotone function of one height in [0, 1].

    Attributes:
        candidates: By coupling.
        scope: `layer` removes the same share of every coupling; `global` takes the cheapest next
            unit of all couplings, whichever it is.
        round_to: What stays is a multiple of it, where the coupling has as many.
    """

    candidates: Mapping[str, Candidate]
    scope: str = "layer"
    round_to: int = 1

    def by_ratio(self, ratio: float | Mapping[str, float]) -> Counts:
        """The counts at a ratio of units; in scope `global`, of the units of all couplings.

        Raises:
            ValueError: A mapping in scope `global`, or one with a pattern that matches nothing.
        """
        if not isinstance(ratio, Mapping):
            return self.at(ratio)
        if self.scope == "global":
            raise ValueError("ratio must be one number in scope 'global', got a mapping")
        for pattern in ratio:
            if not any(fnmatchcase(name, pattern) for name in self.candidates):
                raise ValueError(f"ratio names {pattern!r}, which matches no coupling of "
                                 f"{sorted(self.candidates)}")  # fmt: skip
        return {
            name: candidate.removable(ratio_of(name, ratio), self.round_to)
            for name, candidate in self.candidates.items()
        }

    def at(self, height: float) -> Counts:
        """The counts when `height` of the original units are gone."""
        if self.scope == "layer":
            return {
                n: candidate.removable(height, self.round_to)
                for n, candidate in self.candidates.items()
            }
        counts = dict.fromkeys(self.candidates, 0)
        gone = sum(candidate.gone for candidate in self.candidates.values())
        wanted = int(height * (gone + sum(p.units for p in self.candidates.values())) + 1e-9) - gone
        heap = [(float(p.cost[0]), name) for name, p in self.candidates.items() if len(p.order)]
        heapq.heapify(heap)
        for _ in range(wanted):
            if not heap:
                break
            _, name = heapq.heappop(heap)
            counts[name] += 1
            candidate = self.candidates[name]
            if counts[name] < len(candidate.order):
                heapq.heappush(heap, (float(candidate.cost[counts[name]]), name))
        return {n: self.candidates[n].rounded(c, self.round_to) for n, c in counts.items()}

    def lowest(self, reached: Callable[[Counts], bool]) -> Counts:
        """The smallest cut at which `reached` holds, which must be monotone.

        Raises:
            ValueError: It does not hold even where everything that may go is gone.
        """
        if not reached(self.at(1.0)):
            raise ValueError("the target is out of reach, even with all but the last units removed")
        low, high = 0.0, 1.0
        for _ in range(self._halvings()):
            middle = (low + high) / 2
            low, high = (low, middle) if reached(self.at(middle)) else (middle, high)
        return self.at(high)

    def highest(self, allowed: Callable[[Counts], bool]) -> Counts:
        """The largest cut that is still `allowed`, found by halving; nothing where none is."""
        low, high = 0.0, 1.0
        best = dict.fromkeys(self.candidates, 0)
        for _ in range(self._halvings()):
            middle = (low + high) / 2
            counts = self.at(middle)
            if counts == best or allowed(counts):
                low, best = middle, counts
            else:
                high = middle
        return best

    def _halvings(self) -> int:
        """Halvings of the ladder after which two heights differ by less than one unit."""
        total = sum(candidate.units + candidate.gone for candidate in self.candidates.values())
        return max(1, total).bit_length() + 1
