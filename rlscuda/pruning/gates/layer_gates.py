r"""Training and layer pruning at once, in the spirit of Guenter and Sideris, arXiv 2406.04549.

A residual branch is computed with probability :math:`\theta_l`, one draw :math:`\xi_l` a step, and
what is minimised over weights and probabilities together is

.. math:: E_{\xi \sim \theta}[\ell(W, \xi)] + \sum_l \nu_l \theta_l, \qquad 0 \le \theta_l \le 1

The penalty is linear, which is what their "flattening" hyper-prior makes of the divergence between
Bernoulli distributions; so the expected loss is linear in each :math:`\theta_l`, its minimum is at
probabilities of 0 and 1, and what is left is an ordinary network.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda._torch import unwrapped
from rlscuda.pruning.blocks.choosing import DAMPING
from rlscuda.pruning.blocks.fitting import fit
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.blocks.stand_ins import StandIn, description_of, made_of
from rlscuda.pruning.blocks.transaction import replace_modules
from rlscuda.pruning.gates.branches import SIZES, branches_of, prices_of
from rlscuda.pruning.gates.differences import Closure, differences
from rlscuda.pruning.gates.gate import Gate, Switch
from rlscuda.pruning.gates.report import GateReport, GateState
from rlscuda.pruning.gates.state import SavedRemoval, check_state
from rlscuda.pruning.options import check_number, check_repeatable, checked_optimizers
from rlscuda.pruning.running.batch_norms import measure_again
from rlscuda.pruning.running.calls import isolated_copy
from rlscuda.pruning.running.measure import count_flops, count_parameters

_WORTH_DECAY = 0.9  # of the moving average that reports show
_FIELDS = ("theta", "below", "worth", "open")  # of a gate, that a state has
_LARGEST = 0.1  # step of a probability, lest one odd batch decides


class LayerGates:
    r"""Gates on the residual branches of a model, whose probabilities are trained with it.

    Every branch starts at `initial`, and a step draws for each whether it is computed. What it
    would change the loss by is estimated on the batch of the step, and

    .. math:: \theta_l \leftarrow \text{clip}(\theta_l - \eta (\Delta_l + \nu_l), 0, 1)

    A branch at 0 for a while is removed for good, with its parameters, matrices and moments. For a
    first share of the steps gates are drawn but do not learn, or all branches, worth nothing yet,
    would die together; then the price rises to what it is.

    The model can be called in any way meanwhile, copied, saved and evaluated: in eval mode branches
    above one half are on. Copies and files have no gates, and hold all branches that are not gone.

    Args:
        model: The model, which has to be in training mode when it trains.
        example_inputs: What it can be called with: a tensor, a tuple of arguments, or a mapping of
            named ones.
        optimizers: One, or all, that train the model; removed branches leave them.
        total_steps: Steps until probabilities should be decided; train on after `finish`.
        price: What an active branch must lower the loss by, on average over the branches, in the
            units of the loss: .001 removes what does next to nothing, .03 most.
        by: Whether every branch has that price (``equal``), or a share of it by its ``params`` or
            ``flops``.
        names: Shell patterns of the branches that get a gate, see `find_blocks`.
        initial: Probability at the start.
        warmup: Share of the steps before probabilities learn.
        ramp: Share of the steps in which the price then rises from 0.
        horizon: Share of the steps that a branch of no worth takes from `initial` to 0.
        probes: Branches, at random, whose worth is estimated in a step; each costs a forward.
        patience: Steps at 0 after which a branch is removed; at most one is in so many steps.
        maps: Batches of inputs as `remove_blocks` takes them. Then a branch does not go alone: the
            linear map of each pixel or token that fits it best takes its place and is trained on,
            times its probability then, which is its share in the network's output.
        tolerance: Probability that counts as 0. With maps, .5 lets a branch become one as soon as
            it is not worth its price.
        seed: Of the draws.

    Raises:
        TypeError: An argument is not of the type above.
        ValueError: An option is out of its range, or no branch can have a gate.

    Example:
        >>> gates = LayerGates(model, x, optimizer, total_steps=1000)       # doctest: +SKIP
        >>> for x, y in loader:                                             # doctest: +SKIP
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     gates.step(lambda: criterion(model(x), y), loss)
        ...     optimizer.step()
        >>> print(gates.finish(loader))                                     # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizers: Optimizer | Sequence[Optimizer] | None = None,
        *,
        total_steps: int,
        price: float = 0.01,
        by: str = "equal",
        names: str | Iterable[str] = "*",
        initial: float = 0.9,
        warmup: float = 0.15,
        ramp: float = 0.2,
        horizon: float = 0.2,
        probes: int = 1,
        patience: int = 50,
        maps: Iterable | None = None,
        tolerance: float = 0.02,
        seed: int = 0,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        self.model, self._inputs = unwrapped(model), example_inputs
        self._optimizers = checked_optimizers(optimizers, self.model)
        self._check(total_steps, price, by, probes, patience, seed)
        for name, share in {"initial": initial, "tolerance": tolerance}.items():
            _check_share(name, share)
        for name, share in {"warmup": warmup, "ramp": ramp, "horizon": horizon}.items():
            _check_share(name, share, zero=name != "horizon")
        if maps is not None:
            check_repeatable("maps", maps)
            if _world_size() > 1:
                raise ValueError("maps cannot be fitted in several processes, which would each fit "
                                 "others")  # fmt: skip
        self._warmup, self._ramp = warmup * total_steps, ramp * total_steps
        self._rate = initial / (price * horizon * total_steps)
        self._probes, self._patience = probes, patience
        self._maps, self._tolerance = maps, tolerance
        blocks, self._refused = branches_of(self.model, example_inputs, names)
        prices = prices_of(self.model, example_inputs, blocks, price, by)
        self._alive = [Gate(block, own, initial) for block, own in zip(blocks, prices)]
        self._order = [gate.name for gate in self._alive]
        self._prices = dict(zip(self._order, prices))
        self._gone: dict[str, SavedRemoval] = {}
        self._kept: dict[str, GateState] = {}  # once all gates are off
        self._steps, self._last_removal = 0, -patience
        self._generator = torch.Generator().manual_seed(seed)
        self._switches = {
            gate.name: [Switch(gate, name, self.model) for name in gate.block.modules]
            for gate in self._alive
        }
        weakref.finalize(self, _take_off, self._switches).atexit = False
        self._draw()

    @staticmethod
    def _check(steps: Any, price: Any, by: str, probes: Any, patience: Any, seed: Any) -> None:
        check_number("total_steps", steps, 1, whole=True)
        check_number("probes", probes, 1, whole=True)
        check_number("patience", patience, 1, whole=True)
        check_number("seed", seed, 0, whole=True)
        check_number("price", price, 0)
        if not price:
            raise ValueError("price must be above 0, got 0: nothing would be removed")
        if by not in SIZES:
            raise ValueError(f"by must be {' | '.join(SIZES)}, got {by!r}")

    def step(self, closure: Closure, loss: Tensor | float | None = None) -> None:
        """Lets the probabilities learn, removes branches that are at 0, and draws anew.

        Call it between `backward` and the step of the optimizer, once for each such step. In
        several processes all take the same draws, and the mean of their estimates.

        Args:
            closure: Gives the loss of the step's batch: a forward, and no backward. It is called
                without gradients.
            loss: What the forward of this step gave, which spares one of the closure's.

        Raises:
            RuntimeError: The model is in eval mode, or was not called since the last draw, or in a
                compiled form, which knows of no gates; nothing was changed.
            TypeError: The closure gives no number; nothing was changed.
            ValueError: A branch is to go, and an optimizer keeps something for all of its
                parameters together, as LBFGS does; nothing was changed.
        """
        if not self._alive:
            return
        self._check_called()
        before = self.state_dict()
        try:
            if self._steps >= self._warmup:
                self._learn(self._differences(closure, loss))
            self._steps += 1
            self._remove_dead()
        except BaseException:
            self._set(before)
            raise
        self._draw()

    def _check_called(self) -> None:
        if not self.model.training:
            raise RuntimeError("gates are drawn in training mode: call model.train() before the "
                               "forward of a step")  # fmt: skip
        silent = [gate.name for gate in self._alive if not gate.calls]
        if silent:
            raise RuntimeError(
                f"the branch {silent[0]!r} was not called since the last draw: step() follows a "
                "forward and backward of the model itself, not of a compiled one"
            )

    def _differences(self, closure: Closure, loss: Tensor | float | None) -> dict[Gate, float]:
        """What some branches, at random, change the loss by, the mean over all processes."""
        order = torch.randperm(len(self._alive), generator=self._generator).tolist()
        chosen = [self._alive[place] for place in order[: self._probes]]
        drawn = loss.item() if isinstance(loss, Tensor) else loss
        found = differences(self.model, chosen, closure, drawn)
        device = next(self.model.parameters()).device
        return dict(zip(found, _mean_over_ranks(list(found.values()), device)))

    def _learn(self, found: dict[Gate, float]) -> None:
        """A projected step of the probabilities of some gates, drawn of all."""
        if not all(math.isfinite(value) for value in found.values()):
            return
        ramped = (self._steps - self._warmup) / self._ramp if self._ramp else 1.0
        weight = len(self._alive) / len(found)
        for gate, difference in found.items():
            gate.worth += (1 - _WORTH_DECAY) * (-difference - gate.worth)
            step = self._rate * weight * (difference + min(1.0, ramped) * gate.price)
            gate.theta = min(1.0, max(0.0, gate.theta - min(_LARGEST, max(-_LARGEST, step))))

    def _remove_dead(self) -> None:
        """Removes the branch that has been at 0 for longest, if one has for long enough."""
        for gate in self._alive:
            gate.below = gate.below + 1 if gate.theta < self._tolerance else 0
        longest = max(self._alive, key=lambda gate: gate.below)
        waited = self._steps - self._last_removal
        if longest.below >= self._patience and waited >= self._patience:
            self._remove({longest.name: self._stand_ins(longest)})
            self._last_removal = self._steps

    def _remove(self, stand_ins: Mapping[str, Mapping[str, StandIn]]) -> None:
        """Takes branches out of the model and its optimizers; all of it is done, or nothing.

        Args:
            stand_ins: For each branch by its name, by the names of its modules.
        """
        at = {name: isolated_copy(one) for own in stand_ins.values() for name, one in own.items()}
        replace_modules(self.model, self._optimizers, at, {}, [])  # type: ignore[arg-type]
        for gate in [gate for gate in self._alive if gate.name in stand_ins]:
            stand_in = description_of(stand_ins[gate.name][gate.block.exit])
            self._gone[gate.name] = SavedRemoval(stand_in=stand_in, worth=gate.worth)
            _take_off({gate.name: self._switches.pop(gate.name)})
            self._alive.remove(gate)

    def _stand_ins(self, gate: Gate) -> dict[str, StandIn]:
        """What takes the place of a branch's modules."""
        fits = {} if self._maps is None else fit(self.model, gate.block, self._maps, DAMPING)
        if not fits:
            return gate.block.stand_ins
        smallest = fits[min(fits)].stand_in
        with torch.no_grad():
            for parameter in smallest.parameters():
                parameter.mul_(gate.theta)
        return gate.block.stand_ins | {gate.block.exit: smallest}

    def _draw(self) -> None:
        thetas = torch.tensor([gate.theta for gate in self._alive], dtype=torch.float64)
        drawn = torch.rand(len(thetas), dtype=torch.float64, generator=self._generator) < thetas
        for gate, is_open in zip(self._alive, drawn.tolist()):
            gate.open, gate.calls = is_open, 0

    def report(self) -> GateReport:
        """How the gates stand."""
        states = {
            own.name: GateState(
                own.name, own.theta, own.worth, own.price, "on" if own.decided else "off"
            )
            for own in self._alive
        }
        for name, removal in self._gone.items():
            states[name] = GateState(name, 0.0, removal["worth"], self._prices[name], "gone")
        states |= self._kept
        decided = isolated_copy(self.model).eval()
        for gate in self._alive:
            if not gate.decided:
                decided = with_stand_ins(decided, gate.block.stand_ins)
        size = count_parameters(decided), count_flops(decided, self._inputs)
        return GateReport([states[name] for name in self._order], dict(self._refused), *size)

    def finish(self, loader: Iterable | None = None) -> GateReport:
        """Removes branches whose probability is at most one half, and all gates.

        What is left is the model as it is in eval mode now, without a trace of the gates.

        Args:
            loader: Batches as `remove_blocks` takes them, by which the running statistics of batch
                norms are measured anew; None leaves them.

        Returns:
            How the gates stood.
        """
        report = self.report()
        off = {gate.name: self._stand_ins(gate) for gate in self._alive if not gate.decided}
        if off:
            self._remove(off)
        _take_off(self._switches)
        self._kept |= {gate.name: gate for gate in report.gates if gate.state == "on"}
        self._alive.clear()
        if loader is not None:
            measure_again(self.model, loader)
        return report

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the states of model and optimizers."""
        return {
            "gates": {g.name: {name: getattr(g, name) for name in _FIELDS} for g in self._alive},
            "gone": dict(self._gone),
            "steps": self._steps,
            "last_removal": self._last_removal,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state; branches that were gone leave model and optimizers now.

        Load the states of model and optimizers after it, for theirs are of the model without them.

        Raises:
            ValueError: It is no state of gates on these branches, or a branch that it has is gone
                here; nothing was changed.
        """
        mine = {gate.name: gate for gate in self._alive}
        check_state(state, self._order, mine, self._maps is not None)
        going: dict[str, dict[str, StandIn]] = {}
        for gate in (mine[name] for name in state["gone"] if name in mine):
            device = next(self.model.parameters()).device
            at = made_of(state["gone"][gate.name]["stand_in"]).to_empty(device=device)
            going[gate.name] = gate.block.stand_ins | {gate.block.exit: at}
        if going:
            self._remove(going)
        self._set(state)
        for gate in self._alive:
            gate.calls = 0

    def _set(self, state: Mapping[str, Any]) -> None:
        """Gives gates, of which just those of a state are there, its values."""
        self._gone = dict(state["gone"])
        for gate in self._alive:
            for name in _FIELDS:
                setattr(gate, name, state["gates"][gate.name][name])
        self._steps, self._last_removal = state["steps"], state["last_removal"]
        self._generator.set_state(state["generator"])


def _check_share(name: str, share: Any, zero: bool = False) -> None:
    check_number(name, share, 0)
    if not (0 <= share < 1) or not (share or zero):
        raise ValueError(f"{name} must be a share in {'[' if zero else '('}0, 1), got {share}")


def _take_off(switches: dict[str, list[Switch]]) -> None:
    for own in switches.values():
        for switch in own:
            switch.remove()


def _world_size() -> int:
    distributed = torch.distributed
    is_there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_there else 1


def _mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The mean of each value over all processes."""
    if _world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return (total / _world_size()).tolist()
