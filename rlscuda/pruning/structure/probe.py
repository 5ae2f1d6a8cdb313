"""Tries the couplings of a model: without their channels it must do as with their weights at zero.

Statistics over channels, as those of a layer norm, see the difference rightly, and are left out of
the comparison. What is computed for training alone, as by an auxiliary head, is tried too: it must
run and put out the same shapes.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rlscuda._torch import own_buffers
from rlscuda.optim.kept import Kept
from rlscuda.pruning.couplings import Structure
from rlscuda.pruning.running.calls import (
    ExampleInputs,
    all_tensors,
    call,
    isolated_copy,
    map_tensors,
    output_tensors,
    rng_kept,
    train_but_norms,
)
from rlscuda.pruning.structure.statistics import WithoutStatistics
from rlscuda.pruning.surgery.plan import Surgery, plan

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_MIXED = (
    "without its channels the model computes something else than with their weights at zero: an "
    "operation between channels (a softmax or maximum over them, a place that is written into the "
    "forward), or a weight used outside of its module"
)
_OTHERS = re.compile(r"[/\\\\](torch|rlscuda)[/\\\\]")
_LARGE = 20_000_000  # elements of a model that is tried sooner on shapes alone
_PUT_OUT = "the model puts out its channels in training mode"


def unsound(
    structure: Structure,
    example_inputs: ExampleInputs,
    progress: Callable[[str], None] = lambda text: None,
    some: bool = False,
) -> dict[str, str]:
    """Name of each coupling that cannot be pruned -> why.

    Args:
        structure: The couplings.
        example_inputs: What the model can be called with.
        progress: Called with what is tried next.
        some: Whether a few of them will do, which is sooner.
    """
    names = [coupling.name for coupling in structure.couplings if coupling.units > 1]
    found: dict[str, str] = {}
    with rng_kept(structure.model), torch.no_grad():
        probe = _Probe(structure, example_inputs, progress, some)
        for numbers in (False, True) if probe.shapes_alone else (True,):
            while more := probe.search([name for name in names if name not in found], numbers):
                found.update(more)
                if some:
                    return found
    return found


def _shapes(outputs: list[Tensor]) -> list[torch.Size]:
    return [output.shape for output in outputs]


def _distance(expected: Tensor, actual: Tensor) -> float:
    """The largest difference relative to the largest finite value; infinite where only one is."""
    if not expected.is_floating_point():
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    scale = float(expected[finite].abs().max())
    off = float((actual - expected)[finite].abs().max())
    return off / scale if scale else math.inf if off else 0.0


def _said(error: Exception) -> str:
    """What an error says, and the line of the model's own code that it came through last."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _OTHERS.search(frame.filename)
    ]
    if not own:
        return str(error)
    return f"{error} ({'/'.join(Path(own[-1].filename).parts[-2:])}:{own[-1].lineno})"


