"""`AdaptivePruner`: how many channels go, and how many layers, is learned in training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rlscuda.optim.kept import Change
from rlscuda.pruning.adaptive.listing import Selection
from rlscuda.pruning.adaptive.options import WHAT, checked
from rlscuda.pruning.adaptive.plan import Plan
from rlscuda.pruning.adaptive.price import Price
from rlscuda.pruning.adaptive.report import AdaptiveReport
from rlscuda.pruning.matrices.tracker import SketchTracker
from rlscuda.pruning.surgery.transaction import revert


class AdaptivePruner:
    r"""Prunes channels and residual branches while a network trains; their shares are learned.

    Each channel and each branch pays one price :math:`\rho` for every unit of size that it takes
    up, and what is not worth it goes to zero by proximal steps, so that zeros are exact. At the end
    of an epoch what is dead is taken out in closed form: weights that remain make up for it, batch
    norms, matrices and moments follow, and training goes on with the same optimizer.

    ========== ====================================================================================
    penalty    what is paid for
    ========== ====================================================================================
    ``output`` :math:`\Omega_g = \sqrt{tr(W_g P_{gg}^{-1} W_g^T)}`, by how much the layers that take
               a channel would change without it, once their other weights are fitted anew; and by
               how much the network's output would change without a branch. It does not change when
               a channel is scaled, and knows of redundancy. Its steps are those of `shrink_`.
    ``scale``  :math:`|s|`, the scale of a channel, the weight of its batch norm or a gate of one,
               and of a branch, a gate. Accelerated proximal steps take the place of the
               optimizer's: the weights of those norms are left without a gradient.
    ========== ====================================================================================

    Call `after_backward` before each step of the optimizer (after gradients were unscaled or
    clipped), `after_step` after it, and `after_epoch` after each epoch.

    Without `epochs` the price is controlled by the size that is left, and only what has been at
    zero for `patience` steps goes. With it, each epoch chooses anew what costs least of all that
    meets the target, and takes of that, the cheapest by cost over what it saves first, what the
    size wanted after that epoch has room for. The price between is the least at which as much
    would be gone by itself; branches pay it by their scales alone, for of ``output`` a branch that
    is shrunk only seems to be worth little.

    Args:
        model: The model.
        optimizer: What trains it, any torch optimizer or a list of all; or None.
        example_inputs: What the model can be called with: a tensor, a tuple of arguments, or a
            mapping of named ones.
        target_params: Parameters at most; a number, or as a float in (0, 1) a share of those now.
            By default half, where `target_flops` is not given.
        target_flops: FLOPs of a forward of the example inputs at most; likewise.
        what: ``"channels"``, ``"blocks"`` or both.
        penalty: ``output`` or ``scale``.
        price_by: What the price is paid for, ``params`` or ``flops``; by default what the target
            is of.
        rho: The first price.
        gain: Of the control of the price, see `Price`.
        warmup: Epochs before any price is paid.
        epochs: Epochs after that in which the target is met; None for as many as it takes.
        curve: How what is gone grows over them, see `ratio_after`.
        patience: Steps at zero after which a unit is dead and never returns.
        every: Steps between two proximal steps of the penalty ``output``.
        lr: Step size of scales; it follows the schedule of the first optimizer.
        momentum: Of scales.
        round_to: What stays of a coupling is a multiple of it, where it has as many.
        tolerance: How far, relative to the least so far, the loss given to `after_epoch` may be
            above it; beyond it nothing goes in that epoch, which counts for nothing.
        ignored: Modules, names or shell patterns that keep all their channels and branches.
        source: Of the matrices, as for `RLSPruner`; ``scale`` needs none, but compensates by them.
        tracker: A `SketchTracker` that sees the training.
        loader: Batches as `RLSPruner` takes them. It shows batch norms what a cut changed, and is
            needed for branches with the penalty ``output``.
        compensate: Whether the remaining weights change to make up for what goes; ``in turn`` then
            fits each layer over `loader`, as for `RLSPruner`.
        damping: See `RLSPruner`.

    Attributes:
        epoch: Epochs so far.

    Raises:
        ValueError: An option is out of its range, one needs another that is missing, or the model
            cannot be traced or has nothing that may go.
        TypeError: An argument is not of the type above.

    Example:
        >>> pruner = AdaptivePruner(model, optimizer, images, epochs=4)  # doctest: +SKIP
        >>> for epoch in range(12):                                      # doctest: +SKIP
        ...     for x, y in loader:
        ...         optimizer.zero_grad()
        ...         loss_fn(model(x), y).backward()
        ...         pruner.after_backward()
        ...         optimizer.step()
        ...         pruner.after_step()
        ...     pruner.after_epoch()

    In the spirit of Zhang et al. 2019 (layer pruning for accelerating very deep networks), with the
    solver of Huang and Wang 2018 (arXiv 1707.01213); the penalty ``output`` is our own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        example_inputs: Any = None,
        *,
        target_params: float | None = None,
        target_flops: float | None = None,
        what: str | Sequence[str] = WHAT,
        penalty: str = "output",
        price_by: str | None = None,
        rho: float = 1e-4,
        gain: float = 1.0,
        warmup: int = 1,
        epochs: int | None = None,
        curve: str = "cubic",
        patience: int = 100,
        every: int = 20,
        lr: float = 0.03,
        momentum: float = 0.9,
        round_to: int = 1,
        tolerance: float | None = None,
        ignored: str | nn.Module | Iterable[str | nn.Module] = (),
        source: str | None = None,
        tracker: SketchTracker | None = None,
        loader: Iterable | None = None,
        compensate: bool | str = True,
        damping: float = 1e-3,
    ):
        numbers = {
            "rho": rho, "gain": gain, "warmup": warmup, "epochs": epochs, "patience": patience,
            "every": every, "lr": lr, "momentum": momentum, "round_to": round_to,
            "tolerance": tolerance, "damping": damping,
        }  # fmt: skip
        self.options = checked(
            model, optimizer, example_inputs, target_params, target_flops, what, penalty, price_by,
            curve, ignored, source, tracker, loader, compensate, numbers,
        )  # fmt: skip
        self._plan = Plan(self.options)
        whole, target = self._plan.size, self.options.target
        share = target if target < 1 else target / whole
        self._price = Price(rho, gain, share, warmup, epochs, curve, whole)
        self.epoch = self._steps = self._steps_before = self._steps_of_epoch = self._paused = 0
        self._best = math.inf
        self._history: list[dict[str, Any]] = []
        self._checked = False

    @property
    def finished(self) -> bool:
        """Whether the model is as small as was wanted."""
        return self._plan.size <= self._price.limit

    @property
    def rho(self) -> float:
        """The price that is paid now, 0 before the warm-up's end and once the target is met."""
        waits = self.finished or self.epoch < self._price.warmup
        return 0.0 if waits else self._price.rho

    def _check(self) -> None:
        """Raises ValueError, once, where the target is out of reach; a resumed pruner knew."""
        if not self._checked:
            least, whole, o = self._plan.least(), self._price.whole, self.options
            if least > self._price.limit:
                raise ValueError(
                    f"the target of {self._price.limit:.0f} {o.counted} is out of reach: {least} "
                    f"of {whole} are left without all {' and '.join(o.what)} that may go"
                )
            self._checked = True

    def after_backward(self) -> None:
        """Takes the step of every scale; for the penalty ``output`` it does nothing.

        To be called once before each step of the optimizer. The weights of norms that are scales
        have no gradient afterwards, so that no optimizer moves them, nor decays them.

        Raises:
            ValueError: The target is out of reach, whatever goes.
        """
        self._check()
        if self.options.penalty == "scale":
            penalty, rho = self._plan.penalty, self.rho
            penalty.after_backward(rho, self._share())
            if rho:
                zeros = {name: own == 0 for name, own in penalty.measures().items()}
                self._plan.count(zeros, 1, self._price.limit)

    def after_step(self) -> None:
        """Takes the proximal step of ``output`` where one is due, and holds what is dead at zero.

        To be called once after each step of the optimizer.
        """
        self._steps += 1
        penalty, rho, every = self._plan.penalty, self.rho, self.options.every
        if self.options.penalty == "output" and rho and self._steps % every == 0 and penalty.ready:
            self._plan.count(penalty.sweep(rho), every, self._price.limit)
        penalty.hold()

    def after_epoch(self, val_loss: float | None = None) -> str:
        """Takes out what is to go, and sets the price; it completes, or leaves all as it was.

        Args:
            val_loss: Validation loss after the epoch, for `tolerance` and the report.

        Returns:
            ``pruned``, ``kept`` (nothing went), ``waiting`` (warm-up), ``paused`` (the loss is too
            high) or ``finished`` (the target was met before).

        Raises:
            ValueError: The pruned model does not run on the example inputs; matrices are missing;
                the target is out of reach, whatever goes.
        """
        if val_loss is not None:
            val_loss = float(val_loss)
        self._check()
        before, done = dict(self.__dict__), list[Change]()
        self._plan, self._price = self._plan.copy(), copy.copy(self._price)
        try:
            outcome, gone = self._after_epoch(val_loss, done)
        except BaseException:
            revert(done)
            self.__dict__.update(before)
            raise
        row = {"epoch": self.epoch, "size": self._plan.size, "rho": self.rho, "loss": val_loss}
        went = {"channels": sum(map(len, gone.removed.values())), "blocks": len(gone.blocks)}
        self._history = [*self._history, {**row, **went}]
        return outcome

    def _after_epoch(self, loss: float | None, done: list[Change]) -> tuple[str, Selection]:
        plan, price, nothing = self._plan, self._price, Selection({}, [])
        self.epoch += 1
        self._steps_of_epoch, self._steps_before = self._steps - self._steps_before, self._steps
        if self.finished:
            return "finished", nothing
        if self.epoch < price.warmup:
            return "waiting", nothing
        if self.options.tolerance is not None and loss is not None:
            if not loss <= self._best * (1 + self.options.tolerance):
                self._paused += 1
                return "paused", nothing
            self._best = min(self._best, loss)
        plan.measure()
        gone, goal = nothing, price.goal(self.epoch - self._paused)
        if goal is None or goal < plan.size:
            gone = plan.select(goal, price.limit)
            plan.remove(gone, goal, price.limit, self.epoch, done)
        price.control(plan.size)
        goal = price.goal(self.epoch - self._paused + 1)
        if goal is not None and not self.finished and self._steps_of_epoch:
            price.rho = plan.level(goal) / self._pace()
        return ("kept" if gone.empty else "pruned"), gone

    def _pace(self) -> float:
        """How far a price of one would shrink what it is paid for, in an epoch without a loss."""
        if self.options.penalty == "output":
            return self._steps_of_epoch / self.options.every
        step = self.options.lr * self._share() / (1 - self.options.momentum)
        return step * self._steps_of_epoch or math.inf

    def _share(self) -> float:
        """What the schedule of the first optimizer has left of its first step size."""
        for optimizer in self.options.optimizers:
            for group in optimizer.param_groups:
                first = float(group.get("initial_lr", group["lr"]))
                return float(group["lr"]) / first if first else 1.0
        return 1.0

    def report(self) -> AdaptiveReport:
        """What became of every coupling and block so far."""
        return AdaptiveReport(
            fates=self._plan.fates(),
            penalty=self.options.penalty,
            counted=self.options.counted,
            before=int(self._price.whole),
            after=self._plan.size,
            target=self._price.limit,
            rho=self.rho,
            history=list(self._history),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps to come depend on but model, optimizer and loader."""
        return {
            "epoch": self.epoch, "steps": self._steps, "steps_before": self._steps_before,
            "steps_of_epoch": self._steps_of_epoch, "paused": self._paused, "best": self._best,
            "rho": self._price.rho, "target": self._price.target, "whole": self._price.whole,
            "history": [dict(row) for row in self._history], "plan": self._plan.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another pruner was, of a model of the same widths and blocks.

        Raises:
            ValueError: The state is of a model of other couplings or blocks; nothing is changed.
        """
        self._plan.load_state_dict(state["plan"])
        self._checked = True
        self.epoch, self._steps = state["epoch"], state["steps"]
        self._steps_before, self._steps_of_epoch = state["steps_before"], state["steps_of_epoch"]
        self._paused, self._best = state["paused"], state["best"]
        self._price = copy.copy(self._price)
        self._price.rho, self._price.target = state["rho"], state["target"]
        self._price.whole = state["whole"]
        self._history = [dict(row) for row in state["history"]]
