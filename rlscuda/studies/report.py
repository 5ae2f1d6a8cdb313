"""The result of a study of pre-training: its figures, as a table and as plain data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlscuda.studies.metrics import auc, paired, prunability
from rlscuda.studies.protocol import FAIRNESS, Protocol

ARMS = ("pretrained", "scratch")
UNTRAINED = 0.05  # above chance: an arm below it has not learned the task
HEADS = ("rule", "a(0) %", "ρ", "G", "AUC", "ΔAUC")  # of both arms, pre-trained first


@dataclass(frozen=True)
class Row:
    """The two arms under one rule; accuracies in [0, 1], means over the pairs.

    Attributes:
        fairness: What ended the trainings.
        rule: What decided who went.
        recovery: Epochs trained on.
        pairs: Seeds of which both arms have learned the task.
        whole: Accuracies before pruning, of both arms.
        prunability: Largest ratios within the tolerance.
        gain: Their paired difference G, and its standard error.
        area: Areas under the curves.
        area_gain: Their paired difference, and its standard error.
    """

    fairness: str
    rule: str
    recovery: int
    pairs: int
    whole: tuple[float, float]
    prunability: tuple[float, float]
    gain: tuple[float, float | None]
    area: tuple[float, float]
    area_gain: tuple[float, float | None]


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        protocol: What was varied.
        classes: Of the target.
        arms: A record an arm, seed and fairness, as the journal has them.
    """

    protocol: Protocol
    classes: int
    arms: list[dict[str, Any]]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Arms that diverged, or are five points above chance or less; in no average."""
        least = 1 / self.classes + UNTRAINED
        return [arm for arm in self.arms if arm["test"] <= least or not arm["curves"]]

    def pairs(self, fairness: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Both arms of each seed, where both have learned the task.

        Args:
            fairness: How their trainings ended, one of the protocol's.

        Returns:
            The records of the pre-trained arm and of the one from scratch, seed by seed.
        """
        failed = {(a["seed"], a["fairness"]) for a in self.failed}
        found = {(a["seed"], a["fairness"], a["arm"]): a for a in self.arms}
        return [
            (found[seed, fairness, ARMS[0]], found[seed, fairness, ARMS[1]])
            for seed in self.protocol.seeds
            if (seed, fairness) not in failed
        ]

    @property
    def rows(self) -> list[Row]:
        """The table's rows, without those of which no pair has learned the task."""
        return [
            self._row(fairness, rule, recovery)
            for fairness in FAIRNESS
            if fairness in self.protocol.fairness and self.pairs(fairness)
            for rule in self.protocol.rules
            for recovery in self.protocol.recovery
        ]

    def _row(self, fairness: str, rule: str, recovery: int) -> Row:
        pairs, ratios = self.pairs(fairness), self.protocol.ratios
        curves = [[curve_of(arm, rule, recovery) for arm in pair] for pair in pairs]
        reached = [[prunability(ratios, c, self.protocol.tolerance) for c in p] for p in curves]
        areas = [[auc(ratios, c) for c in p] for p in curves]
        whole = [[arm["test"] for arm in pair] for pair in pairs]
        return Row(
            fairness, rule, recovery, len(pairs), _means(whole), _means(reached),
            paired(*zip(*reached)), _means(areas), paired(*zip(*areas)),
        )  # fmt: skip

    def source_rows(self) -> list[tuple[str, str, str, float]]:
        """Mean area of compensated pruning without data: fairness, arm, source of P, area."""
        found: list[tuple[str, str, str, float]] = []
        for fairness in FAIRNESS:
            pairs = self.pairs(fairness) if fairness in self.protocol.fairness else []
            for place, arm in enumerate(ARMS):
                own = [pair[place]["sources"] for pair in pairs]
                for name in own[0] if own else ():
                    areas = [auc(self.protocol.ratios, sources[name]) for sources in own]
                    found.append((fairness, arm, name, statistics.fmean(areas)))
        return found

    def redundancy(self, fairness: str) -> dict[str, tuple[float, float]]:
        """Mean redundancy of the inputs of each layer, of both arms."""
        pairs = self.pairs(fairness)
        names = pairs[0][0]["redundancy"] if pairs else ()
        return {n: _means([[arm["redundancy"][n] for arm in p] for p in pairs]) for n in names}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "protocol": self.protocol.to_dict(),
            "classes": self.classes,
            "rows": [vars(row) for row in self.rows],
            "sources": [list(row) for row in self.source_rows()],
            "redundancy": {f: self.redundancy(f) for f in self.protocol.fairness},
            "failed": [list(_job(arm)) for arm in self.failed],
            "arms": self.arms,
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Study:
        """The study that `to_dict` gave."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in document["protocol"].items()
        }
        return cls(Protocol(**fields), document["classes"], document["arms"])

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """A title and the cells below `HEADS` for each end of the trainings; accuracies in %."""
        found: dict[str, list[list[str]]] = {}
        for row in self.rows:
            pairs = f"{row.pairs} pair{'s' if row.pairs > 1 else ''}"
            found.setdefault(f"ended by {row.fairness}, {pairs}: pre-trained / scratch", []).append(
                [
                    row.rule + (f", {row.recovery} epochs on" if row.recovery else ""),
                    " / ".join(f"{100 * a:.1f}" for a in row.whole),
                    " / ".join(f"{r:.2f}" for r in row.prunability), signed(row.gain, 2),
                    " / ".join(f"{a:.3f}" for a in row.area), signed(row.area_gain, 3),
                ]
            )  # fmt: skip
        return list(found.items())

    def failures(self) -> list[str]:
        """A line for each arm that has not learned the task, and for each that is alone thereby."""
        lines, failed = [], self.failed
        for arm in failed:
            lines.append(f"not learned, and in no average: {_named(arm)}")
            (other,) = (a for a in self.arms if _job(a)[:2] == _job(arm)[:2] and a is not arm)
            if other not in failed:
                lines.append(f"alone, and in no average: {_named(other)}; {self._own(other)}")
        return lines

    def _own(self, arm: dict[str, Any]) -> str:
        """What the curves of one arm say."""
        ratios, tolerance = self.protocol.ratios, self.protocol.tolerance
        return ", ".join(
            f"{c['rule']} ρ {prunability(ratios, c['accuracy'], tolerance):.2f}, AUC "
            f"{auc(ratios, c['accuracy']):.3f}"
            for c in arm["curves"]
        )

    def markdown(self) -> str:
        """The tables: the arms by rule, the sources of P, the redundancy of each layer."""
        parts = [f"{title}\n\n{_table(HEADS, rows)}" for title, rows in self.tables()]
        if sources := self.source_rows():
            cells = [[f, arm, name, f"{area:.3f}"] for f, arm, name, area in sources]
            parts.append(_table(("ended by", "arm", "P of", "AUC without data"), cells))
        for fairness in self.protocol.fairness:
            found = self.redundancy(fairness)
            cells = [[name, *(f"{r:.3f}" for r in pair)] for name, pair in found.items()]
            if cells:
                parts.append(_table((f"R² of inputs ({fairness})", *ARMS), cells))
        return "\n".join([*parts, *(f"- {line}\n" for line in self.failures())])


def curve_of(arm: dict[str, Any], rule: str, recovery: int) -> list[float]:
    """The accuracies of an arm along the ladder."""
    return next(
        curve["accuracy"]
        for curve in arm["curves"]
        if (curve["rule"], curve["recovery"]) == (rule, recovery)
    )


def _job(arm: dict[str, Any]) -> tuple[int, str, str]:
    return arm["seed"], arm["fairness"], arm["arm"]


def _named(arm: dict[str, Any]) -> str:
    seed, fairness, name = _job(arm)
    return f"{name} of seed {seed} by {fairness}, {100 * arm['test']:.1f} %"


def signed(difference: tuple[float, float | None], digits: int) -> str:
    """A difference, and its standard error where there is one."""
    mean, error = difference
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{mean:+.{digits}f}{spread}"


def _means(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    first, second = zip(*pairs)
    return statistics.fmean(first), statistics.fmean(second)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
