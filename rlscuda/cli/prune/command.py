"""`rlscuda prune`: from a finished run to a smaller network and a report."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.cli.common.execution import Execution
from rlscuda.cli.common.files import is_there
from rlscuda.cli.common.out_folder import writing
from rlscuda.cli.common.texts import one_line, print_files
from rlscuda.cli.prune.options import EXPORTS, PruneOptions
from rlscuda.cli.report.folder import MODELS, ReportFolder
from rlscuda.cli.report.record import PruneRecord, Stage, gains_of, size_of
from rlscuda.cli.report.writing import print_report, write_report
from rlscuda.cli.train.command import Run
from rlscuda.cli.train.display import train_shown
from rlscuda.cli.train.options import RunConfig
from rlscuda.cli.train.run_folder import RunFolder
from rlscuda.cli.train.trainer import Trainer, evaluate
from rlscuda.optional import optional
from rlscuda.pruning.files.export import export_onnx, export_program
from rlscuda.pruning.files.manifest import describe, rebuild
from rlscuda.pruning.files.saving import load_pruned, save_pruned
from rlscuda.pruning.pruner import RLSPruner

_CALIBRATION_BATCH = 100
_PASSED_ON = (
    "importance", "selection", "scope", "source", "compensate", "adapt_norms", "round_to"
)  # fmt: skip
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
    """Prunes a finished run's network, says what it cost and gained, and writes the result.

    Args:
        source: The folder of the run, which stays as it is.
        optimizer: Which of the run's networks; None for that of RLS, or the only one.
        options: How much goes, and how.
        execution: How to run it.
        out: The folder for the result.
        overwrite: Whether it may replace an earlier pruning.
        console: Where to print.

    Raises:
        UserError: An option is wrong, the run is not there, not finished, lacks a file or is
            written by another process, or `out` holds something, cannot be written or is written
            by another process. Nothing is written then.
    """
    files, folder = ReportFolder(out), RunFolder(source)
    with ExitStack() as held:
        with folder.reading():
            config, name, test_accuracy = _finished_run(folder, optimizer)
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
            _require_packages(options.exports)
            run = Run(config, execution, folder, console)
            run.check_data()
            trainer = run.trainer(name)
        if trainer.diverged:
            raise UserError(f"the training of {name} in {source} diverged: nothing can be pruned")
        pruning = Pruning(trainer, options, console)
        pruning.cut()
        with files.replaced() as new:
            record = pruning.finish(new, run.subject, test_accuracy)
            recorded = {"run": str(source), "optimizer": name, **dataclasses.asdict(options)}
            write_report(new, record, recorded)
    print_report(record, console)
    print_files(console, "pruning", files.existing())


def _require_packages(exports: Iterable[str]) -> None:
    """What is used at the end is looked for at the start."""
    needed = {"safetensors": "pruning", "matplotlib": "cli"}
    if "onnx" in exports:
        needed |= dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export")
    for package, extra in needed.items():
        optional(package, extra)


def _finished_run(folder: RunFolder, optimizer: str | None) -> tuple[RunConfig, str, float]:
    """The config of a run, the optimizer whose network is meant, and this one's test accuracy."""
    source = folder.path
    if not is_there(folder.config):
        raise UserError(f"--run {source} holds no run of rlscuda: {folder.config} does not exist")
    config, summary = folder.read_options({}), folder.read_summary()
    if summary is None or folder.is_pending:
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
    if name not in summary["results"]:
        raise UserError(f"{folder.summary} does not hold the test accuracy of {name}")
    return config, name, summary["results"][name]["test_accuracy"]


