"""``rlscuda train``: one run, from its options to its files."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

import rlscuda
from rlscuda.cli.checkpoint import load_checkpoint
from rlscuda.cli.config import RunConfig
from rlscuda.cli.data import Dataset, load_dataset
from rlscuda.cli.display import StepBar, result_table
from rlscuda.cli.errors import UserError
from rlscuda.cli.execution import Execution
from rlscuda.cli.files import is_there
from rlscuda.cli.out_folder import writing
from rlscuda.cli.plots import plot_run
from rlscuda.cli.runfolder import RunFolder
from rlscuda.cli.texts import one_line
from rlscuda.cli.training import Trainer, evaluate
from rlscuda.optim.report import Coverage


class Run:
    """The optimizers of one config, trained in turn into one folder.

    Args:
        config: what to train.
        execution: how to run it.
        folder: where its files go.
        console: where to print.
    """

    def __init__(
        self, config: RunConfig, execution: Execution, folder: RunFolder, console: Console
    ):
        self.config, self.folder, self.console = config, folder, console
        self.checkpoint_every = execution.checkpoint_every
        self.device = execution.prepare()
        with console.status(Text(f"reading {one_line(config.data)}")):
            self.data: Dataset = load_dataset(
                config.data, config.val_fraction, config.image_size, execution.cache
            ).to(self.device)
        self.fingerprint = config.fingerprint(self.data.fingerprint)

    @property
    def title(self) -> str:
        """What is trained on what."""
        data = Path(self.config.data).name
        return f"{self.config.model} on {data}, batch {self.config.batch_size}"

    def trainer(self, name: str) -> Trainer:
        """A trainer of one optimizer, at the position of its checkpoint if there is one."""
        path = self.folder.checkpoint(name)
        trainer = Trainer(
            self.config, name, self.data, path, self.fingerprint, self.checkpoint_every
        )
        if is_there(path):
            trainer.load_state_dict(load_checkpoint(path, self.fingerprint, name))
        return trainer

    def train(self) -> None:
        """Train what is left to train, test once, write every file and name it."""
        self._print_head()
        rows: list[dict[str, Any]] = []
        models: dict[str, nn.Module] = {}
        pruned: Trainer | None = None
        for name in self.config.optimizers:
            trainer = self.trainer(name)
            self._print_start(trainer)
            with StepBar(self.console, trainer) as bar:
                for row in trainer.epochs(bar):
                    bar.print_epoch(row)
                    self.folder.write_metrics(rows + trainer.history)
            if trainer.diverged:
                self.console.print(f"{name} stopped: its training loss is not finite any more")
            rows += trainer.history
            models[name] = trainer.model
            if trainer.pruning is not None and trainer.pruning.stages:
                pruned = trainer
        self.folder.write_metrics(rows)
        results = self._test(rows, models)
        accuracy = {name: result["test_accuracy"] for name, result in results.items()}
        plot_run(self.folder.plot, self.title, rows, accuracy)
        if pruned is not None:
            self._report_pruning(pruned, results[pruned.name])
        self.folder.write_summary({"title": self.title, "results": results})
        show_run(self.folder, self.console)

    def check_data(self, stored: dict[str, Any]) -> None:
        """Check that the data are those of the run.

        Args:
            stored: its ``config.json``.

        Raises:
            UserError: they are others.
        """
        if self.data.fingerprint != stored["data"]["fingerprint"]:
            raise UserError(
                f"--data {self.config.data} does not hold the images this run was started with; "
                "nothing was overwritten"
            )

    def begin(self, settings: dict[str, dict[str, float]]) -> None:
        """Write ``config.json``, in place of an earlier run: the options, the data, the machine.

        Args:
            settings: what each optimizer's step size and weight decay were resolved to.
        """
        data = self.data
        self.folder.begin(
            {
                "options": dataclasses.asdict(self.config),
                "settings": settings,
                "data": {
                    "fingerprint": data.fingerprint,
                    "shape": list(data.shape),
                    "classes": data.classes,
                    "training_images": len(data.train),
                    "validation_images": len(data.val),
                    "test_images": data.notes,
                },
                "machine": {
                    "device": str(self.device),
                    "threads": torch.get_num_threads(),
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "rlscuda": rlscuda.build_info(),
                },
            }
        )

    def _test(
        self, rows: list[dict[str, Any]], models: dict[str, nn.Module]
    ) -> dict[str, dict[str, Any]]:
        """Read the test images, for the first and only time, and evaluate every model on them."""
        test = self.data.load_test()
        results = {}
        for name, model in models.items():
            last = [row for row in rows if row["optimizer"] == name][-1]
            loss, accuracy = evaluate(model, self.data, test)
            results[name] = {
                "test_accuracy": accuracy,
                "test_loss": loss,
                "test_images": len(test),
                "val_accuracy": last.get("changed_val_accuracy", last["val_accuracy"]),
                "val_loss": last.get("changed_val_loss", last["val_loss"]),
                "epochs": last["epoch"],
                "steps": last["steps"],
                "seconds": last["seconds"],
            }
        return results

    def _report_pruning(self, trainer: Trainer, result: dict[str, Any]) -> None:
        """Write and print what the rounds of pruning did."""
        from rlscuda.cli.prune_report import print_report
        from rlscuda.cli.scheduled import write_pruning

        title = f"{self.config.model} on {Path(self.config.data).name}"
        record = write_pruning(trainer, title, result, self.folder.pruning)
        print_report(record, self.console)

    def _print_head(self) -> None:
        data = self.data
        rest = (
            f", seed {self.config.seed}, {self.config.schedule} schedule, {self.device}\n"
            f"{len(data.train)} training and {len(data.val)} validation images of shape "
            f"{list(data.shape)}, {data.classes} classes\ntest: {data.notes}"
        )
        self.console.print(Text.assemble((one_line(self.title), "bold"), rest), soft_wrap=True)

    def _print_start(self, trainer: Trainer) -> None:
        total = trainer.steps_per_epoch * self.config.epochs
        settings = ", ".join(
            f"{option.replace('_', ' ')} {value:g}" for option, value in trainer.settings.items()
        )
        text = f"\n{trainer.name}: {settings}"
        if trainer.name == "rls":
            text += f", {self.config.form} form"
        if trainer.finished:
            text += ": already trained"
        elif trainer.steps_done:
            text += (
                f": resumed in epoch {trainer.epoch + 1} after {trainer.step} of "
                f"{trainer.steps_per_epoch} steps ({trainer.steps_done} of {total} in all)"
            )
        self.console.print(text, soft_wrap=True)
        if isinstance(trainer.optimizer, rlscuda.RLSOptimizer) and not trainer.finished:
            rows = trainer.optimizer.coverage()
            named = Coverage(dataclasses.replace(row, name=one_line(row.name)) for row in rows)
            self.console.print(str(named), soft_wrap=True)


def start(
    config: RunConfig, execution: Execution, out: Path, overwrite: bool, console: Console
) -> None:
    """Start a new run in ``out``.

    Raises:
        UserError: an option is wrong, the data cannot be read, or ``out`` holds something, cannot
            be written or is written by another process. The folder is then as it was.
    """
    config.check_new()
    folder = RunFolder(out)
    with writing(out):
        folder.finish()
        folder.check_new(overwrite)
        run = Run(config, execution, folder, console)
        settings = {}
        for name in config.optimizers:
            trainer = Trainer(config, name, run.data, folder.checkpoint(name), run.fingerprint)
            settings[name] = trainer.settings
        run.begin(settings)
        run.train()


def resume(given: dict[str, Any], execution: Execution, out: Path, console: Console) -> None:
    """Continue the run in ``out`` where its checkpoints are; of a finished run, show the table.

    Args:
        given: the options written on the command line; they must agree with the run's.
        execution: how to run it.
        out: the run's folder.
        console: where to print.

    Raises:
        UserError: there is no run, another process writes to it, an option or the data differ, or
            a checkpoint is unreadable. Nothing is overwritten then.
    """
    folder = RunFolder(out)
    with folder.reading():
        if folder.read_summary() is not None and not folder.is_pending:
            _stored(folder, given)
            console.print(f"the run in {one_line(out)} is finished", soft_wrap=True)
            show_run(folder, console)
            return
    with writing(out):
        folder.finish()
        stored, config = _stored(folder, given)
        run = Run(config, execution, folder, console)
        run.check_data(stored)
        for name in config.optimizers:
            run.trainer(name)
        run.train()


def _stored(folder: RunFolder, given: dict[str, Any]) -> tuple[dict[str, Any], RunConfig]:
    """The content of ``config.json``, and the config in it, which the given options agree with."""
    stored = folder.read_config()
    return stored, RunConfig.resumed(stored["options"], given)


def show_run(folder: RunFolder, console: Console) -> None:
    """Print the table of a finished run and name its files."""
    summary = folder.read_summary()
    if summary is None:
        raise UserError(f"the run in {folder.path} is not finished: --resume continues it")
    console.print()
    console.print(result_table(summary["title"], folder.read_metrics(), summary["results"]))
    console.print("\nfiles of this run:")
    for path in folder.files():
        console.print(f"  {one_line(path)}", soft_wrap=True)
