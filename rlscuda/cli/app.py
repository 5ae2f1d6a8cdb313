"""The commands and their options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rlscuda.cli.config import RunConfig
from rlscuda.cli.errors import UserError

app = typer.Typer(
    name="rlscuda",
    help="Recursive-least-squares training for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def train(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="lenet5, mlp, resnet20, vgg16 or module:factory.")
    ] = RunConfig.model,
    data: Annotated[
        str, typer.Option(help="mnist5k, PATH.npz, torchvision:NAME or a folder of class folders.")
    ] = RunConfig.data,
    optimizer: Annotated[
        str, typer.Option(help="Comma list of rls, sgd, adam, trained in turn.")
    ] = RunConfig.optimizer,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = (
        RunConfig.epochs
    ),
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = RunConfig.batch_size,
    seed: Annotated[
        int, typer.Option(help="Of initial weights, data order and all else that is random.")
    ] = RunConfig.seed,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/MODEL-DATA by default.")
    ] = None,
    lr: Annotated[
        str | None, typer.Option(help="Step size: 0.1, or rls=0.1,sgd=0.05.")
    ] = RunConfig.lr,
    weight_decay: Annotated[
        str | None, typer.Option(help="Weight decay: 0.01, or rls=0.05,adam=0.")
    ] = RunConfig.weight_decay,
    schedule: Annotated[
        str, typer.Option(help="cosine (to zero at the last step) or constant.")
    ] = RunConfig.schedule,
    form: Annotated[
        str, typer.Option(help="Form of the RLS update: adaptive, paper or natural.")
    ] = RunConfig.form,
    val_fraction: Annotated[
        float, typer.Option(help="Share of the training images that validates.")
    ] = RunConfig.val_fraction,
    image_size: Annotated[
        int | None, typer.Option(help="Side that the images of a folder are resized to.")
    ] = RunConfig.image_size,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Checkpoint after every N steps too, not only each epoch.")
    ] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Where torchvision keeps its downloads.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it was killed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
) -> None:
    """Train a network with each optimizer in turn and compare them.

    All start from the same weights and see the same images in the same order. The run folder
    holds config.json, metrics.csv, metrics.json, summary.json, curves.png and checkpoints.
    """
    from rlscuda.cli import train as command
    from rlscuda.cli.execution import Execution

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    options = {field.name: context.params[field.name] for field in dataclasses.fields(RunConfig)}
    execution = Execution(device, threads, checkpoint_every, cache)
    folder = out or Path("runs") / f"{model.replace(':', '.')}-{_data_stem(data)}"
    console = Console()
    try:
        if resume:
            command.resume(_given(context, options), execution, folder, console)
        else:
            command.start(RunConfig(**options), execution, folder, overwrite, console)
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; rlscuda train --resume --out {folder} continues from the last "
            "checkpoint",
            exit_code=130,
        ) from None


@app.command()
def info() -> None:
    """Print versions, what was built, and what runs here."""
    from rlscuda.cli.info import print_info

    print_info(Console())


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks, such as rls_update; all by default.")
    ] = None,
) -> None:
    """Run the benchmarks of a source checkout and print their tables."""
    from rlscuda.cli.bench import run_benchmarks

    run_benchmarks(names or [])


def _given(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the command line names, without the defaults."""
    return {
        name: value
        for name, value in options.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def _data_stem(data: str) -> str:
    return Path(data.replace(":", ".")).name.removesuffix(".npz") or "data"
