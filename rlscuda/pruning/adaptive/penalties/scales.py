"""Which scale belongs to which unit: a norm's weight, or a gate on what makes the channel.

A *gate* is a factor of one, at first, that is kept in the weights it multiplies: the rows of the
layers that make a channel, or the last affine map of a branch. So a model has no part that it did
not have, and a gate at zero is a row of zeros. Every scale is tried on a copy of random weights:
at zero the model must put out what it does without the unit, or a constant must be all that is left
of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda._torch import BatchNorm, Convolution, InstanceNorm, own_buffers, own_parameters
from rlscuda.pruning.blocks.finding import Block
from rlscuda.pruning.couplings import Coupling, Member, Structure
from rlscuda.pruning.running.calls import ExampleInputs, call, isolated_copy, output_tensors
from rlscuda.pruning.structure.statistics import WithoutStatistics
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.transaction import pruned_copy

_NORMS = (BatchNorm, InstanceNorm, nn.GroupNorm, nn.LayerNorm)
_TOLERANCE = 1e-3  # of the largest output, as couplings are tried


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a parameter.

    Attributes:
        name: Of the parameter.
        index: Those of each unit, int64 [units, k].
    """

    name: str
    index: Tensor


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of the units of a coupling, or of a block.

    Attributes:
        rows: Weights of norms, each of which is a scale; or all that a gate multiplies.
        gated: Whether a gate of one number a unit multiplies them.
    """

    rows: list[Rows]
    gated: bool


class NoScale(Exception):
    """A unit has no scale that takes it out; says why."""


@torch.no_grad()
def channel_scales(
    structure: Structure, coupling: Coupling, inputs: ExampleInputs, random: nn.Module
) -> Scales:
    """The scales of a coupling.

    Args:
        structure: The model's couplings.
        coupling: One of them.
        inputs: What the model can be called with.
        random: See `with_random_values`.

    Raises:
        NoScale: None takes its channels out.
    """
    modules = dict(structure.model.named_modules())
    norms = [m for m in coupling.members if isinstance(modules.get(m.name), _NORMS)]
    weights = _rows(norms, modules, ("weight",))
    if weights and _takes_out(structure, coupling, _rows(norms, modules), inputs, random):
        return Scales(weights, gated=False)
    makers = [m for m in coupling.members if m.kind in ("out", "both") and _makes(modules, m)]
    for members in (makers, [*makers, *norms]):  # norms shift what they are given, zeros too
        rows = _rows(members, modules)
        if rows and _takes_out(structure, coupling, rows, inputs, random):
            return Scales(rows, gated=True)
    others = {m.name for m in coupling.members if m.kind != "in"} - {m.name for m in makers}
    if makers and others <= {m.name for m in norms}:
        return Scales(_rows(makers, modules), gated=True)  # what is left of it is a constant
    raise NoScale("linear layers, convolutions and norms are not all that makes its channels")


@torch.no_grad()
def block_scales(
    model: nn.Module, block: Block, inputs: ExampleInputs, random: nn.Module
) -> Scales:
    """The gate of a block: it multiplies weight and bias of the last affine map of its branch.

    Args:
        model: The model.
        block: One of it.
        inputs: What the model can be called with.
        random: See `with_random_values`.

    Raises:
        NoScale: No map's weight and bias scale what the branch puts out.
    """
    exit_module = model.get_submodule(block.exit)
    whole = _put_out(random, block.exit, inputs)
    for name, module in reversed(list(exit_module.named_modules(prefix=block.exit))):
        own = [n for n in ("weight", "bias") if own_parameters(module).get(n) is not None]
        if "weight" not in own:
            continue
        sizes = {n: len(getattr(module, n)) for n in own}
        rows = [Rows(f"{name}.{n}", torch.arange(sizes[n])[None]) for n in own]
        halved = isolated_copy(random)
        for one in rows:
            halved.get_parameter(one.name).mul_(0.5)
        if _close(_put_out(halved, block.exit, inputs), [0.5 * t for t in whole]):
            return Scales(rows, gated=True)
    raise NoScale("no weight and bias scale what its branch puts out")


@torch.no_grad()
def with_random_values(model: nn.Module) -> nn.Module:
    """A copy in eval mode that no channel and no branch of is switched off; always the same."""
    copy, generator = isolated_copy(model).eval(), torch.Generator("cpu").manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device="cpu").to(like)

    for parameter in copy.parameters():
        if parameter.is_floating_point():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(random(parameter) / fan_in**0.5)
    for module in copy.modules():
        mean, variance = (own_buffers(module).get(f"running_{n}") for n in ("mean", "var"))
        if mean is not None and variance is not None:
            mean.copy_(0.3 * random(mean))
            variance.copy_(0.5 + random(variance).abs())
    return copy


def _makes(modules: Mapping[str, nn.Module], member: Member) -> bool:
    """Whether the rows of a member's weight are what makes each channel."""
    module: Any = modules.get(member.name)
    kind = isinstance(module, (nn.Linear, Convolution))
    return kind and not getattr(module, "transposed", False)


def _rows(
    members: Sequence[Member],
    modules: Mapping[str, Any],
    names: Sequence[str] = ("weight", "bias"),
) -> list[Rows]:
    """The rows of the members' own parameters, those of shared ones once."""
    found: dict[int, Rows] = {}
    for member in members:
        for name in names:
            parameter = own_parameters(modules[member.name]).get(name)
            if parameter is not None:
                found.setdefault(id(parameter), Rows(f"{member.name}.{name}", member.indices))
    return list(found.values())


def _takes_out(
    structure: Structure,
    coupling: Coupling,
    rows: Sequence[Rows],
    inputs: ExampleInputs,
    random: nn.Module,
) -> bool:
    """Whether half of the units are gone where these rows are zero."""
    half = list(range(0, coupling.units, 2))[: coupling.units - 1]
    zeroed = isolated_copy(random)
    for one in rows:
        zeroed.get_parameter(one.name)[one.index[half].flatten()] = 0
    surgery = plan(structure, {coupling.name: half})
    cut = pruned_copy(random, surgery, {})
    with WithoutStatistics():
        wanted = output_tensors(call(cut, surgery.slice_inputs(inputs)))
        return _close(output_tensors(call(zeroed, inputs)), wanted)


def _put_out(model: nn.Module, name: str, inputs: ExampleInputs) -> list[Tensor]:
    """What a module puts out first, in each of its calls."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append(output_tensors(output)[0].clone())
    )
    try:
        call(model, inputs)
    finally:
        handle.remove()
    return seen


def _close(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(got) == len(wanted) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= _TOLERANCE * float(b.abs().max())
        for a, b in zip(got, wanted)
        if b.numel() and b.is_floating_point()
    )
