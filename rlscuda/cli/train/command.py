"""`rlscuda train`: one run, from its options to its files."""

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
from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.execution import Execution
from rlscuda.cli.common.files import is_there, write_json
from rlscuda.cli.common.out_folder import writing
from rlscuda.cli.common.texts import one_line, print_files
from rlscuda.cli.data.dataset import load_dataset
from rlscuda.cli.report.folder import MODELS
from rlscuda.cli.report.record import PruneRecord, Stage, gains_of
from rlscuda.cli.report.writing import print_report, write_report
from rlscuda.cli.train import processes
from rlscuda.cli.train.checkpoint import load_checkpoint
from rlscuda.cli.train.display import result_table, train_shown
from rlscuda.cli.train.options import RunConfig
from rlscuda.cli.train.plots import plot_run
from rlscuda.cli.train.pruning.rounds import Rounds
from rlscuda.cli.train.run_folder import RunFolder
from rlscuda.cli.train.tensorboard import Board
from rlscuda.cli.train.trainer import Trainer, evaluate
from rlscuda.optim.report import Coverage
from rlscuda.pruning.files.saving import save_pruned


class Run:
    """The optimizers of one config, trained in turn into one folder.

    Args:
        config: What to train.
        execution: How to run it.
        folder: Where its files go.
        console: Where to print.
    """

    def __init__(
        self, config: RunConfig, execution: Execution, folder: RunFolder, console: Console
    ):
        self.config, self.folder, self.console = config, folder, console
        self.checkpoint_every, self.tensorboard = execution.checkpoint_every, execution.tensorboard
        processes.check_config(config)
        self.device = processes.own(execution.prepare())
        with console.status(Text(f"reading {one_line(config.data)}")):
            self.data = load_dataset(
                config.data, config.val_fraction, config.image_size, execution.cache
            ).to(self.device)
        self.fingerprint = config.fingerprint(self.data.fingerprint)

    @property
    def subject(self) -> str:
        """What network on what data."""
        return f"{self.config.model} on {Path(self.config.data).name}"

    @property
    def title(self) -> str:
        """What is trained on what, and how."""
        return f"{self.subject}, batch {self.config.batch_size}"

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
        """Trains what is left to train, tests once, writes every file and names it."""
        processes.told((self.config, self.fingerprint))
        self._print_head()
        rows: list[dict[str, Any]] = []
        models: dict[str, nn.Module] = {}
        pruned: Trainer | None = None

        def write_epoch(trainer: Trainer) -> None:
            self.folder.write_metrics(rows + trainer.history)
            if board is not None:
                board.add_epoch(trainer)

        for name in self.config.optimizers:
            trainer = self.trainer(name)
            self._print_start(trainer)
            board = Board(self.folder.board / name, trainer) if self.tensorboard else None
            train_shown(self.console, trainer, write_epoch)
            if board is not None:
                board.close()
            if trainer.diverged:
                self.console.print(f"{name} stopped: its training loss is not finite any more")
            rows.extend(trainer.history)
            models[name] = trainer.model
            if trainer.pruning is not None and trainer.pruning.stages:
                pruned = trainer
        self.folder.write_metrics(rows)
        results = self._test(rows, models)
        accuracy = {name: result["test_accuracy"] for name, result in results.items()}
        plot_run(self.folder.plot, self.title, rows, accuracy)
        if pruned is not None:
            self._report_pruning(pruned, results[pruned.name])
        write_json(self.folder.summary, {"title": self.title, "results": results})
        show_run(self.folder, self.console)

    def check_data(self) -> None:
        """Checks that the data are those that the run in the folder was started with.

        Raises:
            UserError: They are others.
        """
        if self.data.fingerprint != self.folder.read_config()["data"]["fingerprint"]:
            raise UserError(
                f"--data {self.config.data} does not hold the images this run was started with; "
                "nothing was overwritten"
            )

    def begin(self, settings: dict[str, dict[str, float]]) -> None:
        """Writes `config.json`, in place of an earlier run: the options, the data, the machine.

        Args:
            settings: What each optimizer's step size and weight decay were resolved to.
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
                    "processes": processes.size(),
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
        """Reads the test images, for the first and only time, and evaluates every model on them."""
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
        """Saves the network of a training that pruned it, and writes and prints what was done.

        Args:
            trainer: At its end, after one round or more.
            result: Its entry in `summary.json`.
        """
        pruning, model = trainer.pruning, trainer.model
        assert pruning is not None
        rounds = pruning.rounds()
        seen = {key: result[key] for key in ("val_loss", "val_accuracy", "test_accuracy")}
        record = PruneRecord(
            title=self.subject,
            optimizer=trainer.name,
            stages=[*pruning.stages, Stage("final", len(rounds), **pruning.size(), **seen)],
            rounds=rounds,
            gains=gains_of(trainer.whole_model(), model, pruning.example, self.config.batch_size),
            epochs=trainer.history,
            files={"pruned.safetensors": MODELS["pruned.safetensors"]},
            planned=pruning.total if isinstance(pruning, Rounds) else 1,
        )
        with self.folder.pruning.replaced() as new:
            save_pruned(model, new / "pruned.safetensors", optimizer=trainer.optimizer)
            write_report(new, record, self.config.prunings)
        print_report(record, self.console)

    def _print_head(self) -> None:
        data = self.data
        where = str(self.device)
        if processes.size() > 1:
            where += f", {processes.size()} processes"
        rest = (
            f", seed {self.config.seed}, {self.config.schedule} schedule, {where}\n"
            f"{len(data.train)} training and {len(data.val)} validation images of shape "
            f"{list(data.shape)}, {data.classes} classes\ntest: {data.notes}"
        )
        self.console.print(Text.assemble((one_line(self.title), "bold"), rest), soft_wrap=True)

    def _print_start(self, trainer: Trainer) -> None:
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
                f"{trainer.steps_per_epoch} steps ({trainer.steps_done} of "
                f"{trainer.total_steps} in all)"
            )
        self.console.print(text, soft_wrap=True)
        if isinstance(trainer.optimizer, rlscuda.RLSOptimizer) and not trainer.finished:
            rows = trainer.optimizer.coverage()
            named = Coverage(dataclasses.replace(row, name=one_line(row.name)) for row in rows)
            self.console.print(str(named), soft_wrap=True)


def start(
    config: RunConfig, execution: Execution, out: Path, overwrite: bool, console: Console
) -> None:
    """Starts a new run in a folder.

    Raises:
        UserError: An option is wrong, the data cannot be read, or the folder holds something,
            cannot be written or is written by another process. It is then as it was.
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
    """Continues the run in a folder where its checkpoints are; of a finished run, shows the table.

    Args:
        given: The options written on the command line; they must agree with the run's.
        execution: How to run it.
        out: The run's folder.
        console: Where to print.

    Raises:
        UserError: There is no run, another process writes to it, an option or the data differ, or
            a checkpoint is unreadable. Nothing is overwritten then.
    """
    folder = RunFolder(out)
    with folder.reading():
        if folder.read_summary() is not None and not folder.is_pending:
            folder.read_options(given)
            processes.told()
            console.print(f"the run in {one_line(out)} is finished", soft_wrap=True)
            show_run(folder, console)
            return
    with writing(out):
        folder.finish()
        config = folder.read_options(given)
        run = Run(config, execution, folder, console)
        run.check_data()
        for name in config.optimizers:
            run.trainer(name)
        run.train()


def follow(execution: Execution, out: Path) -> None:
    """Takes the steps of the run that the first process starts or continues; writes nothing.

    Args:
        execution: How to run it.
        out: The run's folder, which this process sees too.

    Raises:
        UserError: This process reads other data than the first.
    """
    told = processes.told()
    if told is None:  # the run is finished
        return
    config, fingerprint = told
    run = Run(config, execution, RunFolder(out), Console(quiet=True))
    if run.fingerprint != fingerprint:
        raise UserError(f"process {processes.rank()} reads other data than the first process")
    for name in config.optimizers:
        trainer = run.trainer(name)
        trainer.checkpoint = None
        for _ in trainer.epochs():
            pass


def show_run(folder: RunFolder, console: Console) -> None:
    """Prints the table of a finished run and names its files."""
    summary = folder.read_summary()
    if summary is None:
        raise UserError(f"the run in {folder.path} is not finished: --resume continues it")
    console.print()
    console.print(result_table(summary["title"], folder.read_metrics(), summary["results"]))
    print_files(console, "run", folder.files())
