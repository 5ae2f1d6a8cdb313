"""Does pre-training make a network easier to prune? Two arms, paired by seed, along a ladder.

After Hubens et al. 2020 (arXiv 2112.08227), whose claim is that a network which was pre-trained and
fine-tuned can lose more than one trained from scratch. One arm starts from a network of another
task, the other from random weights; both learn the same images in the same order behind heads that
start equal. Copies of each are pruned along a ladder of ratios, by several rules.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.files.journal import append_record, read_records, repair
from rlscuda.pruning.files.matrices import load_matrices, save_matrices
from rlscuda.pruning.files.saving import load_pruned, save_pruned
from rlscuda.pruning.matrices.calibration import calibrate
from rlscuda.pruning.matrices.explained import redundancies
from rlscuda.studies.heads import replace_head
from rlscuda.studies.ladders import Ladders
from rlscuda.studies.protocol import FAIRNESS, Protocol, Task, fingerprint
from rlscuda.studies.report import ARMS, Study
from rlscuda.studies.training import (
    Trained,
    Training,
    best_rate,
    evaluate,
    seeded,
    train_epochs,
    train_to_accuracy,
    train_to_plateau,
)

Network = Callable[[int], nn.Module]
_HEAD = 1 << 20  # of the seeds of heads, apart from those of networks


def pretraining(
    network: Network,
    target: Task,
    source: Task | Callable[[], nn.Module],
    folder: Path,
    protocol: Protocol | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Runs the study, or goes on where it was interrupted.

    Args:
        network: Makes a network for a number of classes, its last `nn.Linear` being the head. The
            weights that it draws are those of the arm from scratch.
        target: What both arms learn, and are pruned and tested on.
        source: What the other arm has learned before: a task, which is trained here, a network a
            seed; or what makes a network that is trained already, with any head.
        folder: Where the journal, and the networks trained on the source with their matrices, are
            kept. A study in it that was interrupted goes on, to the same result.
        protocol: What is varied, and how it is trained.
        say: Is told what has been done.

    Returns:
        The result.

    Raises:
        ValueError: The folder holds another study, or a rule does not apply to the network.

    Source: Hubens et al. 2020 (arXiv 2112.08227).
    """
    return _Runner(network, target, source, folder, protocol or Protocol(), say).run()


