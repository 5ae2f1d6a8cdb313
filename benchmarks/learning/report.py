"""Tables and plot of the learning benchmark's results."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.learning.optimizers import ROWS
from benchmarks.learning.tasks import TASKS, Objective

OURS, BASELINE = "rls", "adamw"
PEERS = [name for name, row in ROWS.items() if row.is_peer]
VERDICTS = ("ahead", "within", "behind")


@dataclass(frozen=True)
class Cell:
    """The test metric of the seeds of one row on one task; nan where a run diverged."""

    objective: Objective
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds that did not diverge."""
        known = [value for value in self.values if not math.isnan(value)]
        return statistics.stdev(known) if len(known) > 1 else 0.0

    @property
    def merit(self) -> float:
        """The mean with the sign of the metric: the higher the better."""
        return -math.inf if math.isnan(self.mean) else self.objective.sign * self.mean

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return f"{sum(map(math.isnan, self.values))} of {len(self.values)} diverged"
        if self.objective.higher_is_better:
            return f"{self.mean:.1f} ± {self.spread:.1f}"
        decimals = max(0, 3 - math.floor(math.log10(self.mean)))
        return f"{self.mean:.{decimals}f} ± {self.spread:.{decimals}f}"

    def against(self, other: Cell) -> str:
        """`ahead`, `behind`, or `within` one standard deviation (root mean square of the two)."""
        lead = self.merit - other.merit
        limit = math.sqrt((self.spread**2 + other.spread**2) / 2)
        if not math.isfinite(lead):
            return "ahead" if lead > 0 else "behind"
        return "within" if abs(lead) <= limit else "ahead" if lead > 0 else "behind"


class Results:
    """The runs of a results file, by phase, task and row.

    Raises:
        ValueError: Seeds of one row on one task have different settings, as after a tuning anew.
    """

    def __init__(self, runs: Iterable[dict]):
        self._groups: dict[tuple[str, str, str], list[dict]] = {}
        for run in runs:
            key = run["phase"], run["task"], run["optimizer"]
            self._groups.setdefault(key, []).append(run)
        for (phase, task, row), group in self._groups.items():
            if phase in ("steps", "time") and any(
                run["settings"] != group[0]["settings"] for run in group
            ):
                raise ValueError(f"runs of {row} on {task} have several settings: --forget {row}")
        self.phases, tasks, rows = (set(names) for names in zip(*self._groups))
        self.tasks = [name for name in TASKS if name in tasks]
        self.rows = [name for name in ROWS if name in rows]
        self.peers = [name for name in self.rows if name in PEERS]

    def runs(self, phase: str, task: str, row: str) -> list[dict]:
        """Of one row on one task, or none."""
        return self._groups.get((phase, task, row), [])

    def cell(self, phase: str, task: str, row: str) -> Cell | None:
        """The test metric; at equal time the default's is that at equal steps."""
        own = phase == "time" and ROWS[row].is_default
        return _cell(self.runs("steps" if own else phase, task, row))

    def ratio(self, task: str, row: str) -> float | None:
        """The time of a step over that with fused AdamW."""
        runs = self.runs("pace", task, row)
        return runs[-1]["ratio"] if runs else None

    def milliseconds(self, task: str, row: str) -> float | None:
        """The time of a step, by the baseline's."""
        baseline, ratio = self.runs("pace", task, BASELINE), self.ratio(task, row)
        return baseline[-1]["ms"] * ratio if baseline and ratio else None


def _cell(runs: list[dict]) -> Cell | None:
    values = tuple(math.nan if run["diverged"] else run["test"] for run in runs)
    return Cell(TASKS[runs[0]["task"]].objective, values) if runs else None


def report(results: Path) -> str:
    """The markdown tables of a results file."""
    found = Results(json.loads(results.read_text(encoding="utf-8"))["runs"])
    sections = {
        "steps": [
            ("Test metric at equal steps, mean ± standard deviation over the seeds", _metrics),
            ("Chosen rates (* the best lies at the edge)", _table(_rate)),
        ],
        "time": [
            ("The same at equal time, peers in as many steps as the default's allows", _metrics)
        ],
        "pace": [("Time of a training step over fused AdamW's", _table(_pace))],
        "flat": [("The default at a third and at three times its rate", _flatness)],
    }
    return "\n\n".join(
        f"{title}:\n\n{write(found, phase).rstrip()}"
        for phase, parts in sections.items()
        if phase in found.phases
        for title, write in parts
    )


def _table(text: Callable[[Results, str, str], str]) -> Callable[[Results, str], str]:
    """What writes a table of tasks by rows, whose cells are `text`."""

    def write(found: Results, phase: str) -> str:
        rows = found.rows
        body = [[_title(task), *(text(found, task, row) for row in rows)] for task in found.tasks]
        return markdown([["task", *(ROWS[row].title for row in rows)], *body])

    return write


