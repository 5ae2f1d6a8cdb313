"""The output penalty: how far layers' outputs move without a unit, the others fitted anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import own_parameters
from rlscuda.closed_form.formulas import downdate
from rlscuda.optim.kinds.modules import COVERED
from rlscuda.optim.layers import Layer
from rlscuda.pruning.adaptive.penalties.by_scale import multiply
from rlscuda.pruning.adaptive.penalties.ledger import BLOCK, Ledger
from rlscuda.pruning.adaptive.penalties.proximal import Metric, output_penalty, shrink_
from rlscuda.pruning.adaptive.penalties.scales import (
    NoScale,
    Rows,
    block_scales,
    with_random_values,
)
from rlscuda.pruning.blocks.finding import Block
from rlscuda.pruning.choice.ranking import layer_energy
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.matrices.calibration import Matrices
from rlscuda.pruning.matrices.layers import layer_of, layer_weight
from rlscuda.pruning.running.calls import ExampleInputs, rng_kept
from rlscuda.pruning.surgery.plan import Surgery

Part = tuple[str, int, Tensor]  # name of a layer, number of its group, columns of each unit


class OutputPenalty:
    r"""The penalty :math:`\rho \sum \kappa \Omega` of channels and blocks.

    Of a channel :math:`\Omega` is `output_penalty`, over the root of the layers' output energy; of
    a block the root mean square change of the network's output without it, over the output's
    standard deviation.

    Args:
        ledger: Of the units.
        branches: Whether blocks pay, too.

    Attributes:
        kappa: What removing a unit saves, in units of the mean, by coupling and block.
        rates: Squared penalty at the network's output over that of its layers, by coupling; 1 where
            it is not measured.
        losses: The square of the penalty of each block with its gate at one.
        matrices: Inverse autocorrelation matrices of the layers that take channels, by name.
        refused: Couplings and blocks that have no penalty, and why.
    """

    def __init__(self, ledger: Ledger, branches: bool = True):
        self._ledger, self._branches = ledger, branches
        self.kappa: dict[str, float] = {}
        self.rates: dict[str, float] = {}
        self.losses: dict[str, float] = {}
        self.matrices: Matrices = {}
        self.energies: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self._parts: dict[str, list[Part]] = {}
        self._gates: dict[str, list[Rows]] = {}

    def find(
        self,
        model: nn.Module,
        structure: Structure,
        channels: bool,
        blocks: Sequence[Block],
        inputs: ExampleInputs,
    ) -> None:
        """Finds the layers that take the channels of a model, and the gates of its blocks."""
        self._model, self._structure = model, structure
        self._couplings = structure.couplings if channels else []
        self._blocks = [BLOCK + block.name for block in blocks]
        self.losses = {name: loss for name, loss in self.losses.items() if name in self._blocks}
        self._gates, self.refused, self._parts = {}, {}, {}
        with rng_kept(model):
            random = with_random_values(model) if blocks else model
            for block in blocks:
                try:
                    scales = block_scales(model, block, inputs, random)
                    self._gates[BLOCK + block.name] = scales.rows
                except NoScale as error:
                    self.refused[block.name] = f"not shrunk: {error}"

    @property
    def names(self) -> list[str]:
        """Couplings and blocks that can go."""
        return [c.name for c in self._couplings] + self._blocks

    def is_paid_by(self, name: str) -> bool:
        """Whether a coupling, or a block, pays the price."""
        return self._branches or not name.startswith(BLOCK)

    @property
    def ready(self) -> bool:
        """Whether anything was measured."""
        return bool(self._parts or self.losses)

    def with_ledger(self, ledger: Ledger) -> OutputPenalty:
        """The same with another ledger; what changes of one does not change of the other."""
        other = copy.copy(self)
        other._ledger = ledger
        return other

    def follow(self, surgery: Surgery, lost: Mapping[str, Tensor]) -> None:
        """Downdates the matrices of layers that have lost columns."""
        self.matrices = {
            name: torch.stack([downdate(p, lost[name].to(p.device)) for p in P])
            if name in lost else P
            for name, P in self.matrices.items()
        }  # fmt: skip

    def measure_blocks(self, losses: Mapping[str, float]) -> None:
        """Takes what the network's output loses without each block, as it is now."""
        self.losses = {name: max(0.0, loss) for name, loss in losses.items()}
        for name in self.losses:
            if bool(self._ledger[name]["gate"] > 0):
                self._ledger.set_gate(name, 1.0)

    def measure(self, matrices: Matrices) -> None:
        """Takes matrices of the layers as they are now, copies of them."""
        takers = {m.name for c in self._couplings for m in c.members if m.kind == "in"}
        self.matrices = {n: P.double().clone() for n, P in matrices.items() if n in takers}
        self.refit()

    def refit(self) -> None:
        """Measures the energies of the layers as they are, with the matrices that there are."""
        modules: dict[str, Any] = dict(self._model.named_modules())
        self.matrices = {n: P for n, P in self.matrices.items() if _is_plain(modules.get(n))}
        self.energies = {
            name: layer_energy(modules[name], P)[0] for name, P in self.matrices.items()
        }
        self._fit()

    def _fit(self) -> None:
        """Lists, for each coupling of which every layer that takes it has a matrix, these."""
        modules: dict[str, Any] = dict(self._model.named_modules())
        holders: dict[int, int] = {}
        for module in modules.values():
            for parameter in own_parameters(module).values():
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        self._parts = {}
        for coupling in self._couplings:
            takers = [member for member in coupling.members if member.kind == "in"]
            known = [
                m for m in takers
                if m.name in self.matrices and _is_plain(modules[m.name])
                and holders[id(modules[m.name].weight)] == 1
            ]  # fmt: skip
            if not known or len(known) < len(takers):
                self.refused[coupling.name] = "a layer that takes its channels has no matrix"
                continue
            self.refused.pop(coupling.name, None)
            self._parts[coupling.name] = [
                (m.name, group, m.columns(modules[m.name]))
                for m in known
                for group in range(len(self.matrices[m.name]))
            ]

    @torch.no_grad()
    def sweep(self, rho: float) -> dict[str, Tensor]:
        """The proximal step of all units, one after the other; dead ones stay out of it.

        Args:
            rho: The price.

        Returns:
            Whether each unit is at zero, bool [units], by coupling and block.
        """
        metrics = self._metrics()
        zeros: dict[str, Tensor] = {}
        for name, parts in self._parts.items():
            dead = self._ledger[name]["dead"]
            zeros[name] = dead.clone()
            for unit in (~dead).nonzero().flatten().tolist():
                own = [(metrics[layer, g], columns[unit]) for layer, g, columns in parts]
                left = shrink_(own, rho * self.kappa[name] / self._rate(name))
                zeros[name][unit] = left == 0
        self._write(metrics)
        for name, rows in self._gates.items() if self._branches else ():
            gate = self._ledger[name]["gate"]
            omega = float(gate) * self.losses.get(name, 0.0) ** 0.5
            if name in self.losses and omega > 0:
                share = max(0.0, 1 - rho * self.kappa[name] / omega)
                multiply(self._model, rows, torch.full_like(gate, share))
                gate.mul_(share)
            zeros[name] = gate == 0
        return zeros

    def _rate(self, name: str) -> float:
        return self.rates.get(name, 1.0) ** 0.5

    def _metrics(self) -> dict[tuple[str, int], Metric]:
        """Of each group of each layer, without the columns of units that are dead."""
        modules: dict[str, Any] = dict(self._model.named_modules())
        found: dict[tuple[str, int], Metric] = {}
        for name, P in self.matrices.items():
            weight = 1 / self.energies[name] if self.energies[name] > 0 else 0.0
            for group, (p, w) in enumerate(zip(P, layer_weight(modules[name], P))):
                found[name, group] = Metric(p, w, weight)
        for name, parts in self._parts.items():
            dead = self._ledger[name]["dead"]
            for layer, group, columns in parts if bool(dead.any()) else ():
                metric = found[layer, group]
                metric.W[:, columns[dead].flatten()] = 0
                metric.leave_out(columns[dead].flatten().to(metric.P.device))
        return found

    def _write(self, metrics: Mapping[tuple[str, int], Metric]) -> None:
        modules: dict[str, Any] = dict(self._model.named_modules())
        used = {layer for parts in self._parts.values() for layer, _, _ in parts}
        for name in sorted(used):
            module, groups = modules[name], len(self.matrices[name])
            W = torch.cat([metrics[name, group].W for group in range(groups)])
            inputs = module.weight[0].numel()
            module.weight.copy_(W[:, :inputs].reshape(module.weight.shape))
            if W.shape[1] > inputs:
                module.bias.copy_(W[:, inputs])

    @torch.no_grad()
    def hold(self) -> None:
        """Keeps the columns of dead units, and branches whose gate is zero, at zero."""
        modules: dict[str, Any] = dict(self._model.named_modules())
        for name, parts in self._parts.items():
            dead = self._ledger[name]["dead"]
            for layer, group, columns in parts if bool(dead.any()) else ():
                weight = modules[layer].weight
                size = len(weight) // len(self.matrices[layer])
                rows = weight[group * size : (group + 1) * size]
                kept = rows.flatten(1).clone()
                kept[:, columns[dead].flatten()] = 0
                rows.copy_(kept.view_as(rows))
        for name, rows_of in self._gates.items():
            if bool(self._ledger[name]["gate"] == 0):
                multiply(self._model, rows_of, torch.zeros(1, dtype=torch.float64))

    @torch.no_grad()
    def measures(self) -> dict[str, Tensor]:
        """The penalty of each unit now, float64 [units], by coupling and block."""
        metrics = self._metrics()
        found = {}
        for name, parts in self._parts.items():
            alive = ~self._ledger[name]["dead"]
            found[name] = torch.zeros(len(alive), dtype=torch.float64)
            if bool(alive.any()):
                own = [(metrics[layer, g], columns[alive]) for layer, g, columns in parts]
                found[name][alive] = output_penalty(own).cpu() * self._rate(name)
        for name, loss in self.losses.items():
            found[name] = self._ledger[name]["gate"] * loss**0.5
        return found

    def state_dict(self) -> dict[str, Any]:
        """The matrices, and what was measured with them."""
        return {
            "matrices": {name: P.clone() for name, P in self.matrices.items()},
            "energies": dict(self.energies),
            "losses": dict(self.losses),
            "rates": dict(self.rates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes matrices up.

        Raises:
            ValueError: They are not of the model's layers.
        """
        modules: dict[str, Any] = dict(self._model.named_modules())
        for name, P in state["matrices"].items():
            weight = getattr(modules.get(name), "weight", None)
            n = weight[0].numel() if isinstance(weight, Tensor) else -1
            if P.shape[-1] not in (n, n + 1):
                raise ValueError(f"the matrix of {name!r} must be of a layer with {n} columns, got "
                                 f"{list(P.shape)}")  # fmt: skip
        self.matrices = {
            name: P.to(modules[name].weight.device, copy=True)
            for name, P in state["matrices"].items()
        }
        self.energies, self.losses = dict(state["energies"]), dict(state["losses"])
        self.rates = dict(state.get("rates", {}))
        self._fit()


def _is_plain(module: Any) -> bool:
    """Whether a module's weight, flattened, is what multiplies the rows of its input."""
    return isinstance(module, COVERED) and type(layer_of(module)) is Layer
