"""What the pruning benchmark compares: our pruner, and the importances of torch-pruning.

Every method removes the same number of channels of every layer, those of the classifier excepted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlscuda
from benchmarks.common.data import Split
from rlscuda.pruning import RLSPruner, SketchTracker

SCORED = 1000  # training images that gradients for Taylor are taken on
SQUARED = 256  # those whose squared gradients the Hessian score is formed of, one at a time
CALIBRATED = (
    4000  # those that an exact matrix is accumulated from; those with batch norm take a quarter
)
ESTIMATED = 2000  # those that the statistics of batch norm are re-estimated on


@dataclass
class Subject:
    """A trained network to be pruned, and all that a method may read.

    Attributes:
        model: The network; a method changes it.
        example: One image.
        split: Training images.
        gradients: By kind, the gradients that scores read; shared by copies of the network.
        optimizer: What trained it, where the method is ours.
        tracker: The sketch tracked beside its training, likewise.
    """

    model: nn.Module
    example: Tensor
    split: Split
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    optimizer: rlscuda.RLSOptimizer | None = None
    tracker: SketchTracker | None = None

    def batches(self, count: int, size: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
        """The first training images and their labels."""
        yield from zip(self.split.x[:count].split(size), self.split.y[:count].split(size))

    def differentiate(self, kind: str) -> None:
        """Fill the parameters' gradients: of the loss, or squared and averaged over images."""
        if kind not in self.gradients:
            self.gradients[kind] = _gradients(self, squared=kind == "squares")
        for parameter, gradient in zip(self.model.parameters(), self.gradients[kind]):
            parameter.grad = gradient.clone()


def _gradients(subject: Subject, squared: bool) -> list[Tensor]:
    """Means over training images, in eval mode, of the gradients or of their squares."""
    model, count = subject.model.eval(), SQUARED if squared else SCORED
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in subject.batches(count, 1 if squared else 100):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        for sum_, g in zip(total, torch.autograd.grad(loss, list(model.parameters()))):
            sum_ += g.square() if squared else g
    return [sum_ / count for sum_ in total]


def classifier(model: nn.Module) -> nn.Linear:
    """The last linear layer, whose outputs are the classes."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def removed(channels: int, ratio: float) -> int:
    """Channels that a ratio removes, as `RLSPruner` counts them."""
    return int(ratio * channels + 1e-9)


def ours(subject: Subject, ratio: float, **options: Any) -> None:
    """Prune by `RLSPruner`."""
    assert subject.tracker is not None
    subject.tracker.detach()  # its matrices stay
    if options.get("source") == "sketch":
        options["tracker"] = subject.tracker
    if options.get("source") == "calibration":
        large = any(isinstance(m, nn.BatchNorm2d) for m in subject.model.modules())
        options["loader"] = list(subject.batches(CALIBRATED // 4 if large else CALIBRATED))
    if options.get("importance") == "taylor":
        subject.differentiate("loss")
    RLSPruner(subject.model, subject.optimizer, subject.example, ratio=ratio, **options).step()


def theirs(subject: Subject, ratio: float, importance: str, reads: str = "", **options) -> None:
    """Prune by an importance of torch-pruning, each layer by itself.

    Args:
        subject: What is pruned.
        ratio: Share of channels to remove.
        importance: Name of a class in `torch_pruning.importance`.
        reads: The gradients that it reads, `loss` or `squares`. The Hessian score is given the
            mean square itself: its own accumulation, in release 1.6.1, keeps the last image only.
        options: Of the importance.
    """
    import torch_pruning

    if reads:
        subject.differentiate(reads)
    score = getattr(torch_pruning.importance, importance)(**options)
    fallback = torch_pruning.importance.GroupMagnitudeImportance()  # for layers without batch norm
    last = classifier(subject.model)
    counts = {m: c for m in subject.model.modules() if m is not last and (c := channels(m))}
    # of C channels it keeps int(C * (1 - share)): half a channel guards against rounding
    shares = {m: (removed(c, ratio) - 0.5) / c for m, c in counts.items()}
    pruner = torch_pruning.pruner.BasePruner(
        subject.model,
        subject.example,
        importance=lambda group: fallback(group) if (s := score(group)) is None else s,
        pruning_ratio_dict=shares,
        ignored_layers=[last],
    )
    pruner.step()


def channels(module: nn.Module) -> int:
    """Output channels of a layer that has weights of its own to lose."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else 0


def untrained(subject: Subject, ratio: float) -> None:
    """Leave only the pruned architecture, newly initialised."""
    theirs(subject, ratio, "RandomImportance")
    for module in subject.model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


@torch.no_grad()
def reestimate(model: nn.Module, split: Split) -> None:
    """Set the statistics of batch norm to their means over the training images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    for x in split.x[:ESTIMATED].split(100) if norms else ():
        model(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        title: How tables name it.
        prune: What it does with a subject and a ratio.
        recovery: The optimizers that train what is left for one epoch, see `RECOVERIES`.
        needs_norm: Whether it only applies to networks with batch norm.
        live: Whether it prunes the optimizer along, and may read it and the tracker.
    """

    title: str
    prune: Callable[[Subject, float], None]
    recovery: tuple[str, ...] = ()
    needs_norm: bool = False
    live: bool = False


def _ours(title: str, recovery: tuple[str, ...] = ("same",), **options: Any) -> Method:
    return Method(title, functools.partial(ours, **options), recovery, live=True)


def _theirs(title: str, importance: str, needs_norm: bool = False, **options: Any) -> Method:
    prune = functools.partial(theirs, importance=importance, **options)
    return Method(title, prune, ("rls", "adam"), needs_norm)


METHODS = {
    "sketch": _ours("ours, sketch", ("same", "rls"), source="sketch"),
    "own": _ours("ours, own P", source="own"),
    "calibration": _ours("ours, calibration", (), source="calibration"),
    "in_turn": _ours("ours, calibration, in turn", (), source="calibration", compensate="in turn"),
    "zero": _ours("ours, zero only", (), source="sketch", compensate=False),
    "compensated_taylor": _ours(
        "Taylor + our compensation", (), source="sketch", importance="taylor"
    ),
    "l1": _theirs("L1 magnitude", "GroupMagnitudeImportance", p=1),
    "l2": _theirs("L2 magnitude", "GroupMagnitudeImportance", p=2),
    "taylor": _theirs("Taylor", "GroupTaylorImportance", reads="loss"),
    "hessian": _theirs("Hessian", "GroupHessianImportance", reads="squares"),
    "bn_scale": _theirs("batch-norm scale", "BNScaleImportance", needs_norm=True),
    "random": _theirs("random", "RandomImportance"),
}
BASELINES = ("l1", "l2", "taylor", "hessian", "bn_scale", "random")
# optimizer of the epoch of recovery -> (title, the learning rates it is tuned over)
RECOVERIES = {
    "same": ("the restarted RLSOptimizer", (0.01, 0.03, 0.1)),
    "rls": ("new RLSOptimizer", (0.03, 0.1, 0.2)),
    "adam": ("Adam", (1e-3, 3e-3, 1e-2)),
}