class _Runner:
    """A study in its course; every record of its journal depends on its own job alone."""

    def __init__(
        self,
        network: Network,
        target: Task,
        source: Task | Callable[[], nn.Module],
        folder: Path,
        protocol: Protocol,
        say: Callable[[str], None],
    ):
        self.network, self.target, self.source = network, target, source
        self.folder, self.protocol, self.say = folder, protocol, say
        self.journal = folder / "journal.jsonl"
        self._device = target.train.x.device

    def run(self) -> Study:
        self._open()
        rates = {arm: self._rate(arm) for arm in ARMS}
        arms = [
            self._finish({"kind": "arm", "seed": seed, "fairness": fairness, "arm": arm},
                         partial(self._measure, rate=rates[arm]))
            for seed in self.protocol.seeds
            for fairness in FAIRNESS
            if fairness in self.protocol.fairness
            for arm in reversed(ARMS)
        ]  # fmt: skip
        return Study(self.protocol, self.target.classes, arms)

    # -- the journal ------------------------------------------------------------------------------

    def _open(self) -> None:
        """Begins a journal, or checks that the one in the folder is of this study."""
        self.folder.mkdir(parents=True, exist_ok=True)
        repair(self.journal)
        head = {"kind": "study", "fingerprint": self._fingerprint()}
        records = read_records(self.journal)
        if not records:
            append_record(self.journal, head)
        elif records[0] != head:
            raise ValueError(
                f"{self.journal} is of a study with other data, networks or options: choose "
                "another folder"
            )

    def _fingerprint(self) -> str:
        parts = {"protocol": self.protocol.to_dict(), "target": self.target.fingerprint()}
        if isinstance(self.source, Task):
            parts["source"] = self.source.fingerprint()
        else:
            parts["source"] = fingerprint(self.source().state_dict().values())
        model = self._fresh(0)
        parts["network"] = {name: list(p.shape) for name, p in model.named_parameters()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _finish(
        self, job: dict[str, Any], work: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """The record of a job: from the journal, or made and appended."""
        for record in read_records(self.journal):
            if job.items() <= record.items():
                return record
        record = {**job, **work(job)}
        append_record(self.journal, record)
        self.say(", ".join(f"{name} {value}" for name, value in job.items() if name != "kind"))
        return record

    # -- networks ---------------------------------------------------------------------------------

    def _fresh(self, seed: int, classes: int | None = None) -> nn.Module:
        """A network with random weights, a function of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.network(classes or self.target.classes)
        return model.to(self._device)

    def _start(self, arm: str, seed: int) -> tuple[nn.Module, nn.Module | None]:
        """The network of an arm before it learns the target, and its head if it is new."""
        if arm == "scratch":
            model = self._fresh(seed)
        elif isinstance(self.source, Task):
            model = self._pretrained(seed)
        else:
            model = copy.deepcopy(self.source()).to(self._device)
        name = replace_head(model, self.target.classes, seed=_HEAD + seed)
        return model, model.get_submodule(name) if arm == "pretrained" else None

    def _source_file(self, seed: int) -> Path:
        return self.folder / "networks" / f"source-{seed}.safetensors"

    def _matrices_file(self, seed: int) -> Path:
        return self._source_file(seed).with_suffix(".matrices.safetensors")

    def _pretrained(self, seed: int) -> nn.Module:
        """The network of a seed that has learned the source, from its file where there is one."""
        assert isinstance(self.source, Task)
        path, classes = self._source_file(seed), self.source.classes
        if not (path.is_file() and self._matrices_file(seed).is_file()):
            model, rate = self._fresh(seed, classes), self.protocol.rates[-1]
            epochs = self.protocol.source_epochs
            with seeded(model, seed):
                training = Training(model, self.source, self.protocol, seed, rate, epochs)
                done = train_epochs(training, epochs)
            save_matrices(done.matrices, self._matrices_file(seed))
            save_pruned(done.model, path)
            self.say(f"source of seed {seed}: validation accuracy {100 * done.accuracy:.1f} %")
        return load_pruned(lambda: self._fresh(seed, classes), path)

    # -- trainings --------------------------------------------------------------------------------

    def _rate(self, arm: str) -> float:
        """The step size of an arm, by the validation accuracy of the first seed."""
        seed = self.protocol.seeds[0]

        def accuracy(job: dict[str, Any]) -> dict[str, Any]:
            return {"accuracy": self._train("epochs", arm, seed, job["rate"]).accuracy}

        def accuracy_of(rate: float) -> float:
            return self._finish({"kind": "rate", "arm": arm, "rate": rate}, accuracy)["accuracy"]

        return best_rate(accuracy_of, self.protocol.rates)

    def _train(self, fairness: str, arm: str, seed: int, rate: float) -> Trained:
        protocol = self.protocol
        model, head = self._start(arm, seed)
        with seeded(model, seed):
            epochs = None if fairness == "plateau" else protocol.epochs
            training = Training(model, self.target, protocol, seed, rate, epochs, head)
            if fairness == "plateau":
                return train_to_plateau(training)
            if fairness == "accuracy" and arm == "pretrained":
                other = {"kind": "arm", "seed": seed, "fairness": fairness, "arm": "scratch"}
                goal = next(r for r in read_records(self.journal) if other.items() <= r.items())
                return train_to_accuracy(training, goal["validation"])
            return train_epochs(training, protocol.epochs)

    # -- what is read of an arm -------------------------------------------------------------------

    def _measure(self, job: dict[str, Any], rate: float) -> dict[str, Any]:
        """Trains an arm and follows its ladders."""
        seed, arm, fairness = job["seed"], job["arm"], job["fairness"]
        if fairness == "accuracy" and arm == "scratch" and "epochs" in self.protocol.fairness:
            same = {**job, "fairness": "epochs"}  # the very training, whose record comes before
            found = next(r for r in read_records(self.journal) if same.items() <= r.items())
            return {name: value for name, value in found.items() if name not in job}
        trained = self._train(fairness, arm, seed, rate)
        test = evaluate(trained.model, self.target.test)[1]
        found = {
            "rate": trained.rate, "steps": trained.steps, "order": trained.order,
            "reached": trained.reached, "validation": trained.accuracy, "test": test,
        }  # fmt: skip
        if not trained.matrices:
            return found | {"curves": [], "sources": {}, "redundancy": {}}
        ladders = Ladders(trained.model, self.target, self.protocol, seed, rate)
        with seeded(trained.model, seed):
            matrices = calibrate(trained.model, ladders.batches)
            curves = [
                {"rule": rule, "recovery": epochs, **vars(ladders.curve(rule, epochs, matrices))}
                for rule in self.protocol.rules
                for epochs in self.protocol.recovery
            ]
            sources = self._sources(ladders, trained, matrices, arm, seed)
        explained = redundancies(trained.model, matrices)
        several = {n: r for n, r in explained.items() if len(r) > len(matrices[n])}  # a group
        return found | {
            "curves": curves,
            "sources": sources,
            "redundancy": {name: float(values.mean()) for name, values in several.items()},
        }

    def _sources(
        self, ladders: Ladders, trained: Trained, exact: dict[str, Tensor], arm: str, seed: int
    ) -> dict[str, list[float]]:
        """Accuracies along the ladder without data, by where the matrices come from."""
        if self.protocol.granularity == "weights":
            return {}
        sources = {"calibration": exact, "target": trained.matrices}
        if arm == "pretrained" and isinstance(self.source, Task):
            path = self._matrices_file(seed)
            sources["source"] = load_matrices(trained.model, path).matrices()
        return {name: ladders.curve_without_data(P).accuracy for name, P in sources.items()}