def _metrics(found: Results, phase: str) -> str:
    """Metrics with the best in bold, our verdict against the best peer, and the tally."""
    lines = [["task", *(ROWS[row].title for row in found.rows), "default against the best peer"]]
    tally: dict[str, list[str]] = {peer: [] for peer in ("the best peer", *found.peers)}
    for task in found.tasks:
        cells = {row: found.cell(phase, task, row) for row in found.rows}
        known = {row: cell for row, cell in cells.items() if cell}
        best = max(known, key=lambda row: known[row].merit, default=None)
        texts = [f"**{c}**" if row == best else str(c or "") for row, c in cells.items()]
        peers, ours = [row for row in found.peers if row in known], known.get(OURS)
        verdict = ""
        if ours and peers:
            rival = max(peers, key=lambda row: known[row].merit)
            for peer, row in (("the best peer", rival), *((row, row) for row in peers)):
                tally[peer].append(ours.against(known[row]))
            verdict = f"{tally['the best peer'][-1]} ({ROWS[rival].title})"
        lines.append([_title(task), *texts, verdict])
    counts = [f"{_tally_title(peer)} {_tally(said)}" for peer, said in tally.items() if said]
    if not counts:
        return markdown(lines)
    order = "ahead of / within one standard deviation of / behind"
    return markdown(lines) + f"\nThe default is {order}: {'; '.join(counts)}.\n"


def _tally_title(peer: str) -> str:
    return ROWS[peer].title if peer in ROWS else peer


def _tally(said: list[str]) -> str:
    return " / ".join(str(said.count(verdict)) for verdict in VERDICTS)


def _rate(found: Results, task: str, row: str) -> str:
    runs = found.runs("steps", task, row)
    tried = [run["settings"]["lr"] for run in found.runs("tune", task, row)]
    if not runs:
        return ""
    rate = runs[0]["settings"].get("lr")
    edge = "*" if tried and rate in (min(tried), max(tried)) else ""
    decay = runs[0]["settings"].get("weight_decay")
    more = "" if decay is None else f", decay {decay:g}"
    return "default" if rate is None else f"{rate:g}{edge}{more}"


def _pace(found: Results, task: str, row: str) -> str:
    ratio = found.ratio(task, row)
    return "" if ratio is None else f"{ratio:.2f}"


def _flatness(found: Results, phase: str) -> str:
    """The metric at both rates, and the share of the lead over the baseline that is left."""
    header = ["task", "÷ 3", ROWS[OURS].title, "× 3", ROWS[BASELINE].title, "lead kept ÷ 3", "× 3"]
    lines = [header]
    for task in found.tasks:
        runs = found.runs(phase, task, OURS)
        rates = sorted({run["settings"]["lr"] for run in runs})
        ours, theirs = (found.cell("steps", task, row) for row in (OURS, BASELINE))
        if len(rates) == 2 and ours and theirs:
            low, high = (_cell([r for r in runs if r["settings"]["lr"] == lr]) for lr in rates)
            kept = [_share(cell, ours, theirs) for cell in (low, high)]
            lines.append([_title(task), *map(str, (low, ours, high, theirs)), *kept])
    return markdown(lines)


def _share(cell: Cell, ours: Cell, theirs: Cell) -> str:
    lead = ours.merit - theirs.merit
    return f"{(cell.merit - theirs.merit) / lead:.0%}" if lead > 0 else "no lead"


def _title(task: str) -> str:
    return f"{TASKS[task].title}, {TASKS[task].objective.metric}"


def markdown(rows: list[list[str]]) -> str:
    """A GitHub table; the first row is its header, figures are set right."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (rows[0], rule, *rows[1:]))


def plot(results: Path, path: Path) -> None:
    """Draw the validation metric against seconds, one panel a task, the mean of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = Results(json.loads(results.read_text(encoding="utf-8"))["runs"])
    figure, axes = pyplot.subplots(2, 5, figsize=(22, 8))
    for axis, task in zip(axes.flat, found.tasks):
        for color, row in enumerate(ROWS):
            runs = [r for r in found.runs("steps", task, row) if not r["diverged"]]
            ms = found.milliseconds(task, row)
            if runs and ms:
                curves = [[*r["curve"], (r["steps"], r["validation"])] for r in runs]
                x = [step * ms / 1000 for step, _ in curves[0]]
                y = [statistics.fmean(value for _, value in points) for points in zip(*curves)]
                axis.plot(x, y, "o-", ms=3, color=f"C{color}", label=ROWS[row].title)
        axis.set(title=_title(task), xlabel="seconds")
        if not TASKS[task].objective.higher_is_better:
            axis.set_yscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][0].legend(handles, labels, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