class Pruning:
    """One pruning in its course: what was seen of the network, whole, pruned, recovered.

    Args:
        trainer: At the end of its run.
        options: How much goes, and how.
        console: Where to print.
    """

    def __init__(self, trainer: Trainer, options: PruneOptions, console: Console):
        self.trainer, self.options, self.console = trainer, options, console
        self.data = trainer.data
        self.example = self.data.normalise(self.data.train.images[:1])
        self.stages: list[Stage] = []
        self.whole = rebuild(trainer.whole_model, describe(trainer.model))

    def cut(self) -> None:
        """Prunes the network, in memory only.

        Raises:
            UserError: The target is out of reach, or nothing was removed.
        """
        self._look("whole")
        with _bar(self.console) as progress, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            try:
                self.report = self._pruner().step(progress=progress)
            except ValueError as error:
                model = self.trainer.config.model
                raise UserError(one_line(f"{model} was not pruned: {error}")) from None
        for warning in said:
            self.console.print(f"warning: {warning.message}", markup=False, highlight=False)
        whole = all(change.before == change.after for change in self.report.couplings)
        if whole and not self.report.blocks:
            for name, why in self.report.refused.items():
                self.console.print(f"not pruned: {one_line(name)}: {one_line(why)}",
                                   markup=False, highlight=False, soft_wrap=True)  # fmt: skip
            raise UserError("nothing was removed: " + (
                "the target is reached already, or nothing may go within it"
                if self.report.couplings else "no channels may go, for the reasons above"
            ))  # fmt: skip
        self._look("pruned")

    def finish(self, folder: Path, title: str, whole_test_accuracy: float) -> PruneRecord:
        """Saves the network that was cut, trains it on, exports it, and tests, once.

        Args:
            folder: Where the files go.
            title: What network on what data.
            whole_test_accuracy: Of the run's own test.

        Returns:
            What the report tells.
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
        stages = [
            dataclasses.replace(stage, test_accuracy=accuracy)
            for stage, accuracy in zip(self.stages, accuracies, strict=True)
        ]
        done = {"ratio": self.report.ratio, "outcome": stages[-1].kind, "losses": []}
        size = options.measure_batch or trainer.config.batch_size
        return PruneRecord(
            title=title,
            optimizer=trainer.name,
            stages=stages,
            rounds=[{**done, "report": self.report.to_dict()}],
            gains=gains_of(self.whole, trainer.model, self.example, size),
            files={name: text for name, text in MODELS.items() if (folder / name).exists()},
            compensate=options.compensate,
        )

    def _pruner(self) -> RLSPruner:
        options, trainer = self.options, self.trainer
        batches = self._calibration()
        if options.importance == "taylor":
            _accumulate_gradients(trainer.model, batches)
        return RLSPruner(
            trainer.model,
            trainer.optimizer,
            batches[0][0][:1],
            **options.target,
            **{name: getattr(options, name) for name in _PASSED_ON} | _with_blocks(options),
            loader=batches,
            evaluate=lambda model: evaluate(model, self.data, self.data.val)[0],
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
        """Trains on, with the same optimizer."""
        trainer, options = self.trainer, self.options
        trainer.prolong(options.recover, options.recover_lr)
        train_shown(self.console, trainer)
        if trainer.diverged:
            raise UserError("training on diverged: a smaller --recover-lr may do")
        self._look("recovered")

    def _export(self, kind: str, path: Path) -> None:
        example = self.data.normalise(self.data.val.images[:2])
        with reading(f"--export {kind} failed"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch to itself
            {"onnx": export_onnx, "pt2": export_program}[kind](self.trainer.model, example, path)

    def _look(self, kind: str) -> None:
        """Evaluates the network on the validation images and keeps what was seen."""
        loss, accuracy = self.trainer.validate()
        size = size_of(self.trainer.model, self.example)
        self.stages.append(
            Stage(kind, 0 if kind == "whole" else 1, **size, val_loss=loss, val_accuracy=accuracy)
        )
        self.console.print(
            f"{kind:<10} {size['parameters']:>12,} parameters  val loss {loss:.4f}  "
            f"val accuracy {100 * accuracy:6.2f} %",
            soft_wrap=True,
        )


def _with_blocks(options: PruneOptions) -> dict[str, object]:
    """What a pruner of blocks, too, is told beside the rest."""
    what = tuple(options.what.split(","))
    return {"what": what, "source": "calibration"} if "blocks" in what else {"what": what}


def _accumulate_gradients(model: nn.Module, batches: list[Batch]) -> None:
    """Sums the gradients over some batches in eval mode, in which no matrix moves."""
    was_training = model.training
    model.eval()
    model.zero_grad()
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
    model.train(was_training)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str], None]]:
    """A bar that says what the pruner is doing; yields what tells it."""
    columns = (
        TextColumn("pruning", style="bold"),
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task("copying the model", total=None)
        yield lambda text: progress.update(task, description=one_line(text))
