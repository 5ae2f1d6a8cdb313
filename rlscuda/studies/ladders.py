"""Accuracy along a ladder of ratios: copies of one network, pruned by one rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlscuda.pruning.matrices.carried import CarriedMatrices
from rlscuda.pruning.pruner import RLSPruner
from rlscuda.studies.protocol import Protocol, Split, Task
from rlscuda.studies.training import Training, evaluate, train_epochs
from rlscuda.studies.weights import weight_copies

_BATCH = 100  # images of a calibration at once
_RECOVERY = 0.3  # of the step size, for training a pruned network on
_SEED = 1000  # of whose batches


@dataclass(frozen=True)
class Curve:
    """Test accuracies in [0, 1], and parameters left, at each ratio of a ladder."""

    accuracy: list[float]
    parameters: list[int]


class Ladders:
    """The curves of one network, whose matrices are made once for all rules.

    Args:
        model: The network; it stays whole.
        task: Where it is tested, and trained on.
        protocol: The ladder.
        seed: Of the calibration images, and of what is random.
        rate: Step size of the network's training.
    """

    def __init__(self, model: nn.Module, task: Task, protocol: Protocol, seed: int, rate: float):
        self.model, self.task, self.protocol = model, task, protocol
        self.seed, self.rate = seed, rate
        train, wanted = task.train, protocol.calibration
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(train), generator=generator)[:wanted].to(train.x.device)
        self.shown = Split(train.x[rows], train.y[rows])
        self.batches = list(self.shown.x.split(_BATCH))

    def curve(self, rule: str, recovery: int, matrices: Mapping[str, Tensor]) -> Curve:
        """The curve of a rule; the network of ratio 0 is not trained on.

        Args:
            rule: See `Protocol`.
            recovery: Epochs to train on.
            matrices: Of the network, by layer.

        Raises:
            ValueError: The rule removes nothing of this network.
        """
        copies = self._copies(rule, matrices, self.batches)
        found = Curve([], [])
        for ratio, copy in zip(self.protocol.ratios, copies):
            found.parameters.append(self._parameters(copy))
            found.accuracy.append(self._accuracy(copy, recovery if ratio else 0))
        if len(found.parameters) > 1 and found.parameters[-1] == found.parameters[0]:
            raise ValueError(f"rule {rule!r} removes nothing of this network")
        return found

    def curve_without_data(self, matrices: Mapping[str, Tensor]) -> Curve:
        """That of compensated channels where nothing but these matrices is there."""
        copies = list(self._copies("saliency+", matrices, None))
        accuracy = [self._accuracy(copy, 0) for copy in copies]
        return Curve(accuracy, [self._parameters(copy) for copy in copies])

    def _parameters(self, pruned: nn.Module) -> int:
        if self.protocol.granularity == "weights":
            return sum(int((p != 0).sum()) for p in pruned.parameters())
        return sum(p.numel() for p in pruned.parameters())

    def _copies(
        self, rule: str, matrices: Mapping[str, Tensor], batches: Sequence[Tensor] | None
    ) -> Iterator[nn.Module]:
        importance, compensate = rule.removesuffix("+"), rule.endswith("+")
        ratios = self.protocol.ratios
        if self.protocol.granularity == "weights":
            return weight_copies(self.model, matrices, importance, compensate, ratios, self.seed)
        if importance == "taylor":
            self._accumulate_gradients()
        tracker = CarriedMatrices(self.model, matrices)
        return RLSPruner(
            self.model, None, self.shown.x[:1], ratio=0.5, importance=importance,
            compensate=compensate, tracker=tracker, loader=batches, seed=self.seed,
        ).copies(ratios)  # fmt: skip

    def _accumulate_gradients(self) -> None:
        self.model.zero_grad()
        for x, y in zip(self.batches, self.shown.y.split(_BATCH)):
            F.cross_entropy(self.model(x), y).backward()

    def _accuracy(self, pruned: nn.Module, recovery: int) -> float:
        if recovery:
            seed, rate = self.seed + _SEED, _RECOVERY * self.rate
            training = Training(pruned, self.task, self.protocol, seed, rate, recovery)
            pruned = train_epochs(training, recovery).model
        return evaluate(pruned, self.task.test)[1]