class _Probe:
    """Tries the couplings of a model on one set of random weights.

    Attributes:
        shapes_alone: Whether the model runs on tensors that have shapes and no numbers, by which
            most couplings of a large one that fail are found.
    """

    def __init__(
        self,
        structure: Structure,
        example_inputs: ExampleInputs,
        progress: Callable[[str], None],
        some: bool,
    ):
        self._progress, self._some_will_do = progress, some
        self._structure = structure
        self._inputs = example_inputs
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._before = all_tensors(structure.model)
        self._statistics: list[torch.Size] | None = None  # which the whole model takes
        for self._dtype in _TOLERANCE:  # a model may insist on one of its own
            self._values = self._random_values()
            try:
                whole = self._copy({}, None)
                self._statistics = self._run(whole, None)[1]
            except Exception as error:
                failure = error
                continue
            self._tolerance = self._noise()
            self._training_shapes = self._shapes_in_training(whole)
            self.shapes_alone = self._runs_on_shapes()
            return
        raise ValueError(f"the model runs neither in float64 nor in float32: {failure}")

    def _noise(self) -> float:
        """How far outputs may differ for rounding alone: a model may compute in float32 inside."""
        least = _TOLERANCE[self._dtype]
        near = {
            tensor: value * (1 + 1e-9 * self._random_like(value))
            for tensor, value in self._values.items()
            if value.dtype is torch.float64
        }
        if not near:
            return least
        runs = [self._run(self._copy(values, None), None)[0] for values in ({}, near)]
        off = max(map(_distance, *runs), default=0.0)
        return min(max(least, 30 * off), _TOLERANCE[torch.float32])

    def _shapes_in_training(self, whole: nn.Module) -> list[torch.Size] | None:
        """Shapes that the whole model puts out in training mode, None where it fails there."""
        try:
            return _shapes(self._run(train_but_norms(whole), None)[0])
        except Exception:  # it may want targets, for instance
            return None

    def _runs_on_shapes(self) -> bool:
        try:
            self._run(self._on_shapes({}, None), None, "meta")
        except Exception:  # it looks at numbers, or makes tensors of its own
            return False
        return sum(tensor.numel() for tensor in self._before.values()) >= _LARGE

    def search(self, names: list[str], numbers: bool) -> dict[str, str]:
        """The couplings among `names` that fail on their own, or else some that fail together.

        Args:
            names: Of couplings.
            numbers: Whether outputs are compared, and not their shapes alone.
        """
        if not names:
            return {}
        self._progress(f"trying {names[0]} and {len(names) - 1} more")
        reason = self._reason(names, numbers)
        if reason is None:
            return {}
        if len(names) == 1:
            return {names[0]: reason}
        first, second = names[: len(names) // 2], names[len(names) // 2 :]
        alone = self.search(first, numbers)
        if not (alone and self._some_will_do):
            alone |= self.search(second, numbers)
        return alone or dict.fromkeys(second, f"it fails together with others: {reason}")

    def _reason(self, names: list[str], numbers: bool) -> str | None:
        """Why these couplings cannot lose one unit each, or up to half; None where they can."""
        halves = {name: self._structure.coupling(name).units // 2 for name in names}
        # of several numbers, so that two that must lose as many as each other are found out
        several = {name: half - i % half for i, (name, half) in enumerate(halves.items())}
        for amounts in (dict.fromkeys(names, 1), several):
            removed = {
                name: self._some(self._structure.coupling(name).units, amount)
                for name, amount in amounts.items()
            }
            try:
                surgery = plan(self._structure, removed)
            except Exception as error:
                return f"it cannot be cut: {error}"
            if reason := self._difference(surgery) if numbers else self._misfit(surgery):
                return reason
        return None

    def _misfit(self, surgery: Surgery) -> str | None:
        """What is wrong with the shapes in a pruned copy."""
        copy = self._on_shapes({self._before[n]: k for n, k in surgery.tensors.items()}, surgery)
        try:
            found = _shapes(self._run(copy, surgery, "meta")[0])
        except Exception as error:
            return f"the pruned model fails: {_said(error)}"
        if [tuple(shape) for shape in found] != self._structure.output_shapes:
            return _MIXED
        return self._failure_in_training(copy, surgery, "meta")

    def _difference(self, surgery: Surgery) -> str | None:
        """What is wrong with a pruned copy, beside one with zeros in place of what is gone."""
        masked, cut = {}, {}
        for name, kept in surgery.tensors.items():
            tensor = self._before[name]
            masked[tensor] = kept.mask(self._values[tensor])
            cut[tensor] = kept.take(self._values[tensor])
        try:
            copy = self._copy(cut, surgery)
            pruned, _ = self._run(copy, surgery)
        except Exception as error:
            return f"the pruned model fails: {_said(error)}"
        if not self._agree(self._run(self._copy(masked, None), None)[0], pruned):
            return _MIXED
        return None if self.shapes_alone else self._failure_in_training(copy, surgery, None)

    def _failure_in_training(
        self, copy: nn.Module, surgery: Surgery, device: str | None
    ) -> str | None:
        """What is wrong with a pruned copy in training mode, where the whole model runs there."""
        if self._training_shapes is None:
            return None
        try:
            shapes = _shapes(self._run(train_but_norms(copy), surgery, device)[0])
        except Exception as error:
            return f"the pruned model fails in training mode: {_said(error)}"
        return None if shapes == self._training_shapes else _PUT_OUT

    def _some(self, count: int, amount: int) -> list[int]:
        shuffled = torch.randperm(count, generator=self._generator, device="cpu")
        return shuffled[:amount].tolist()

    def _copy(self, tensors: dict[Tensor, Tensor], surgery: Surgery | None) -> nn.Module:
        """A copy in eval mode that holds `tensors`, and random values elsewhere."""
        values = {
            old: nn.Parameter(value, value.is_floating_point())
            if isinstance(old, nn.Parameter)
            else value.clone()
            for old, value in {**self._values, **tensors}.items()
        }
        copy = isolated_copy(self._structure.model, values).eval()
        if surgery is not None:
            surgery.set_attributes(copy)
        return copy

    def _on_shapes(self, kept: Mapping[Tensor, Kept], surgery: Surgery | None) -> nn.Module:
        """A copy in eval mode whose tensors have no numbers."""
        empty = {
            old: torch.empty(kept[old].shape if old in kept else old.shape, dtype=value.dtype,
                             device="meta")
            for old, value in self._values.items()
        }  # fmt: skip
        return self._copy(empty, surgery)

    def _run(
        self, copy: nn.Module, surgery: Surgery | None, device: str | None = None
    ) -> tuple[list[Tensor], list[torch.Size]]:
        """The outputs of a copy, and what it takes statistics of; each run by the same seed."""
        inputs = self._inputs if surgery is None else surgery.slice_inputs(self._inputs)
        torch.manual_seed(0)
        with WithoutStatistics(self._statistics) as mode:
            taken = map_tensors(lambda tensor: self._convert(tensor).to(device=device), inputs)
            outputs = output_tensors(call(copy, taken))
        return outputs, mode.shapes

    def _agree(self, whole: list[Tensor], pruned: list[Tensor]) -> bool:
        return len(whole) == len(pruned) and all(
            expected.shape == actual.shape and _distance(expected, actual) <= self._tolerance
            for expected, actual in zip(whole, pruned)
        )

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._dtype) if tensor.is_floating_point() else tensor

    def _random_values(self) -> dict[Tensor, Tensor]:
        """A value for every tensor, so that no channel is dead and no block switched off."""
        values: dict[Tensor, Tensor] = {}
        for tensor in self._before.values():
            values[tensor] = self._convert(tensor)
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
                values[tensor] = self._random_like(tensor) / math.sqrt(fan_in)
        for module in self._structure.model.modules():
            variance, mean = (own_buffers(module).get(f"running_{n}") for n in ("var", "mean"))
            if variance is not None and mean is not None:
                values[mean] = 0.3 * self._random_like(variance)
                values[variance] = 0.5 + self._random_like(variance).abs()
            if isinstance(module, nn.MultiheadAttention):  # no query: the width's scale is nothing
                for parameter in (module.in_proj_weight, module.in_proj_bias):
                    if parameter is not None:
                        values[parameter][: module.embed_dim] = 0
                if module.q_proj_weight is not None:
                    values[module.q_proj_weight].zero_()
        return values

    def _random_like(self, like: Tensor) -> Tensor:
        """Random values of mean 0 and variance 1."""
        values = torch.empty(like.shape, dtype=self._dtype, device="cpu")
        values.uniform_(-math.sqrt(3), math.sqrt(3), generator=self._generator)
        return values.to(like.device)
