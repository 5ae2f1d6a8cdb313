"""`RLSOptimizer`: second-order training by recursive least squares, as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda._torch import is_dtensor, outside_dynamo, unwrapped
from rlscuda.interrupts import uninterrupted
from rlscuda.optim import advice, forms, hooks
from rlscuda.optim.discovery import Registry, as_list
from rlscuda.optim.fallback import Fallback, restart_rates, set_rates
from rlscuda.optim.kept import Change, Replaced, cut_states
from rlscuda.optim.kinds import owners
from rlscuda.optim.layers import Layer
from rlscuda.optim.moves import Workspace
from rlscuda.optim.ranks.processes import Processes
from rlscuda.optim.report import Reporting
from rlscuda.optim.state import guarded_load, restart
from rlscuda.optim.steps.joining import Joining
from rlscuda.optim.steps.whole import in_P, take_step


class RLSOptimizer(Joining, Reporting, Optimizer):
    r"""Trains linear, convolution and recurrent layers by RLS, all other parameters by a fallback.

    Each covered layer keeps the inverse autocorrelation matrix ``P`` [n, n] of its im2col input
    rows (n = fan-in, + 1 for the bias), updated by a few rows a minibatch, and moves its weight
    along ``grad @ P``; in the default form, along the momentum made orthogonal in the metric of
    ``P``, as Muon does in that of the identity.

    Args:
        params: A model, or parameters or parameter groups as for any torch optimizer.
        lr: Learning rate :math:`\eta` (spectral .05, adaptive .1, else .3). Where no module holds
            the parameters, or set by a group without a covered layer, it is the fallback rule's.
        model: The model that holds the parameters. By default the smallest living module that does,
            wrappers apart, after which layers are named; or several in the order of `params`.
        form: ``"spectral"`` (default), ``"adaptive"``, ``"paper"`` or ``"natural"``; it sets the
            defaults below.
        forgetting: Forgetting factor :math:`\lambda` in (0, 1] (1).
        gain: Gain :math:`\kappa` of a new observation (paper .1, else .01).
        momentum: Momentum :math:`\alpha` in [0, 1): the share of the last direction that the next
            one keeps (spectral, adaptive .9, else 0). The spectral form averages and looks ahead,
            as Muon does, the adaptive one averages, as Adam does; the others sum, as their papers
            do.
        weight_decay: Decoupled weight decay (spectral .2, adaptive .05, else 0).
        rank: Rows r of one input summary (spectral, adaptive 16, else 1).
        interval: Steps from one update of ``P`` to the next (spectral, adaptive 4, else 1), once
            its gain has come down to `gain`: each then does what those of every step would, with as
            many rows as they together, but at most 64 or twice the fan-in.
        summary: ``"mean"``, ``"sketch"`` or ``"sample"``: how a minibatch enters ``P`` (paper mean,
            natural sketch, else sample).
        ridge: Information on each input that a forgetting < 1 leaves, so that ``P`` stays bounded:
            0 for none, or None for a hundredth of the input's running power times the gain.
        shrinkage: Pull of ``P`` towards its start (0).
        drift: Random-walk drift of ``P`` (spectral, adaptive .3, else None).
        trust_ratio: No step moves a layer by more than this part of its norm (paper, natural .1,
            inf for exact least squares; the others normalise anyway).
        initial_scale: ``P`` starts as this multiple of the identity (1).
        beta2: Decay of the adaptive form's row second moments (.99).
        eps: Added to their square root; in the spectral form, the size of a gradient, for inputs of
            unit size, that still moves half as much as a large one (1e-8).
        fallback: ``"adamw"`` (default), ``"sgd"``, or a callable that makes a torch optimizer from
            parameter groups; it trains every parameter that no RLS rule covers.
        fallback_lr: Its learning rate at the peak of `lr`, whose schedule it follows (spectral .01,
            adaptive 3e-3, else 1e-3).
        include: Names (shell patterns) or modules to which the RLS rule is limited.
        exclude: Names (shell patterns) or modules that the fallback rule trains.
        dtype: ``torch.float64`` asks for a float64 ``P``; float64 parameters have it anyway.
        max_fan_in: Above this fan-in ``P`` is block-diagonal, of blocks of consecutive inputs that
            are no larger (8192).
        seed: Of the random signs and draws of ``sketch`` and ``sample``.
        process_group: The processes that train the model together, whose ``P`` is then that of
            one process with all their inputs: ``"auto"`` (default), those of the
            DistributedDataParallel module that calls the layers; a process group; or None.
        shard_matrices: Keeps each ``P``, and its layer's moments, on one of these processes, which
            moves the layer for all; ``state_dict()`` gathers them and is to be called by all.

    Raises:
        ValueError: An option is out of its range, or an included module cannot be covered.
        TypeError: `params` is not what a torch optimizer takes, `model` no module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        >>> opt = RLSOptimizer(model)
        >>> loss = model(torch.randn(8, 4)).square().mean()
        >>> loss.backward(); opt.step(); opt.zero_grad()

    Sources: Zhang et al. 2021 (arXiv 2109.03220); Yu et al. 2022 (arXiv 2201.04813).
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: float | Tensor | None = None,
        *,
        model: nn.Module | None = None,
        form: str = "spectral",
        forgetting: float | None = None,
        gain: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        rank: int | None = None,
        interval: int | None = None,
        summary: str | None = None,
        ridge: float | None = None,
        shrinkage: float | None = None,
        drift: float | None = None,
        trust_ratio: float | None = None,
        initial_scale: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
        fallback: str | Callable[[list[dict]], Optimizer] = "adamw",
        fallback_lr: float | None = None,
        include: Iterable[str | nn.Module] | None = None,
        exclude: Iterable[str | nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        max_fan_in: int | None = None,
        seed: int | None = None,
        process_group: Any = "auto",
        shard_matrices: bool = False,
    ):
        self._processes = Processes(process_group, shard_matrices)
        self._given = {
            "lr": lr, "form": form, "forgetting": forgetting, "gain": gain, "momentum": momentum,
            "weight_decay": weight_decay, "rank": rank, "interval": interval, "summary": summary,
            "ridge": ridge, "shrinkage": shrinkage, "drift": drift, "trust_ratio": trust_ratio,
            "initial_scale": initial_scale, "beta2": beta2, "eps": eps, "fallback_lr": fallback_lr,
            "dtype": dtype, "max_fan_in": max_fan_in, "seed": seed,
        }  # fmt: skip
        defaults = forms.resolve_options(self._given)
        self._fallback = Fallback(fallback)
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError("params is a model already: pass no other as model=")
            model, params = params, params.parameters()
        if not isinstance(model, (nn.Module, type(None))):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        given: Any = owners.listed(params)
        found, around = owners.find(given) if model is None else (model, [])
        if found is None and not (include is None and exclude is None):
            raise ValueError("include and exclude choose among the layers of a model: pass model=")
        include, exclude = (x if x is None else as_list(x) for x in (include, exclude))
        self._registry = Registry(unwrapped(found), include, exclude, found=model is None)
        self._said: set[str] = set()
        self._workspace: Workspace = {}
        self._resting = False
        self._checked: list[tuple] = []  # options as they were when last looked at
        self._attached: set[Layer] | None = None  # layers with hooks; None until all is checked
        super().__init__(given, defaults)
        layers = self._registry.layers
        if not layers:
            advice.warn(advice.NO_MODULE if found is None else advice.NOTHING_COVERED)
        self._warn(advice.of_groups(self.param_groups, layers, self.state))
        self._fallback.prepare(self.param_groups, in_P(self._registry.covered.values()), self.state)
        self._attached = set()
        self._attach()
        if layers and found is not None:
            hooks.forget_compiled(found, *around)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; options it does not set are those of the constructor.

        Layers that the model has got since are covered where their weights are in the group. Where
        no model was given, it is looked for again if it lacks a parameter.

        Raises:
            ValueError: An option is unknown or out of its range, or a parameter is in another group
                already.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        forms.check_names(param_group)
        merged = {**self._given, **param_group}
        group = {**param_group, **forms.resolve_options(merged)}
        super().add_param_group(group)
        self._resting = False
        self._follow_groups()
        covered = any(p in self._registry.layers for p in group["params"])
        layers = any(match.layer is not None for match in self._registry.matches)
        apart = param_group.get("fallback_lr") is not None
        of_layers = covered or apart or (layers and param_group.get("lr") is None)
        peak = group["lr"] if apart else self.defaults["lr"]
        set_rates(group, merged, covered, peak if of_layers else None)
        if self._attached is not None:
            self._warn(advice.of_groups(self.param_groups, self._registry.layers, self.state))

    def _warn(self, texts: Iterable[str]) -> None:
        """Warns of what has not been said yet."""
        for text in texts:
            if text not in self._said:
                self._said.add(text)
                advice.warn(text)

    # -- groups and layers, as they are now -------------------------------------------------------

    def _follow_groups(self) -> None:
        """Reads the groups and their parameters anew where somebody has changed them."""
        made = self._attached is not None
        replaced = self._registry.follow(self.param_groups, made, self._attach)
        self._warn(advice.of_replaced(replaced))

    def _attach(self) -> None:
        """Puts hooks, which end with this object, on every layer that has none yet."""
        if self._attached is not None:
            bare = self._registry.candidates() - self._attached
            if bare:
                hooks.attach(self, bare, self._observe, self._rests)
            self._attached |= bare

    def _observe(self, layer: Layer, x: Tensor, outputs: list[Tensor]) -> None:
        """Stages what one forward shows."""
        self._processes.notice(layer.weight, x)
        if not outputs:
            return
        if self._registry.has_other_groups(self.param_groups):
            self._follow_groups()
        weight = layer.weight
        covered = self._registry.covered.get(weight)
        if covered is not None and weight.requires_grad:
            state, group = self.state.get(weight, {}), covered.group
            place = (self._processes.rank, self._processes.size)
            span, step = 1 if self._each() else forms.span_of(group, state), state.get("step", 0)
            inputs = self._registry.inputs
            covered.stage.observe(layer, group, step, inputs, place, x, outputs, span)

    def _rests(self) -> bool:
        """Whether no layer's input matters before the next step, as no `P` has an update in it."""
        return self._resting and not self._each()

    def _each(self) -> bool:
        """Whether every step has an update of `P`: in a captured graph, and where steps differ."""
        on_gpu = torch.cuda.is_initialized()
        return self._joined or (on_gpu and torch.cuda.is_current_stream_capturing())

    def mask(self, mask: Tensor) -> AbstractContextManager[None]:
        """Keeps padded positions out of every `P`, for the forwards inside a ``with``.

        It holds for linear and recurrent layers and self-attention whose input has the mask's shape
        before its features; checkpointed segments need it around the backward. A GPU is waited for.

        Args:
            mask: bool, such as [batch, time], True where a position counts.
        """
        return self._registry.inputs.entered(mask)

    # -- the step ---------------------------------------------------------------------------------

    @outside_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: `closure` is not callable.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be callable, got {type(closure).__name__}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_groups()
        self._warn(advice.of_idle(self._registry.count_idle()))
        self.notify_join()
        with uninterrupted():
            forms.check_edited(self.param_groups, self._checked)
            own = (self._registry, self._fallback, self._processes, self._workspace)
            texts, rests = take_step(self.param_groups, self.state, *own, self._each())
            self._warn(texts)
            self._resting = rests
        return loss

    def restart(self, memory: int = 30) -> None:
        r"""Readies the optimizer for another schedule, once one has ended.

        The moments that scale a step are those of the last, small gradients: at the peak rate of a
        new schedule they would make it far too large. So the moments start anew, those of the
        fallback rule too, and the matrices weigh new inputs as if `memory` updates had been seen:
        their gain, and with it the adaptive form's rate, warms up from there. Rates that a schedule
        has changed are again what it started from. Weights, `P` and what is staged stay.

        Args:
            memory: Updates that `P` counts as, at most: its gain goes on at
                :math:`\max(\kappa, 1 / (memory + 1))`. Forms of a constant gain keep it.

        Raises:
            ValueError: `memory` is no integer >= 0.

        Example:
            >>> pruner.step()                                              # doctest: +SKIP
            >>> optimizer.restart()  # at its first rate again             # doctest: +SKIP
            >>> schedule = CosineAnnealingLR(optimizer, steps)             # doctest: +SKIP
        """
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
            raise ValueError(f"memory must be an integer >= 0, got {memory!r}")
        for state in self.state.values():
            if "P" in state:
                restart(state, memory)
        self._resting = False
        self._fallback.restart(self.state)
        restart_rates(self.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them what was staged for the step."""
        super().zero_grad(set_to_none)
        self._registry.clear()

    # -- persistence ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state, see torch; with `shard_matrices`, of all processes, which have to call it."""
        state = super().state_dict()
        sharing = self._processes.sharing
        return state if sharing is None else {**state, "state": sharing.gathered(state["state"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, keeping the dtype of `P` whatever that of the parameters.

        Raises:
            ValueError: The state is not of an optimizer over these parameters; nothing is changed.
        """
        self._follow_groups()
        self._resting = False
        self._registry.clear()
        with guarded_load(self, self._registry.layers, self._fallback.entries):
            super().load_state_dict(state_dict)

    def __getstate__(self):
        own = ("_given", "_fallback", "_registry", "_said", "_processes")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state):
        super().__setstate__(state)
        if "_registry" in state:  # unpickled or deep-copied, not load_state_dict
            self._workspace, self._attached, self._resting = {}, set(), False
        self._fallback.reset()
        self._checked = []
        self._registry.forget_groups()
        self._follow_groups()

    # -- surgery ----------------------------------------------------------------------------------

    def _check_whole(self) -> None:
        """Raises ValueError where this process has a part of the layers only."""
        shared = self._processes.sharing is not None and self._processes.size > 1
        if shared or any(map(is_dtensor, self._registry.covered)):
            what = "shard_matrices" if shared else "the sharded weights"
            raise ValueError(
                f"this needs every layer whole on every process, which {what} leave on others: "
                "load state_dict() into an optimizer of a whole model, and go on with that"
            )

    def _cut(self, replaced: Replaced) -> tuple[dict[nn.Parameter, dict[str, Any]], list[Change]]:
        """How it follows when parameters are replaced by smaller ones; nothing is changed yet.

        Returns the state of each covered weight, by the old weight, and the changes of itself.
        """
        self._check_whole()
        cut, kept, changes = self._registry.cut(replaced)
        return cut_states(kept, self.state), [*changes, *self._followed(cut)]

    def _without(self, gone: set[nn.Parameter]) -> list[Change]:
        """How it follows when parameters leave it, which it forgets; nothing is changed yet."""
        left = {layer for layer in self._attached or () if layer.weight not in gone}
        return [(self, "_attached", left), *self._followed(self._registry.without(gone))]

    def _followed(self, registry: Registry) -> list[Change]:
        fresh = [(self._fallback, name, value) for name, value in Fallback.FRESH.items()]
        return [*fresh, (self, "_registry", registry), (self, "_resting", False)]
