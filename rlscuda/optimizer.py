"""`RLSOptimizer`: second-order training by recursive least squares, as a torch optimizer."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlscuda import forms
from rlscuda.discovery import Match, discover
from rlscuda.fallback import IN_P, Fallback
from rlscuda.layers import Layer
from rlscuda.report import Coverage, Health, coverage_of, health_of
from rlscuda.staging import (
    Factors,
    ForwardHook,
    Stage,
    in_backward,
    remove_all,
    summarisable,
    summarise,
)
from rlscuda.state import guarded_load, initial_state, restart
from rlscuda.stepping import Move, Workspace, step_layers

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that layers and steps do not share seeds
_OVERSHOOT = (
    "one input row a step and lr {lr} above twice the gain {gain}: the step can go beyond the "
    "minimum and diverge, choose lr <= 2 * gain"
)


class RLSOptimizer(Optimizer):
    r"""Trains Linear and Conv2d layers by recursive least squares, and all else by a fallback rule.

    Each covered layer keeps the inverse autocorrelation matrix ``P`` [n, n] of its im2col input
    rows (n = fan-in, + 1 for the bias), updated by a few rows a minibatch, and moves its weight
    along ``grad @ P``.

    Args:
        params: A model, or parameters or parameter groups as for any torch optimizer.
        lr: Learning rate :math:`\eta` (default: of the form; adaptive 0.1, else 0.3). Without a
            model, or set by a group without a covered layer, it is the fallback rule's own.
        model: The model that holds the parameters, where `params` is not the model itself.
        form: ``"adaptive"`` (default), ``"paper"`` or ``"natural"``; it sets the defaults below.
        forgetting: Forgetting factor :math:`\lambda` in (0, 1] (1).
        gain: Gain :math:`\kappa` of a new observation (adaptive .01, paper .1, natural .01).
        momentum: Momentum :math:`\alpha` in [0, 1) (adaptive .9, else 0).
        weight_decay: Decoupled weight decay (adaptive .05, else 0).
        rank: Rows r of one input summary (adaptive 16, else 1).
        summary: ``"mean"``, ``"sketch"`` or ``"sample"``: how a minibatch enters ``P`` (adaptive
            sample, paper mean, natural sketch).
        shrinkage: Pull of ``P`` towards its start, 2 (1 - forgetting) by default, 0 for none.
        drift: Random-walk drift of ``P`` (adaptive .3, else None).
        initial_scale: ``P`` starts as this multiple of the identity (1).
        beta2: Decay of the adaptive form's row second moments (.99).
        eps: Added to their square root (1e-8).
        fallback: ``"adamw"`` (default), ``"sgd"``, or a callable that makes a torch optimizer from
            parameter groups; it trains every parameter that no RLS rule covers.
        fallback_lr: Its learning rate (adaptive .01, else 1e-3); it follows `lr`'s schedule.
        include: Names (shell patterns) or modules to which the RLS rule is limited.
        exclude: Names (shell patterns) or modules that the fallback rule trains.
        dtype: ``torch.float64`` asks for a float64 ``P``; float64 parameters have it anyway.
        seed: Of the random signs and draws of ``sketch`` and ``sample``.

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
        form: str = "adaptive",
        forgetting: float | None = None,
        gain: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        rank: int | None = None,
        summary: str | None = None,
        shrinkage: float | None = None,
        drift: float | None = None,
        initial_scale: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
        fallback: str | Callable[[list[dict]], Optimizer] = "adamw",
        fallback_lr: float | None = None,
        include: Iterable[str | nn.Module] | None = None,
        exclude: Iterable[str | nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
    ):
        self._given = {
            "lr": lr, "form": form, "forgetting": forgetting, "gain": gain, "momentum": momentum,
            "weight_decay": weight_decay, "rank": rank, "summary": summary, "shrinkage": shrinkage,
            "drift": drift, "initial_scale": initial_scale, "beta2": beta2, "eps": eps,
            "fallback_lr": fallback_lr, "dtype": dtype, "seed": seed,
        }  # fmt: skip
        defaults = forms.resolve_options(self._given)
        self._fallback = Fallback(fallback)
        if isinstance(params, nn.Module):
            if model is not None and model is not params:
                raise ValueError("params is a model already: pass no other as model=")
            model, params = params, params.parameters()
        if not isinstance(model, (nn.Module, type(None))):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        self._matches: list[Match] = []
        if model is not None:
            self._matches = discover(getattr(model, "_orig_mod", model), include, exclude)
        elif include is not None or exclude is not None:
            raise ValueError("include and exclude choose among the layers of a model: pass model=")
        self._warned = False
        self._layers: dict[nn.Parameter, Layer] = {}
        self._stages: dict[nn.Parameter, Stage] = {}
        super().__init__(params, defaults)
        if model is not None and not self._layers:
            warnings.warn("no layer of the model is covered: the fallback rule trains everything, "
                          "see coverage()", stacklevel=2)  # fmt: skip
        self._fallback.prepare(self.param_groups, self._covered(), self.state)
        self._attach()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; options it does not set are those of the constructor.

        Raises:
            ValueError: An option is out of its range, or a parameter is in another group already.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        own = {name: value for name, value in param_group.items() if name != "params"}
        merged = {**self._given, **own}
        group = {**param_group, **forms.resolve_options(merged)}
        super().add_param_group(group)
        members = set(group["params"])
        covered = False
        for match in self._matches:
            if match.layer is not None and match.bind(members):
                covered = True
                self._layers.setdefault(match.layer.weight, match.layer)
                self._stages.setdefault(match.layer.weight, Stage())
        group["fallback_decays"] = not covered  # weight decay is for the layers, if there are any
        if not covered:
            group["weight_decay"] = merged["weight_decay"] or 0.0
        layers = any(match.layer is not None for match in self._matches)
        if covered or (layers and own.get("lr") is None):  # lr is that of the layers
            lr = float(group["lr"]) or forms.FORMS[group["form"]]["lr"]
            group["fallback_ratio"] = group["fallback_lr"] / lr
        else:
            group["lr"] = group["fallback_lr"] if merged["lr"] is None else group["lr"]
            group["fallback_ratio"] = 1.0
        self._index_groups()

    def _index_groups(self) -> None:
        """Whose options a covered weight follows; again whenever the groups are new objects."""
        self._group_of = {
            p: group for group in self.param_groups for p in group["params"] if p in self._layers
        }
        self._fallback.reset()

    def _attach(self) -> None:
        """What a new object needs besides its saved parts: hooks, that end with it, and buffers."""
        self._workspace: Workspace = {}
        observed = [match for match in self._matches if match.layer is not None]
        handles = [
            match.module.register_forward_hook(
                ForwardHook(match.layer, self._observe), prepend=True, with_kwargs=True
            )
            for match in observed
        ]
        weakref.finalize(self, remove_all, handles).atexit = False
        if handles and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what was compiled without the hooks would never call them

    def _observe(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Summarises the input of one forward, to be committed when its gradient comes."""
        weight = layer.weight
        group = self._group_of.get(weight)
        if group is None or not weight.requires_grad or not summarisable(x, output):
            return
        stage = self._stages[weight]
        if weight.grad is None and stage.calls and not in_backward():
            stage.clear()  # the gradient was dropped, and so was the step
        x = x.detach()
        images = layer.images(x)
        size = images.shape[0] * (layer.positions(images) if group["summary"] == "sketch" else 1)
        offset = stage.reserve(size, in_backward())
        seed = group["seed"] + _SEED_STRIDE * (1 + layer.index + (self._steps_of(weight) << 16))
        summary = summarise(
            layer, images, group["summary"], group["rank"], seed & (2**63 - 1), offset
        )
        rows, version, counted = None, 0, 0
        if layer.factors_pay(x, group["dtype"]):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            version = rows._version

        def commit(gradients: tuple[Tensor | None, ...]) -> None:
            nonlocal counted
            gradient = gradients[slot]
            if gradient is None or counted == stage.generation:
                return
            counted, factors = stage.generation, None
            if rows is not None and weight.grad is None and gradient.dtype == rows.dtype:
                factors = Factors(rows, gradient.reshape(len(rows), -1), version)
            stage.commit(summary, offset + size, factors)

        # what `output.register_hook` does, at half its cost
        slot, node = output.output_nr, output.grad_fn
        assert node is not None
        node.register_prehook(commit)

    def _steps_of(self, weight: nn.Parameter) -> int:
        state = self.state.get(weight)
        return state["step"] if state else 0

    # -- the step ---------------------------------------------------------------------------------

    @torch._disable_dynamo  # unlike torch.compiler.disable, it leaves the import of dynamo to use
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
        self._fallback.prepare(self.param_groups, self._covered(), self.state)
        self._fallback.step(self.param_groups, self.state)  # first: it may refuse a gradient
        moves = []
        for weight, layer in self._layers.items():
            stage = self._stages[weight]
            if weight.grad is not None:
                group = self._group_of[weight]
                if not self._warned and stage.overshoots(group):
                    self._warned = True
                    warnings.warn(_OVERSHOOT.format(**group), stacklevel=5)
                state = self._ensure_state(layer, group)
                state["step"] += 1
                moves.append(Move(layer, group, state, stage.summary, stage.factors))
            stage.clear()
        if moves:
            step_layers(moves, self._workspace)
        # a graph that needs the old values notices
        torch.autograd.graph.increment_version([p for m in moves for p in m.layer.parameters()])
        return loss

    def _covered(self) -> set[nn.Parameter]:
        """What the RLS rule moves: weights, and biases in `P` unless their weight is frozen."""
        return {
            p
            for weight, layer in self._layers.items()
            for p in layer.parameters()
            if p is weight or weight.grad is not None or p.grad is None
        }

    def _ensure_state(self, layer: Layer, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[layer.weight]
        if "P" not in state:
            state.update(initial_state(layer, group))
            for bias in layer.parameters()[1:]:
                self.state[bias] = self.state.get(bias) or dict(IN_P)
        elif layer.weight.dtype == torch.float64 and state["P"].dtype != torch.float64:
            state.update({k: v.double() for k, v in state.items() if isinstance(v, Tensor)})
        return state

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
        self._fallback.restart(self.state)
        for group in self.param_groups:
            lr, first = group["lr"], group.get("initial_lr", group["lr"])
            if not isinstance(lr, Tensor):
                group["lr"] = first
            elif isinstance(first, Tensor):  # in place, as a captured step reads it
                lr.copy_(first)
            else:
                lr.fill_(first)  # which unlike copy_ waits for no GPU

    # -- what users look at -----------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them what was staged for the step."""
        super().zero_grad(set_to_none)
        for stage in self._stages.values():
            stage.clear()

    def _find(self, layer: nn.Module | str) -> Layer:
        for match in self._matches:
            if match.module is layer or match.name == layer:
                if match.layer is None or match.layer.weight not in self._layers:
                    reason = match.reason or "its weight is in no parameter group"
                    raise ValueError(
                        f"{match.name!r} has no inverse autocorrelation matrix: {reason}"
                    )
                return self._layers[match.layer.weight]
        raise ValueError(f"{layer!r} is no layer of the optimizer's model")

    def inverse_autocorrelation(self, layer: nn.Module | str) -> Tensor:
        """The live matrix `P` of a layer, without a copy.

        Args:
            layer: The module, or its qualified name.

        Returns:
            [n, n], or [groups, n, n] for a grouped convolution; the last row and column are the
            bias' where the layer has one.

        Raises:
            ValueError: The RLS rule does not cover it.
        """
        found = self._find(layer)
        return self._ensure_state(found, self._group_of[found.weight])["P"]

    def coverage(self) -> Coverage:
        """How each module of the model is trained, why, and the bytes of its `P`."""
        members = {p for group in self.param_groups for p in group["params"]}
        return coverage_of(self._matches, self._group_of, members)

    def health(self) -> Health:
        """The health of every `P`; reads counters from the device, so it waits for it."""
        return Health(
            (layer.name, health_of(state["P"], state["health"]))
            for layer, state in ((la, self.state.get(w)) for w, la in self._layers.items())
            if state
        )

    # -- persistence ------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, keeping the dtype of `P` whatever that of the parameters.

        Raises:
            ValueError: The state is not of an optimizer over these parameters; nothing is changed.
        """
        with guarded_load(self, self._layers, self._fallback.entries):
            super().load_state_dict(state_dict)

    def __getstate__(self):
        own = ("_given", "_fallback", "_matches", "_layers", "_warned")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state):
        super().__setstate__(state)
        if "_layers" in state:  # unpickled or deep-copied, not load_state_dict
            self._stages = {weight: Stage() for weight in self._layers}
            self._attach()
        self._index_groups()
