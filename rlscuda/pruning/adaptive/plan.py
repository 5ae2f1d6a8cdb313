"""What may go of a model, what each part costs and saves, and taking it out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import Convolution
from rlscuda.optim.kept import Change
from rlscuda.pruning.adaptive.cutting import Patient
from rlscuda.pruning.adaptive.listing import (
    BlockCandidate,
    OneList,
    Selection,
    Sizes,
    by_measure,
    inner_couplings,
    only,
)
from rlscuda.pruning.adaptive.options import Options
from rlscuda.pruning.adaptive.penalties.by_output import OutputPenalty
from rlscuda.pruning.adaptive.penalties.by_scale import ScalePenalty
from rlscuda.pruning.adaptive.penalties.ledger import BLOCK, Ledger
from rlscuda.pruning.adaptive.price import marginal
from rlscuda.pruning.adaptive.rates import exchange_rates
from rlscuda.pruning.adaptive.report import Fate
from rlscuda.pruning.blocks.finding import Blocks, find_blocks
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.choice.ranking import Candidate, rank
from rlscuda.pruning.matrices.calibration import calibrate
from rlscuda.pruning.matrices.own import of_model
from rlscuda.pruning.running.batch_norms import settle
from rlscuda.pruning.running.calls import twice
from rlscuda.pruning.running.distortion import Distortion
from rlscuda.pruning.structure.trace import trace


class Plan:
    """What may go of a model as it is, and what has gone.

    Args:
        options: Of the pruner.

    Attributes:
        penalty: What stands against the price.
        size: Of the model now, in the units of the target.
        gains: What one unit of each coupling, or a block, saves, where it is anything.
    """

    def __init__(self, options: Options):
        self.options = options
        self._ledger = Ledger()
        self.penalty: Any = (
            OutputPenalty(self._ledger, branches=options.epochs is None)
            if options.penalty == "output"
            else ScalePenalty(self._ledger, options.lr, options.momentum)
        )
        self._original: dict[str, int] = {}
        self._why: dict[str, str] = {}
        self.survey({})

    def copy(self) -> Plan:
        """Another one of the same model, which may be changed while this one stays as it is."""
        other = copy.copy(self)
        other._ledger = copy.copy(self._ledger)
        other.penalty = self.penalty.with_ledger(other._ledger)
        return other

    def survey(self, removed: Mapping[str, list[int]]) -> None:
        """Finds what may go of the model as it is now, and what that would save.

        Args:
            removed: Units that couplings have lost since it was last done.
        """
        model, inputs, ignored = (getattr(self.options, n) for n in ("model", "inputs", "ignored"))
        channels, blocks = (name in self.options.what for name in ("channels", "blocks"))
        self._structure = trace(model, inputs, ignored)
        found = find_blocks(model, inputs) if blocks else Blocks([], {})
        self._blocks = [
            block
            for block in found.found
            if not any(f"{name}.".startswith(f"{m}.") for name in ignored for m in block.modules)
        ]
        names = [block.name for block in self._blocks]
        renamed = {o: n for n, o in self._ledger.follow(self._structure, names, removed).items()}
        self._original = {renamed.get(name, name): n for name, n in self._original.items()}
        if isinstance(self.penalty, OutputPenalty):
            rates = self.penalty.rates.items()
            self.penalty.rates = {renamed.get(name, name): rate for name, rate in rates}
        for name, entry in self._ledger.entries.items():
            self._original.setdefault(name, len(entry["held"]))
        self.penalty.find(model, self._structure, channels, self._blocks, inputs)
        self._refused = {**self._structure.refused, **found.refused, **self.penalty.refused}
        self.size = self._sizes(self.options.counted).whole
        saved = self._sizes(self.options.price_by).gains(self.penalty.names)
        self.gains = {name: gain for name, gain in saved.items() if gain > 0}
        units = {coupling.name: coupling.units for coupling in self._structure.couplings}
        judged = [name for name in self.gains if name in units] or list(self.gains)
        total = sum(units.get(name, 1) for name in judged) or 1
        mean = sum(self.gains[name] * units.get(name, 1) for name in judged) / total or 1.0
        self.penalty.kappa = {name: gain / mean for name, gain in saved.items()}

    def _sizes(self, kind: str) -> Sizes:
        options = self.options
        return Sizes(options.model, self._structure, self._blocks, options.inputs, kind)

    def measure(self) -> None:
        """Measures what the penalty ``output`` is of; scales need no measuring."""
        options = self.options
        if options.penalty != "output":
            return
        if options.source != "none":
            self.penalty.measure(self._matrices())
        self.penalty.rates = {}
        if not self._blocks:
            return
        assert options.loader is not None
        loss, found = Distortion(options.model, options.loader), {}
        for block in self._blocks:
            trial = with_stand_ins(options.model, block.stand_ins)
            settle(options.model, trial, {}, twice(options.loader))
            found[BLOCK + block.name] = loss(trial)
        self.penalty.measure_blocks(found)
        self.penalty.rates = exchange_rates(
            self._structure, self._ranked(), self.penalty.matrices, loss, options.loader
        )

    def _matrices(self) -> dict[str, Tensor]:
        o = self.options
        if o.tracker is not None and o.source == "sketch":
            return o.tracker.matrices()
        if o.loader is not None and o.source == "calibration":
            return calibrate(o.model, o.loader, damping=o.damping)
        return of_model(o.model, o.optimizers, o.damping) if o.source == "own" else {}

    # -- the list ---------------------------------------------------------------------------------

    def select(self, goal: float | None, limit: float, blocks: bool = True) -> Selection:
        """What is to go now: of what is to go until the end, what the goal has room for.

        Args:
            goal: The size to come to; None takes what is dead, and nothing else.
            limit: The size in the end.
            blocks: Whether blocks are on the list.
        """
        if goal is None:
            dead = {name: self._ledger[name]["dead"] for name in self.gains}
            candidates = only(by_measure(self.penalty.measures(), self.gains), dead)
        else:
            candidates = self._candidates()
        if not blocks:
            candidates = {n: c for n, c in candidates.items() if not n.startswith(BLOCK)}
        inner = {block.name: self._inside(block) for block in self._blocks}
        sizes = self._sizes(self.options.counted)
        listed = OneList(candidates, self.gains, sizes, self.options.round_to, inner)
        if goal is None:
            return listed.everything()
        chosen = listed.cheapest(limit)
        return listed.part(chosen, goal) if goal > limit else chosen

    def least(self) -> int:
        """The size without everything that may go."""
        units = {coupling.name: coupling.units for coupling in self._structure.couplings}
        blocks = [block for block in self._blocks if BLOCK + block.name in self.gains]
        inside = {name for block in blocks for name in self._inside(block)}
        round_to = self.options.round_to
        removed = {
            name: list(range(min(round_to, units[name]), units[name]))
            for name in self.gains
            if name in units and name not in inside
        }
        names = [block.name for block in blocks]
        return self._sizes(self.options.counted).without(removed, names)

    def _candidates(self) -> dict[str, Candidate]:
        """Couplings and blocks with what each of their units costs."""
        measures = self.penalty.measures()
        if self.options.penalty == "scale":
            return by_measure(measures, self.gains)
        rates = self.penalty.rates
        found: dict[str, Candidate] = {
            name: Candidate(one.order, one.cost * rates.get(name, 1.0), one.units, one.gone)
            for name, one in self._ranked().items()
        }
        for name in self.gains:
            if name.startswith(BLOCK):
                first = torch.zeros(1, dtype=torch.int64)
                found[name] = BlockCandidate(first, measures[name].square(), 1)
        return found

    def _ranked(self) -> dict[str, Candidate]:
        """Couplings with what the layers that take their channels lose by each unit."""
        modules = dict(self.options.model.named_modules())
        ranked, _ = rank(self._structure, modules, self.penalty.matrices, "saliency", "greedy",
                         {}, 0, lambda name: None)  # fmt: skip
        return {name: one for name, one in ranked.items() if name in self.gains}

    def level(self, goal: float) -> float:
        """The least price at which what does not stand against it makes the model so small."""
        measures = self.penalty.measures().items()
        found = {n: m for n, m in measures if n in self.gains and self.penalty.is_paid_by(n)}
        if not found:
            return 0.0
        levels = torch.cat([m / self.penalty.kappa[name] for name, m in found.items()])
        gains = torch.cat([torch.full_like(m, self.gains[name]) for name, m in found.items()])
        return marginal(levels, gains, self.size - goal)

    def _inside(self, block: Any) -> list[str]:
        return inner_couplings(self._structure, block)

    # -- what is dead -----------------------------------------------------------------------------

    def count(self, zeros: Mapping[str, Tensor], steps: int, limit: float) -> None:
        """Counts steps at zero and declares units dead, no more than the target asks for.

        Args:
            zeros: Whether each unit is at zero, bool [units], by coupling and block.
            steps: That went by.
            limit: Size of the target.
        """
        self._ledger.count(zeros, steps)
        patience = self.options.patience
        for name, unit in self._ledger.ripe(patience):
            entry = self._ledger[name]
            left = len(entry["dead"]) - int(entry["dead"].sum()) - 1
            least = 0 if name.startswith(BLOCK) else min(self.options.round_to, left + 1)
            if left < least:
                around = [block for block in self._blocks if name in self._inside(block)]
                if not around or not bool((entry["held"] >= patience).all()):
                    continue
                name, unit = BLOCK + around[0].name, 0  # no channel is left in this branch
                if name not in self.gains:
                    continue
            if self._without_dead() <= limit:
                return
            self._ledger.kill(name, unit)

    def _without_dead(self) -> int:
        """The size without all that is dead."""
        dead = {n: e["dead"].nonzero().flatten().tolist() for n, e in self._ledger.entries.items()}
        blocks = [block for block in self._blocks if dead[BLOCK + block.name]]
        inside = {name for block in blocks for name in self._inside(block)}
        removed = {
            name: units
            for name, units in dead.items()
            if units and not name.startswith(BLOCK) and name not in inside
        }
        names = [block.name for block in blocks]
        return self._sizes(self.options.counted).without(removed, names)

    # -- the cut ----------------------------------------------------------------------------------

    def remove(
        self, gone: Selection, goal: float | None, limit: float, epoch: int, done: list[Change]
    ) -> None:
        """Takes out a selection; where blocks went, the channels on the list are judged anew.

        Args:
            gone: What goes.
            goal: What it was selected by.
            limit: The size in the end.
            epoch: Of the training, for the report.
            done: Is given what takes it back.
        """
        if gone.empty:
            return
        o, why = self.options, f"epoch {epoch}: " + ("at zero" if goal is None else "by price")
        patient = Patient(
            o.model, o.optimizers, o.inputs, o.loader, o.tracker, o.compensate, o.damping
        )
        removed, matrices = gone.removed, {}
        if gone.blocks:
            blocks = [block for block in self._blocks if block.name in gone.blocks]
            patient.remove_blocks(blocks, done)
            inside = {name for block in blocks for name in self._inside(block)}
            self._note({BLOCK + name: why for name in gone.blocks})
            self._note(dict.fromkeys(sorted(inside), f"epoch {epoch}: with its block"))
            self.survey({})
            self.penalty.refit()
            # without a loader, channels wait for matrices of the model without these blocks
            removed = {}
            if gone.removed and o.loader is not None:
                matrices = calibrate(o.model, o.loader, damping=o.damping)
                self.penalty.measure(matrices)
                removed = self.select(goal, limit, blocks=False).removed
        elif removed:
            matrices = self.penalty.matrices if o.penalty == "output" else self._matrices()
        if removed:
            self._note({name: f"{why}, {len(units)}" for name, units in removed.items()})
            surgery, lost = patient.remove_channels(self._structure, removed, matrices, done)
            self.penalty.follow(surgery, lost)
            self.survey(removed)
            self.penalty.refit()

    def _note(self, texts: Mapping[str, str]) -> None:
        earlier = {n: f"{self._why[n]}; " if n in self._why else "" for n in texts}
        self._why = {**self._why, **{n: earlier[n] + text for n, text in texts.items()}}

    def fates(self) -> list[Fate]:
        """What became of every coupling and block so far."""
        measures, units = self.penalty.measures(), self._ledger.entries
        layers = {
            name
            for name, module in self._structure.model.named_modules()
            if isinstance(module, (nn.Linear, Convolution))
        }
        found = []
        for name, before in sorted(self._original.items(), key=lambda i: i[0].startswith(BLOCK)):
            kind, short = "block" if name.startswith(BLOCK) else "channels", name
            if kind == "channels" and "channels" not in self.options.what:
                continue
            short = name.removeprefix(BLOCK)
            own = measures.get(name, torch.full((1,), math.nan))
            # the last unit of a layer that is still there is no coupling any more
            last = kind == "channels" and name.partition(" (")[0] in layers
            after = len(units[name]["held"]) if name in units else int(last)
            why = self._why.get(name) or self._refused.get(short, "")
            found.append(Fate(short, kind, before, after, float(own.min()), float(own.max()), why))
        return found

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is known of each unit, and what has gone."""
        return {
            "original": dict(self._original),
            "why": dict(self._why),
            "ledger": self._ledger.state_dict(),
            "penalty": self.penalty.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another plan was, of a model of the same widths and blocks.

        Raises:
            ValueError: It was of another model; nothing is changed.
        """
        self._ledger.check(state["ledger"])
        self.penalty.load_state_dict(state["penalty"])
        self._ledger.load_state_dict(state["ledger"])
        self._original, self._why = dict(state["original"]), dict(state["why"])
