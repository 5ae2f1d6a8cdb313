"""The penalty of scales: their own accelerated proximal steps, in place of an optimizer's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlscuda.pruning.adaptive.penalties.ledger import BLOCK, Entry, Ledger
from rlscuda.pruning.adaptive.penalties.proximal import proximal_step_
from rlscuda.pruning.adaptive.penalties.scales import (
    NoScale,
    Rows,
    Scales,
    block_scales,
    channel_scales,
    with_random_values,
)
from rlscuda.pruning.blocks.finding import Block
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.matrices.calibration import Matrices
from rlscuda.pruning.running.calls import ExampleInputs, rng_kept
from rlscuda.pruning.surgery.plan import Surgery


class ScalePenalty:
    r"""The penalty :math:`\rho \sum \kappa |s|` of the scales of channels and blocks.

    Attributes:
        scales: Of each coupling and block that has some.
        refused: Those that have none, and why.
        kappa: What removing a unit saves, in units of the mean, by coupling and block.
        velocities: Of the weights of norms, by name.
    """

    def __init__(self, ledger: Ledger, lr: float, momentum: float):
        self._ledger, self._lr, self._momentum = ledger, lr, momentum
        self.scales: dict[str, Scales] = {}
        self.refused: dict[str, str] = {}
        self.kappa: dict[str, float] = {}
        self.velocities: dict[str, Tensor] = {}

    def find(
        self,
        model: nn.Module,
        structure: Structure,
        channels: bool,
        blocks: Sequence[Block],
        inputs: ExampleInputs,
    ) -> None:
        """Finds the scales of a model; those of norms that it has no more are forgotten."""
        self._model, self.scales, self.refused = model, {}, {}
        with rng_kept(model):
            random = with_random_values(model)
            for coupling in structure.couplings if channels else ():
                try:
                    found = channel_scales(structure, coupling, inputs, random)
                    self.scales[coupling.name] = found
                except NoScale as error:
                    self.refused[coupling.name] = str(error)
            for block in blocks:
                try:
                    self.scales[BLOCK + block.name] = block_scales(model, block, inputs, random)
                except NoScale as error:
                    self.refused[block.name] = str(error)
        names = {one.name for own in self.scales.values() if not own.gated for one in own.rows}
        self.velocities = {
            name: self.velocities[name] if name in self.velocities else
            torch.zeros_like(model.get_parameter(name), requires_grad=False)
            for name in sorted(names)
        }  # fmt: skip

    @property
    def names(self) -> list[str]:
        """Couplings and blocks that can go."""
        return list(self.scales)

    def with_ledger(self, ledger: Ledger) -> ScalePenalty:
        """The same with another ledger; what changes of one does not change of the other."""
        other = copy.copy(self)
        other._ledger = ledger
        return other

    def follow(self, surgery: Surgery, lost: Mapping[str, Tensor]) -> None:
        """Cuts the velocities as a surgery has cut the weights."""
        kept = surgery.tensors
        self.velocities = {
            name: kept[name].take(v) if name in kept else v for name, v in self.velocities.items()
        }

    def measure(self, matrices: Matrices) -> None:
        """Does nothing: scales need no matrices."""

    def refit(self) -> None:
        """Does nothing."""

    def is_paid_by(self, name: str) -> bool:
        """Whether a coupling, or a block, pays the price: each does."""
        return True

    @torch.no_grad()
    def after_backward(self, rho: float, share: float) -> None:
        """Takes the step of every scale; the norms' weights are left without a gradient.

        Nothing moves where a gradient is not finite.

        Args:
            rho: The price.
            share: What the schedule of step sizes has left of the first.
        """
        lr = self._lr * share
        weights = {name: self._model.get_parameter(name) for name in self.velocities}
        gates = {
            name: self._gate_gradient(own.rows, self._ledger[name]["gate"])
            for name, own in self.scales.items()
            if own.gated
        }
        gradients = [w.grad for w in weights.values() if w.grad is not None] + list(gates.values())
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            for name, gradient in gates.items():
                threshold = lr * rho * self.kappa[name]
                self._step_gate(self.scales[name].rows, self._ledger[name], gradient, lr, threshold)
            thresholds = self._thresholds(lr * rho)
            for name, weight in weights.items():
                if weight.grad is not None:
                    proximal_step_(weight, self.velocities[name], weight.grad, lr, self._momentum,
                                   thresholds[name])  # fmt: skip
        for weight in weights.values():
            weight.grad = None
        self.hold()

    def _thresholds(self, price: float) -> dict[str, Tensor]:
        """What the proximal map takes from each weight of a norm, 0 where it is no unit's."""
        found = {name: torch.zeros_like(v) for name, v in self.velocities.items()}
        for name, own in self.scales.items():
            for one in () if own.gated else own.rows:
                found[one.name][one.index.flatten()] = price * self.kappa[name]
        return found

    def _gate_gradient(self, rows: Sequence[Rows], gate: Tensor) -> Tensor:
        """The derivative of the loss by each gate, 0 where it is 0 and has no direction."""
        found = torch.zeros_like(gate)
        for one in rows:
            parameter = self._model.get_parameter(one.name)
            if parameter.grad is not None:
                product = (
                    (parameter.detach() * parameter.grad)
                    .double()
                    .reshape(len(parameter), -1)
                    .sum(1)
                )
                found += product[one.index].sum(1).cpu()
        return torch.where(gate > 0, found / gate, 0.0)

    def _step_gate(
        self, rows: Sequence[Rows], entry: Entry, gradient: Tensor, lr: float, threshold: float
    ) -> None:
        before, going = entry["gate"].clone(), entry["gate"] > 0
        proximal_step_(entry["gate"], entry["velocity"], gradient, lr, self._momentum,
                       torch.full_like(before, threshold), 0.0)  # fmt: skip
        entry["gate"].masked_fill_(~going, 0)
        multiply(self._model, rows, torch.where(going, entry["gate"] / before, 0.0))

    @torch.no_grad()
    def hold(self) -> None:
        """Keeps dead scales, and gates at zero, at zero, whatever an optimizer made of them."""
        for name, own in self.scales.items():
            entry = self._ledger[name]
            gone = entry["gate"] == 0 if own.gated else entry["dead"]
            for one in own.rows if bool(gone.any()) else ():
                parameter = self._model.get_parameter(one.name)
                places = one.index[gone].flatten().to(parameter.device)
                parameter[places] = 0
                if not own.gated:
                    self.velocities[one.name][places] = 0

    @torch.no_grad()
    def measures(self) -> dict[str, Tensor]:
        """The scale of each unit, that of several norms summed; float64 [units], by name."""
        found = {}
        for name, own in self.scales.items():
            if own.gated:
                found[name] = self._ledger[name]["gate"].clone()
            else:
                parts = [self._model.get_parameter(one.name).detach().double().cpu().abs()
                         [one.index].sum(1) for one in own.rows]  # fmt: skip
                found[name] = torch.stack(parts).sum(0)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The velocities."""
        return {name: velocity.clone() for name, velocity in self.velocities.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes velocities up.

        Raises:
            ValueError: They are not those of the model's norms.
        """
        wanted = {name: tuple(v.shape) for name, v in self.velocities.items()}
        got = {name: tuple(v.shape) for name, v in state.items()}
        if wanted != got:
            raise ValueError(f"the velocities must be of {wanted}, got {got}")
        for name, velocity in self.velocities.items():
            velocity.copy_(state[name])


@torch.no_grad()
def multiply(model: nn.Module, rows: Sequence[Rows], factors: Tensor) -> None:
    """Multiplies the rows of each unit by a factor, float64 [units]."""
    for one in rows:
        parameter = model.get_parameter(one.name)
        index = one.index.flatten().to(parameter.device)
        own = factors[:, None].expand(one.index.shape).flatten().to(parameter)
        parameter[index] *= own.view(-1, *[1] * (parameter.dim() - 1))
