"""Where a model keeps weights: one place a module, one a weight of a recurrent module."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from rlscuda._torch import has_own_forward, own_parameters
from rlscuda.optim.kinds.modules import base_of, is_transposed
from rlscuda.optim.kinds.padded import is_padded_convolution
from rlscuda.optim.kinds.recurrent import RECURRENT, hides, weights_of
from rlscuda.optim.ranks.shards import refusal_of_shards

_FLAT = "its weight is a part of a flat one, of FullyShardedDataParallel: use fully_shard"


@dataclass(frozen=True)
class Place:
    """A module with parameters of its own, or one weight of those of a recurrent module.

    Attributes:
        owner: Qualified name of the module.
        module: The module.
        weight: Name of the weight in the module.
        bias: Name of the bias.
        several: Whether the module has other places too, and so only these two are of this one.
    """

    owner: str = field(compare=False)
    module: nn.Module
    weight: str = "weight"
    bias: str = "bias"
    several: bool = False

    @property
    def name(self) -> str:
        """Qualified name, of the weight where there are several."""
        return ".".join(filter(None, (self.owner, self.weight))) if self.several else self.owner

    @property
    def own_weight(self) -> nn.Parameter | None:
        """The weight, where it is a plain parameter of the module."""
        return own_parameters(self.module).get(self.weight)

    @property
    def own_bias(self) -> nn.Parameter | None:
        """The bias, likewise."""
        return own_parameters(self.module).get(self.bias)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that lie here."""
        everything = [self.own_weight, self.own_bias]
        own = everything if self.several else own_parameters(self.module).values()
        return [p for p in own if p is not None]


def places_in(model: nn.Module) -> list[Place]:
    """Every place of a model's parameters, those included that have been put elsewhere."""
    holders = [(name, module) for name, module in model.named_modules() if own_parameters(module)]
    return [place for name, module in holders for place in _places_of(name, module)]


def _places_of(name: str, module: nn.Module) -> list[Place]:
    base = base_of(module)
    if base in RECURRENT and not has_own_forward(module, base):
        weights = {weight: weight.replace("weight", "bias") for weight in weights_of(module)}
        return [Place(name, module, w, bias, several=True) for w, bias in weights.items()]
    prefix = "in_proj_" if base is nn.MultiheadAttention else ""
    return [Place(name, module, f"{prefix}weight", f"{prefix}bias")]


def refusal(place: Place) -> str | None:
    """Why the RLS rule cannot train the weight of a place, or None where it can."""
    module = place.module
    kind = type(module).__name__
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention uses its weight without calling it"
    if "_flat_param" in own_parameters(module):
        return _FLAT
    base = base_of(module)
    if base is None:
        return f"no RLS rule for {kind}"
    if has_own_forward(module, base) and not is_padded_convolution(module):
        return f"{kind} has a forward of its own"
    if own_parameters(module).get("q_proj_weight") is not None:
        return "its query, key and value have weights of their own"
    if base in RECURRENT and hides(module, place.weight):
        return "its input stays inside of the module"
    weight = place.own_weight
    if weight is None:
        return "its weight is not a plain parameter (parametrised or masked)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet: run one batch through a lazy module first"
    if weight.dim() != _dimensions(base):
        return _FLAT
    if weight.numel() == 0:
        return "its weight has no elements"
    if not weight.is_floating_point() or weight.is_sparse:
        return f"its weight is {weight.dtype}, {weight.layout}"
    return refusal_of_shards(weight, getattr(module, "groups", 1), is_transposed(module))


def _dimensions(base: type[nn.Module]) -> int:
    """Of the weight of a module."""
    dimensions: dict[type[nn.Module], int] = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
    return dimensions.get(base, 2)
