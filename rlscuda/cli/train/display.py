"""What `rlscuda train` shows: progress bars, a line an epoch, tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rlscuda.cli.common.texts import one_line
from rlscuda.cli.train.optimizers import LABELS
from rlscuda.cli.train.pruning.gating import Gating
from rlscuda.cli.train.trainer import Trainer

REFRESH_SECONDS = 0.25
LONGEST_TABLE = 20


def train_shown(
    console: Console, trainer: Trainer, after_epoch: Callable[[Trainer], None] | None = None
) -> None:
    """Trains to the end with a progress bar over all steps and a line after each epoch.

    Args:
        console: Where to print.
        trainer: At the position it starts from.
        after_epoch: Called when the epoch's line is printed.
    """
    epochs, label, read_at = trainer.config.epochs, LABELS[trainer.name], 0.0

    def description() -> str:
        return f"{label} {min(trainer.epoch + 1, epochs)}/{epochs}"

    def show_step(_: Trainer, loss: Tensor) -> None:
        """Advances the bar, reading the loss a few times a second only."""
        nonlocal read_at
        now = time.perf_counter()
        if now - read_at >= REFRESH_SECONDS:
            read_at = now
            done, shown = trainer.steps_done, f"{float(loss):.3f}"
            bar.update(task, completed=done, loss=shown, description=description())

    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        done = trainer.steps_done
        task = bar.add_task(description(), total=trainer.total_steps, completed=done, loss="…")
        for row in trainer.epochs(show_step):
            _print_epoch(console, trainer, row)
            if after_epoch is not None:
                after_epoch(trainer)


def _print_epoch(console: Console, trainer: Trainer, row: dict[str, Any]) -> None:
    console.print(
        f"{LABELS[trainer.name]:<15} epoch {row['epoch']:>3}/{trainer.config.epochs}  "
        f"train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}  "
        f"val accuracy {100 * row['val_accuracy']:6.2f} %  {row['seconds']:6.1f} s",
        soft_wrap=True,
    )
    if isinstance(trainer.pruning, Gating) and row["pruning"]:
        gates, size = trainer.pruning.report.gates, f"{row['parameters']:,} parameters"
        on = sum(gate.state == "on" for gate in gates)
        console.print(f"{'':<15} {on} of {len(gates)} branches on: {size}", soft_wrap=True)
    if trainer.pruning is not None and "changed_val_loss" in row:
        stage = trainer.pruning.stages[-1]
        what = f"{stage.label} of {trainer.pruning.total}"
        console.print(
            f"{'':<15} {what}: {stage.parameters:,} parameters  val loss {stage.val_loss:.4f}"
            f"  val accuracy {100 * stage.val_accuracy:6.2f} %",
            soft_wrap=True,
        )


def result_table(
    title: str, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]
) -> Table:
    """Validation accuracy after each epoch, then seconds and test accuracy; a column an optimizer.

    Args:
        title: Printed above.
        rows: The rows of `metrics.json`.
        results: Of each optimizer, its entry in `summary.json`.
    """
    table = Table(
        title=one_line(title), title_justify="left", title_style="bold", caption_justify="left"
    )
    table.add_column("validation accuracy, %", justify="left")
    for name in results:
        table.add_column(LABELS[name], justify="right")
    accuracy = {(row["optimizer"], row["epoch"]): 100 * row["val_accuracy"] for row in rows}
    epochs = sorted({epoch for _, epoch in accuracy})
    last = epochs[-1]
    shown = [epoch for epoch in epochs if last <= LONGEST_TABLE or _kept(epoch, last)]
    for epoch in shown:
        cells = [accuracy.get((name, epoch)) for name in results]
        table.add_row(f"after epoch {epoch}", *_best_in_bold(cells, "{:.2f}", max))
    done = results.values()
    table.add_section()
    seconds = [result["seconds"] for result in done]
    table.add_row("seconds of training", *_best_in_bold(seconds, "{:.1f}", min))
    a_step = [1000 * result["seconds"] / result["steps"] for result in done]
    table.add_row("milliseconds a step", *_best_in_bold(a_step, "{:.2f}", min))
    table.add_section()
    test = [100 * result["test_accuracy"] for result in done]
    table.add_row("test accuracy, %", *_best_in_bold(test, "{:.2f}", max))
    if len(shown) < len(epochs):
        table.caption = "every epoch is in metrics.csv"
    return table


def _kept(epoch: int, last: int) -> bool:
    """Epochs of a long run that a table shows: the first five, about ten after, the last."""
    return epoch <= 5 or epoch == last or epoch % max(1, last // 10) == 0


def _best_in_bold(cells: list[float | None], pattern: str, best: Any) -> list[Text]:
    values = [pattern.format(cell) for cell in cells if cell is not None]
    top = pattern.format(best(cell for cell in cells if cell is not None)) if values else ""
    texts = ["–" if cell is None else pattern.format(cell) for cell in cells]
    several = len(cells) > 1
    return [Text(text, style="bold" if several and text == top else "") for text in texts]
