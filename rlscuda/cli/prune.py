"""``rlscuda prune``: from a finished run to a smaller network and a report."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from rlscuda.cli.config import RunConfig
from rlscuda.cli.display import StepBar
from rlscuda.cli.errors import UserError, reading
from rlscuda.cli.execution import Execution
from rlscuda.cli.extras import require
from rlscuda.cli.files import is_there
from rlscuda.cli.out_folder import writing
from rlscuda.cli.prune_files import MODELS, PruneFiles
from rlscuda.cli.prune_options import EXPORTS, PruneOptions
from rlscuda.cli.prune_record import PruneRecord, Stage, gains_of, size_of
from rlscuda.cli.prune_report import print_report, write_report
from rlscuda.cli.runfolder import RunFolder
from rlscuda.cli.texts import one_line
from rlscuda.cli.train import Run
from rlscuda.cli.training import Trainer, evaluate
from rlscuda.pruning.files.manifest import describe, rebuild
from rlscuda.pruning.files.saving import load_pruned, save_pruned
from rlscuda.pruning.report import PruneReport
from rlscuda.pruning.running.measure import Gains

_CALIBRATION_BATCH = 100
Batch = tuple[Tensor, Tensor]


def prune(
    source: Path,
    optimizer: str | None,
    options: PruneOptions,
    execution: Execution,
    out: Path,
    overwrite: bool,
    console: Console,
) -> None:
    """Prune a finished run's network, say what it cost and gained, and write the result.

    Args:
        source: the folder of the run, which stays as it is.
        optimizer: which of the run's networks; None for that of RLS, or the only one.
        options: how much goes, and how.
        execution: how to run it.
        out: the folder for the result.
        overwrite: whether it may replace an earlier pruning.
        console: where to print.

    Raises:
        UserError: an option is wrong, the run is not there, not finished, lacks a file or is
            written by another process, or ``out`` holds something, cannot be written or is written
            by another process. Nothing is written then.
    """
    files, folder = PruneFiles(out), RunFolder(source)
    with ExitStack() as held:
        with folder.reading():
            config, name = _finished_run(folder, optimizer)
            test_accuracy = _test_accuracy(folder, name)
            if source.resolve() in (out.resolve(), *out.resolve().parents):
                raise UserError(f"--out {out} lies in --run {source}, which stays as it is")
            held.enter_context(writing(out))
            files.finish()
            files.check_new(overwrite)
            if options.source == "own" and name != "rls":
                raise UserError(
                    f"--source own reads the matrices of rls, the run of {name} has none: "
                    "--source calibration takes them from its training images"
                )
            require("torch_pruning", "safetensors", "matplotlib")
            if "onnx" in options.exports:
                require("onnx", "onnxscript", "onnxruntime")
            run = Run(config, execution, folder, console)
            run.check_data(folder.read_config())
            trainer = run.trainer(name)
        if trainer.diverged:
            raise UserError(f"the training of {name} in {source} diverged: nothing can be pruned")
        pruning = Pruning(trainer, options, console)
        pruning.cut()
        with files.replaced() as new:
            pruning.finish(new, test_accuracy)
            recorded = {"run": str(source), "optimizer": name, **options.to_dict()}
            record = pruning.record(Path(config.data).name, {path.name for path in new.iterdir()})
            write_report(new, record, recorded)
    print_report(record, console)
    console.print("\nfiles of this pruning:")
    for path in files.existing():
        console.print(f"  {one_line(path)}", soft_wrap=True)


def _finished_run(folder: RunFolder, optimizer: str | None) -> tuple[RunConfig, str]:
    """The config of a run, and the optimizer whose network is meant."""
    source = folder.path
    if not is_there(folder.config):
        raise UserError(f"--run {source} holds no run of rlscuda: {folder.config} does not exist")
    config = RunConfig.resumed(folder.read_config()["options"], {})
    if folder.read_summary() is None or folder.is_pending:
        raise UserError(
            f"the run in {source} is not finished: rlscuda train --resume --out {source} "
            "continues it"
        )
    names = config.optimizers
    name = optimizer or ("rls" if "rls" in names else names[0] if len(names) == 1 else None)
    if name not in names:
        got = f"got {name!r}" if name else "say which"
        raise UserError(f"--optimizer must be one of this run's, {', '.join(names)}; {got}")
    if not is_there(folder.checkpoint(name)):
        raise UserError(
            f"the run in {source} lacks the network of {name}: {folder.checkpoint(name)} does not "
            "exist"
        )
    return config, name


def _test_accuracy(folder: RunFolder, name: str) -> float:
    """Of the run's own test of one optimizer's network."""
    summary = folder.read_summary()
    if summary is None or name not in summary["results"]:
        raise UserError(f"{folder.summary} does not hold the test accuracy of {name}")
    return summary["results"][name]["test_accuracy"]


class Pruning:
    """One pruning in its course: what was seen of the network, whole, pruned, recovered.

    Args:
        trainer: at the end of its run.
        options: how much goes, and how.
        console: where to print.
    """

    def __init__(self, trainer: Trainer, options: PruneOptions, console: Console):
        self.trainer, self.options, self.console = trainer, options, console
        self.data = trainer.data
        self.stages: list[Stage] = []
        self.report: PruneReport | None = None
        self.whole = rebuild(trainer.whole_model, describe(trainer.model))

    def cut(self) -> None:
        """Prune the network, in memory only.

        Raises:
            UserError: the target is out of reach, or nothing was removed.
        """
        self._look("whole")
        with _ranking_bar(self.console) as progress, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            try:
                self.report = self._pruner().step(progress=progress)
            except ValueError as error:
                raise UserError(f"{self.trainer.config.model} was not pruned: {error}") from None
        for warning in said:
            self.console.print(f"warning: {warning.message}", markup=False, highlight=False)
        if all(change.before == change.after for change in self.report.couplings):
            raise UserError(
                "nothing was removed: the target is reached already, or nothing may go within it"
            )
        self._look("pruned")

    def finish(self, folder: Path, whole_test_accuracy: float) -> None:
        """Save the network, train it on, export it, and test, once.

        Args:
            folder: where the files go.
            whole_test_accuracy: of the run's own test.
        """
        trainer, options = self.trainer, self.options
        pruned = folder / "pruned.safetensors"
        save_pruned(trainer.model, pruned, optimizer=trainer.optimizer)
        models = [load_pruned(trainer.whole_model, pruned)]
        if options.recover:
            self._recover()
            save_pruned(
                trainer.model, folder / "recovered.safetensors", optimizer=trainer.optimizer
            )
            models.append(trainer.model)
        for name in options.exports:
            with self.console.status(f"exporting {EXPORTS[name]}"):
                self._export(name, folder / EXPORTS[name])
        test = self.data.load_test()
        accuracies = [whole_test_accuracy, *(evaluate(m, self.data, test)[1] for m in models)]
        self.stages = [
            dataclasses.replace(stage, test_accuracy=accuracy)
            for stage, accuracy in zip(self.stages, accuracies, strict=True)
        ]

    def record(self, data: str, written: set[str]) -> PruneRecord:
        """What the report tells.

        Args:
            data: the name of the data.
            written: the names of the files beside the report.
        """
        assert self.report is not None
        outcome = self.stages[-1].kind
        return PruneRecord(
            title=f"{self.trainer.config.model} on {data}",
            optimizer=self.trainer.name,
            stages=self.stages,
            rounds=[
                {"ratio": self.report.ratio, "outcome": outcome, "losses": [],
                 "report": self.report.to_dict()}
            ],
            gains=self._gains(),
            files={name: text for name, text in MODELS.items() if name in written},
            compensate=self.options.compensate,
        )  # fmt: skip

    def _pruner(self) -> Any:
        from rlscuda.pruning.pruner import RLSPruner

        options, trainer = self.options, self.trainer
        batches = self._calibration()
        if options.importance == "taylor":
            _accumulate_gradients(trainer.model, batches)
        return RLSPruner(
            trainer.model,
            trainer.optimizer,
            batches[0][0][:1],
            **options.target,
            importance=options.importance,
            selection=options.selection,
            scope=options.scope,
            source=options.source,
            loader=batches,
            evaluate=lambda model: evaluate(model, self.data, self.data.val)[0],
            compensate=options.compensate,
            adapt_norms=options.adapt_norms,
            round_to=options.round_to,
            seed=trainer.config.seed,
        )

    def _calibration(self) -> list[Batch]:
        """Training images drawn at random, as the network is given them, and their labels."""
        train = self.data.train
        generator = torch.Generator().manual_seed(self.trainer.config.seed)
        rows = torch.randperm(len(train), generator=generator)[: self.options.calibration_images]
        return [
            (self.data.normalise(train.images[part]), train.labels[part])
            for part in rows.to(train.labels.device).split(_CALIBRATION_BATCH)
        ]

    def _recover(self) -> None:
        """Train on, with the same optimizer."""
        trainer, options = self.trainer, self.options
        trainer.prolong(options.recover, options.recover_lr)
        with StepBar(self.console, trainer) as bar:
            for row in trainer.epochs(bar):
                bar.print_epoch(row)
        if trainer.diverged:
            raise UserError("training on diverged: a smaller --recover-lr may do")
        self._look("recovered")

    def _export(self, kind: str, path: Path) -> None:
        from rlscuda.pruning.files.export import export_onnx, export_program

        example = self.data.normalise(self.data.val.images[:2])
        with reading(f"--export {kind} failed"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch to itself
            {"onnx": export_onnx, "pt2": export_program}[kind](self.trainer.model, example, path)

    def _gains(self) -> Gains:
        size = self.options.measure_batch or self.trainer.config.batch_size
        example = self.data.normalise(self.data.train.images[:1])
        return gains_of(self.whole, self.trainer.model, example, size)

    def _look(self, kind: str) -> None:
        """Evaluate the network on the validation images and keep what was seen."""
        loss, accuracy = self.trainer.validate()
        size = size_of(self.trainer.model, self.data.normalise(self.data.train.images[:1]))
        self.stages.append(
            Stage(kind, 0 if kind == "whole" else 1, **size, val_loss=loss, val_accuracy=accuracy)
        )
        self.console.print(
            f"{kind:<10} {size['parameters']:>12,} parameters  val loss {loss:.4f}  "
            f"val accuracy {100 * accuracy:6.2f} %",
            soft_wrap=True,
        )


def _accumulate_gradients(model: nn.Module, batches: list[Batch]) -> None:
    """Sum the gradients over some batches in eval mode, in which no matrix moves."""
    was_training = model.training
    model.eval()
    model.zero_grad()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
    model.train(was_training)


@contextmanager
def _ranking_bar(console: Console) -> Iterator[Callable[[str], None]]:
    """A bar that names the layer whose channels are being ranked; yields what tells it."""
    columns = (
        TextColumn("pruning", style="bold"),
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task("reading the matrices", total=None)
        yield lambda name: progress.update(task, description=f"ranking {one_line(name)}")
