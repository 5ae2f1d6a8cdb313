"""`SketchTracker`: inverse autocorrelation matrices kept up to date beside any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda import functional as RF
from rlscuda.optim import hooks
from rlscuda.optim.kept import Kept, KeptLayer
from rlscuda.optim.layers import Layer
from rlscuda.optim.staging import summarisable, summarise
from rlscuda.pruning.matrices.calibration import Matrices, pruning_layers

_DEAD = 1e-12  # mean squared input taken for the noise of a layer that never fires


@dataclass
class Track:
    """What is known of one layer: P [groups, n, n] of the input over the root of its mean power.

    Attributes:
        P: As above.
        power: Running mean of the squared input [groups].
        seen: Forwards taken in.
    """

    P: Tensor
    power: Tensor
    seen: int = 0


class SketchTracker:
    r"""Tracks the inverse autocorrelation of every layer's input while something else trains it.

    Each differentiated forward in training mode (so not one under no_grad, and a checkpointed
    segment once) enters through `rank` random-sign sums S of its im2col rows, without the im2col
    matrix: :math:`R \leftarrow (1 - \kappa_t) R + \kappa_t S^T S / r`, with
    :math:`\kappa_t = \max(1 - forgetting, 1 / (t + 2))`: all forwards weigh the same until there
    are 1 / (1 - forgetting) of them, then old ones fade. White noise of `damping` times the mean
    power is added to every sketch, so R is damped as a calibration is, and inputs that stop firing
    stay bounded; R starts as one forward of that noise alone.

    What is remembered, rank / (1 - forgetting) rows, should be several times the widest n.

    Args:
        model: The model. The tracker's hooks end with the tracker.
        rank: Rows of a sketch.
        forgetting: What remains of the past after a forward, in (0, 1).
        layers: Names (shell patterns) or modules to which this is limited; by default every Linear
            and convolution that an RLS rule could cover, whoever trains it, with a mask or without.
        damping: Relative to the mean power of the layer's input, > 0.
        seed: Of the random signs and the noise; the global random state is not used.
        dtype: Of P: float32 or float64.

    Raises:
        TypeError: `model` is no module.
        ValueError: An option is out of its range, or a layer cannot be covered.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> tracker = SketchTracker(model)
        >>> model(torch.randn(8, 4)).sum().backward()
        >>> {name: list(P.shape) for name, P in tracker.matrices().items()}
        {'0': [1, 5, 5], '2': [1, 4, 4]}
    """

    kind = "sketch"  # of the matrices, in reports
    _others = False  # whether layers may be tracked that no RLS rule trains

    def __init__(
        self,
        model: nn.Module,
        rank: int = 16,
        forgetting: float = 0.999,
        layers: Iterable[str | nn.Module] | None = None,
        damping: float = 1e-3,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an int >= 1, got {rank!r}")
        if not 0 < forgetting < 1:
            raise ValueError(f"forgetting must be in (0, 1), got {forgetting}")
        if not 0 < damping < float("inf"):
            raise ValueError(f"damping must be > 0 and finite, got {damping}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.rank, self.forgetting, self.damping = rank, forgetting, damping
        self.seed, self.dtype = seed, dtype
        found = pruning_layers(model, layers, others=self._others)
        self._layers = {layer.name: layer for layer in found}
        self._tracks: dict[str, Track] = {}
        self._finalizer = hooks.attach(self, self._layers.values(), self._observe)
        hooks.forget_compiled(model)

    @property
    def layers(self) -> tuple[str, ...]:
        """Qualified names of the layers that are tracked."""
        return tuple(self._layers)

    def detach(self) -> None:
        """Takes the hooks off the model; the matrices stay."""
        self._finalizer()

    @torch.no_grad()
    def _observe(self, layer: Layer, x: Tensor, outputs: list[Tensor]) -> None:
        """Takes in the input of one forward."""
        if not (layer.module.training and summarisable(x, outputs)):
            return
        track = self._tracks.get(layer.name) or self._fresh(layer, x.device)
        device, seed = x.device, self._seed_of(layer, track.seen)
        images = layer.images(x.detach())
        rows = summarise(layer, images, "sketch", self.rank, seed, 0).rows.to(self.dtype)
        if rows.shape[-1] != track.P.shape[-1] or rows.shape[0] != track.P.shape[0]:
            raise RuntimeError(
                f"{layer.name!r} has input rows {list(rows.shape[::2])}, its matrix is "
                f"{list(track.P.shape)}: call follow() after pruning"
            )
        if track.P.device != device:
            track.P, track.power = track.P.to(device), track.power.to(device)
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(rows.shape, generator=generator, dtype=self.dtype, device=device)
        power = rows.square().mean((1, 2), keepdim=True).clamp(min=_DEAD)
        rows = torch.addcmul(rows, noise, (self.damping * power).sqrt())
        gain = max(1 - self.forgetting, 1 / (track.seen + 2))
        RF.rls_update_(
            track.P, rows, 1 - gain, gain, initial_scale=1 / self.damping, power=track.power
        )
        track.seen += 1
        self._tracks[layer.name] = track

    def _fresh(self, layer: Layer, device: torch.device) -> Track:
        start = torch.eye(layer.fan_in, dtype=self.dtype, device=device) / self.damping
        return Track(
            start.repeat(layer.groups, 1, 1),
            torch.zeros(layer.groups, dtype=self.dtype, device=device),
        )

    def _seed_of(self, layer: Layer, seen: int) -> int:
        place = self.seed * 0x9E3779B97F4A7C15 + (layer.index << 40) + seen
        return (place * 0xBF58476D1CE4E5B9) & (2**63 - 1)

    def matrices(self) -> Matrices:
        """The matrices of every layer that has seen a forward.

        Returns:
            float64 [groups, n, n] by layer name, on the layer's device, in the units of its input;
            the last column is the bias' where the layer has one of its own.
        """
        return {
            name: track.P.double() / track.power.double()[:, None, None]
            for name, track in self._tracks.items()
        }

    def kept_columns(self, kept: Mapping[str, Kept]) -> dict[str, Tensor]:
        """The columns for `follow`, of each layer that loses some.

        Args:
            kept: By name of a parameter, what is to be kept of it; before it is cut.
        """
        layers = {
            name: KeptLayer.of(layer, kept[f"{name}.weight"])
            for name, layer in self._layers.items()
            if f"{name}.weight" in kept
        }
        return {
            name: layer.inputs
            for name, layer in layers.items()
            if len(layer.inputs) < layer.layer.groups * layer.layer.columns
        }

    def follow(self, kept: Mapping[str, Tensor]) -> None:
        """Follows a model whose layers were pruned in place: each P is downdated, none forgotten.

        Call it after the modules have their new weights. All matrices are made and checked before
        any is replaced.

        Args:
            kept: By layer name, the im2col columns that are left: int64 [k], in the order of
                `F.unfold` over all channels of the former input (of all groups), ascending and
                without the bias. A group of which nothing is left is dropped. Layers that are not
                named keep all of theirs.

        Raises:
            ValueError: A name is not tracked, columns are out of range, not ascending or not as
                many in each group, or do not fit the module as it is now.
        """
        unknown = sorted(set(kept) - set(self._layers))
        if unknown:
            raise ValueError(f"kept names {unknown}, which are not tracked")
        fresh: dict[str, Track] = {}
        for name, layer in self._layers.items():
            now = type(layer)(name, layer.module, layer.index, layer.bias)
            track = self._tracks.get(name)
            if track is None:
                continue
            if name in kept:
                own = KeptLayer.of_columns(layer, kept[name].cpu())
                P = own.matrix(track.P).reshape(-1, *own.matrix_shape[-2:])
                power = track.power[own.groups.to(P.device)]
                track = Track(P, power, track.seen)
            wanted = (now.groups, now.fan_in, now.fan_in)
            if track.P.shape != wanted:
                raise ValueError(
                    f"kept of {name!r} must leave {list(wanted)} as the module is now, got "
                    f"{list(track.P.shape)}"
                )
            fresh[name] = track
        self._tracks = fresh
        for layer in self._layers.values():
            layer.__post_init__()  # the hooks hold the object: it takes the new weight in

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that `load_state_dict` needs to go on exactly."""
        return {
            name: {"P": t.P.clone(), "power": t.power.clone(), "seen": t.seen}
            for name, t in self._tracks.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the matrices of another tracker of the same model and rank.

        Raises:
            ValueError: A layer is not tracked, or what is given for one is not what `state_dict`
                gives, or of another shape; nothing is changed.
        """
        fresh = {}
        for tracked in self._layers.values():
            tracked.__post_init__()  # the module may have been pruned, or brought back, since
        for name, state in state_dict.items():
            layer = self._layers.get(name)
            if layer is None:
                raise ValueError(f"state_dict names {name!r}, which is not tracked")
            if not isinstance(state, Mapping) or not {"P", "power", "seen"} <= state.keys():
                got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
                raise ValueError(f"the state of {name!r} must have P, power and seen, got {got}")
            wanted = (layer.groups, layer.fan_in, layer.fan_in)
            if state["P"].shape != wanted or state["power"].shape != wanted[:1]:
                raise ValueError(
                    f"P of {name!r} must be {list(wanted)}, got {list(state['P'].shape)}"
                )
            device = layer.weight.device
            P, power = (state[k].to(device, self.dtype, copy=True) for k in ("P", "power"))
            fresh[name] = Track(P, power, state["seen"])
        self._tracks = fresh
