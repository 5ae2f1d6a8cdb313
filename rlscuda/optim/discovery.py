"""Finding the layers of a model that the RLS rule covers, and keeping count of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rlscuda.optim.kept import Change, KeptLayer, Replaced
from rlscuda.optim.kinds import owners
from rlscuda.optim.kinds.places import Place, places_in
from rlscuda.optim.kinds.reasons import Users, is_in, reasons_of
from rlscuda.optim.layers import Layer
from rlscuda.optim.staging import Inputs, Stage


@dataclass(eq=False)
class Match:
    """One place of a model's weights: the layer it makes, or why it makes none."""

    place: Place
    layer: Layer | None
    reason: str
    bias_fits: bool = False

    @property
    def name(self) -> str:
        """Qualified name of the place."""
        return self.place.name

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight."""
        return self.place.module

    def renamed(self, place: Place) -> None:
        """Takes the name that the place has now, as where the model has become part of another."""
        self.place = place
        if self.layer is not None:
            self.layer.name = place.name

    def bind(self, group: dict[str, Any]) -> bool:
        """Whether the weight is in a group; the bias joins `P` if it is there too."""
        members = set(group["params"])
        if self.layer is None or self.layer.weight not in members:
            return False
        bias = self.layer.bias_parameter
        fits = self.bias_fits and bias is not None and bias.requires_grad
        self.layer.bias = fits and bias in members
        self.layer.max_fan_in = group["max_fan_in"]
        return True


def _covers(item: str | nn.Module, name: str, named: nn.Module | Place) -> bool:
    return named is item if isinstance(item, nn.Module) else fnmatchcase(name, item)


def as_list(wanted: Any) -> list[Any]:
    """What `include` or `exclude` gave, one item or several."""
    several = isinstance(wanted, Iterable) and not isinstance(wanted, (str, nn.Module))
    return list(wanted) if several else [wanted]


def modules_named(
    wanted: Iterable[str | nn.Module], option: str, model: nn.Module, places: Iterable[Place] = ()
) -> list[tuple[str | nn.Module, set[Any]]]:
    """Each shell pattern or module of a list, with the modules it names and all inside them.

    Patterns name the `places`, too, which are in the sets as they are.
    """
    chosen: list[tuple[str | nn.Module, set[Any]]] = []
    named = _named(model, places)
    for item in as_list(wanted):
        if not isinstance(item, (str, nn.Module)):
            raise TypeError(f"{option} takes names and modules, got {type(item).__name__}")
        hits = [one for name, one in named if _covers(item, name, one)]
        if not hits:
            raise ValueError(f"{option} names {item!r}, which the model does not have")
        inside = (one.modules() if isinstance(one, nn.Module) else (one,) for one in hits)
        chosen.append((item, set().union(*inside)))
    return chosen


def _named(model: nn.Module, places: Iterable[Place]) -> list[tuple[str, nn.Module | Place]]:
    return [*model.named_modules(), *((place.name, place) for place in places)]


def _bias_fits(place: Place, users: Users) -> bool:
    """Whether the bias belongs to the weight alone, so that it may be a column of its rows."""
    weight, bias = place.own_weight, place.own_bias
    if weight is None or bias is None:
        return False
    if (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return False
    holders = [set(users[id(p)]) for p in (weight, bias)]
    return holders[0] == holders[1] and bias.is_contiguous()


def discover(
    model: nn.Module,
    include: Iterable[str | nn.Module] | None,
    exclude: Iterable[str | nn.Module] | None,
) -> list[Match]:
    """Every place of `model` that has parameters, and its layer or the reason for none.

    A name or module in `include` or `exclude` stands for everything inside it.

    Raises:
        ValueError: A name or module is not in the model, or nothing included by it can be covered.
    """
    places = places_in(model)
    wanted = None if include is None else modules_named(include, "include", model, places)
    unwanted = [] if exclude is None else modules_named(exclude, "exclude", model, places)
    matches = _matches(model, places, wanted, unwanted)
    for item, inside in wanted or ():
        found = [match.reason for match in matches if is_in(match.place, inside)]
        if all(found):
            why = found[0] if found else "it has no parameters"
            raise ValueError(f"include names {item!r}, which RLS cannot train: {why}")
    return matches


def rediscover(
    model: nn.Module,
    known: list[Match],
    include: list[str | nn.Module] | None,
    exclude: list[str | nn.Module] | None,
) -> list[Match]:
    """The places of a model that may have changed; layers that are still its own stay as known."""
    places = places_in(model)
    named = _named(model, places)

    def present(items: list[str | nn.Module]) -> list[str | nn.Module]:
        return [item for item in items if any(_covers(item, name, one) for name, one in named)]

    wanted = None if include is None else modules_named(present(include), "include", model, places)
    unwanted = modules_named(present(exclude or []), "exclude", model, places)
    parameters = set(model.parameters())
    layers = {
        match.place: match
        for match in known
        if match.layer is not None and match.layer.weight in parameters
    }
    # a parametrization put on later holds the weight of a layer that is known already
    weights = {match.layer.weight for match in layers.values() if match.layer is not None}
    taken = {match.layer.index for match in layers.values() if match.layer is not None}
    matches = []
    for match in _matches(model, places, wanted, unwanted):
        if match.place in layers:
            place, match = match.place, layers[match.place]
            match.renamed(place)
        elif match.layer is not None:  # its place is what it has in an optimizer made anew
            if match.layer.index in taken:
                match.layer.index = 1 + max(taken)
            taken.add(match.layer.index)
        own = match.place.parameters
        if match.layer is not None or not own or not weights.issuperset(own):
            matches.append(match)
    return matches


def _matches(
    model: nn.Module,
    places: list[Place],
    wanted: list[tuple[Any, set[Any]]] | None,
    unwanted: list[tuple[Any, set[Any]]],
) -> list[Match]:
    included = None if wanted is None else {one for _, inside in wanted for one in inside}
    excluded = {one for _, inside in unwanted for one in inside}
    users: Users = {}
    for place in places:
        for parameter in place.parameters:
            users.setdefault(id(parameter), []).append(place)
    matches: list[Match] = []
    for place, reason in reasons_of(model, places, users, included, excluded).items():
        match = Match(place, None, reason)
        if not reason:
            names = (place.weight, place.bias)
            match.layer = Layer(place.name, place.module, len(matches), bias=False, names=names)
            match.bias_fits = _bias_fits(place, users)
        matches.append(match)
    return matches


@dataclass(eq=False, slots=True)
class Covered:
    """A covered layer as the groups are now.

    Attributes:
        layer: The layer.
        group: The parameter group of its weight.
        stage: What is staged for its next step.
        whole: Whether its bias, if in `P`, is in a group, too.
    """

    layer: Layer
    group: dict[str, Any]
    stage: Stage
    whole: bool


class Registry:
    """The layers that an optimizer covers, as its groups are now.

    Args:
        model: The optimizer's model, or None; no copy or pickle holds it.
        include: See `RLSOptimizer`.
        exclude: See `RLSOptimizer`.
        found: Whether the user has given no model, and so it is found anew for other parameters.

    Attributes:
        matches: Every place of the model that has parameters.
        layers: Weight -> layer, of all that were ever covered.
        stages: Weight -> what is staged for its next step, likewise.
        covered: Weight -> layer, group and stage, of those in a group.
        members: All parameters of the groups.
        inputs: What inputs of different layers have in common.
        idle: Steps in a row in which no parameter of the groups had a gradient.
    """

    def __init__(self, model: nn.Module | None, include: Any, exclude: Any, found: bool = False):
        self._model, self._selection, self._found = model, (include, exclude), found
        self.matches = [] if model is None else discover(model, include, exclude)
        self.layers: dict[nn.Parameter, Layer] = {}
        self.stages: dict[nn.Parameter, Stage] = {}
        self.inputs = Inputs()
        self._bound: set[Match] = set()
        self.forget_groups()

    def forget_groups(self) -> None:
        """Forgets what was seen of the groups."""
        self._groups: list[int] = []  # ids, and those of their parameters
        self._held: list[list[int]] = []
        self.members: set[nn.Parameter] = set()
        self.covered: dict[nn.Parameter, Covered] = {}
        self.idle = 0

    def has_other_groups(self, groups: list[dict[str, Any]]) -> bool:
        """Whether a group came, went or was replaced since; their parameters are not looked at."""
        return [*map(id, groups)] != self._groups

    def follow(
        self, groups: list[dict[str, Any]], may_have_grown: bool, attach: Callable[[], None]
    ) -> list[str]:
        """Reads the groups and their parameters anew where somebody has changed them.

        Args:
            groups: The optimizer's.
            may_have_grown: Whether the model may have got layers since it was searched.
            attach: Puts hooks on what is new; what an interrupt cuts short is done again.

        Returns:
            The layers whose weights have left the groups while others came that are in no module.
        """
        held = [[*map(id, group["params"])] for group in groups]
        if held == self._held and not self.has_other_groups(groups):
            return []
        group_of = {p: group for group in groups for p in group["params"]}
        if may_have_grown and not group_of.keys() <= self.members:
            self.search(list(group_of))
        for match in self.matches:
            if match.layer is None or match in self._bound:
                continue
            group = group_of.get(match.layer.weight)
            if group is not None and match.bind(group):
                self._bound.add(match)
                self.layers.setdefault(match.layer.weight, match.layer)
                self.stages.setdefault(match.layer.weight, Stage())
        gone = [one.layer.name for weight, one in self.covered.items() if weight not in group_of]
        strange = bool(group_of.keys() - self.members - self.known())
        self.covered = {
            p: Covered(own, group, self.stages[p], group_of.keys() >= {*own.parameters()})
            for p, group in group_of.items()
            if (own := self.layers.get(p)) is not None
        }
        attach()
        self.members, self._held, self._groups = set(group_of), held, [*map(id, groups)]
        return gone if strange else []

    def known(self) -> set[nn.Parameter]:
        """The parameters of the model and of its layers."""
        weights = {layer.weight for layer in self.candidates()}  # masked later
        return weights.union(*(match.place.parameters for match in self.matches))

    def search(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        """Looks for layers that the model has got or lost.

        Args:
            parameters: Those of the groups: where no module was given, and they are not all in the
                one that was found, for another.
        """
        model = self._model
        if self._found and not set(parameters) <= set(() if model is None else model.parameters()):
            self._model = owners.find(parameters)[0] or model
        if self._model is not None:
            self.matches = rediscover(self._model, self.matches, *self._selection)

    def count_idle(self) -> int:
        """Notes whether this step has a gradient at all; the idle steps so far."""
        self.idle = 0 if any(p.grad is not None for p in self.members) else self.idle + 1
        return self.idle

    def candidates(self) -> set[Layer]:
        """Every layer of the model that could be covered, in a group or not."""
        return {match.layer for match in self.matches if match.layer is not None}

    def find(self, layer: nn.Module | str) -> Layer:
        """The covered layer of a module or qualified name.

        Raises:
            ValueError: There is none, or there are several.
        """
        hits = [
            match
            for match in self.matches
            if match.module is layer or layer in (match.name, match.place.owner)
        ]
        if not hits:
            raise ValueError(f"{layer!r} is no layer of the optimizer's model")
        if len(hits) > 1:
            names = ", ".join(repr(match.name) for match in hits)
            raise ValueError(f"{layer!r} has several weights: name one of {names}")
        (match,) = hits
        if match.layer is None or match.layer.weight not in self.covered:
            reason = match.reason or "its weight is in no parameter group"
            raise ValueError(f"{match.name!r} has no inverse autocorrelation matrix: {reason}")
        return self.layers[match.layer.weight]

    def cut(
        self, replaced: Replaced
    ) -> tuple[Registry, dict[nn.Parameter, KeptLayer], list[Change]]:
        """The registry of the layers that are left when parameters are replaced by smaller ones.

        Returns:
            The registry; what is kept of each covered layer, by its old weight; and the changes
            of the layers themselves. Nothing is changed yet.
        """

        def new(parameter: Any) -> Any:
            return replaced[parameter][0] if parameter in replaced else parameter

        cut, kept, changes = copy.copy(self), {}, []
        for layer in dict.fromkeys([*self.layers.values(), *self.candidates()]):
            if layer.weight in replaced:  # two layers may have one weight
                own = KeptLayer.of(layer, replaced[layer.weight][1])
                changes += own.changes(new(layer.weight), new(layer.bias_parameter))
                if self.layers.get(layer.weight) is layer:
                    kept[layer.weight] = own
        cut.layers = {new(weight): layer for weight, layer in self.layers.items()}
        cut.stages = {
            new(weight): kept[weight].stage(stage) if weight in kept else stage
            for weight, stage in self.stages.items()
        }
        cut.covered = {
            new(weight): replace(one, stage=cut.stages[new(weight)])
            for weight, one in self.covered.items()
        }
        cut.members, cut._bound = set(map(new, self.members)), set(self._bound)
        cut._held, cut._groups = [], []  # so that the next look reads the new parameters
        return cut, kept, changes

    def without(self, gone: set[nn.Parameter]) -> Registry:
        """The registry when some parameters have left the model; it looks for others next time."""
        left = copy.copy(self)
        left.layers = {weight: one for weight, one in self.layers.items() if weight not in gone}
        left.stages = {weight: one for weight, one in self.stages.items() if weight not in gone}
        left._bound = {
            match
            for match in self._bound
            if match.layer is not None and match.layer.weight not in gone
        }
        left.forget_groups()
        return left

    def clear(self) -> None:
        """Forgets everything staged."""
        self.inputs.clear()
        for stage in self.stages.values():
            stage.clear()

    def __copy__(self):
        copied = object.__new__(Registry)
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self):
        own = ("matches", "layers", "_bound", "_selection")
        return {name: self.__dict__[name] for name in own}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._model, self._found, self.inputs = None, False, Inputs()
        self.stages = {weight: Stage() for weight in self.layers}
        self.forget_groups()
