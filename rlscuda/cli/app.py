"""The commands and their options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from rlscuda.cli.config import RunConfig
from rlscuda.cli.errors import UserError
from rlscuda.cli.prune_options import IMPORTANCES, PruneOptions
from rlscuda.cli.texts import terminal

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
    prune_schedule: Annotated[
        str | None,
        typer.Option(
            help="Prune while rls trains, CURVE:RATIO:ROUNDS: cubic:0.7:4, or with options, "
            "linear:0.5:3,warmup=2,tolerance=5%,budget=4. Curves: one_shot, linear, iterative, "
            "cubic, one_cycle."
        ),
    ] = RunConfig.prune_schedule,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it was killed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
) -> None:
    """Train a network with each optimizer in turn and compare them.

    All start from the same weights and see the same images in the same order. The run folder
    holds config.json, metrics.csv, metrics.json, summary.json, curves.png and checkpoints, and
    in pruning/ the report and the network of a training that prunes as it goes.
    """
    from rlscuda.cli import train as command
    from rlscuda.cli.execution import Execution

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    options = {field.name: context.params[field.name] for field in dataclasses.fields(RunConfig)}
    execution = Execution(device, threads, checkpoint_every, cache)
    folder = out or Path("runs") / f"{model.replace(':', '.')}-{_data_stem(data)}"
    console = terminal()
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
def prune(
    context: typer.Context,
    run: Annotated[Path, typer.Option(help="Folder of a finished run; it stays as it is.")],
    optimizer: Annotated[
        str | None, typer.Option(help="Whose network of the run: rls where it has one.")
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(help="Share of the channels to remove: 0.7, 70% or conv*=0.5,fc1=0.8."),
    ] = PruneOptions.ratio,
    target_flops: Annotated[
        str | None, typer.Option(help="FLOPs an image to get down to: 1.5M, or 0.5x or 50%.")
    ] = PruneOptions.target_flops,
    target_params: Annotated[
        str | None, typer.Option(help="Parameters to get down to: 250k, or 0.5x or 50%.")
    ] = PruneOptions.target_params,
    max_loss: Annotated[
        str | None,
        typer.Option(help="Remove what the validation loss allows: it may rise by 0.1 or 10%."),
    ] = PruneOptions.max_loss,
    importance: Annotated[
        str, typer.Option(help=f"What ranks the channels: {', '.join(IMPORTANCES)}.")
    ] = PruneOptions.importance,
    selection: Annotated[
        str | None,
        typer.Option(help="greedy (one at a time, all else downdated) or one-shot."),
    ] = PruneOptions.selection,
    scope: Annotated[
        str, typer.Option(help="layer (the same share of each) or global (the cheapest of all).")
    ] = PruneOptions.scope,
    source: Annotated[
        str | None,
        typer.Option(
            help="Of the matrices: own (those that rls trained with) or calibration (from "
            "training images); own where the run has them."
        ),
    ] = PruneOptions.source,
    round_to: Annotated[
        int, typer.Option(help="Keep a multiple of this many channels.")
    ] = PruneOptions.round_to,
    compensate: Annotated[
        bool, typer.Option(help="Change the remaining weights to make up for what goes.")
    ] = PruneOptions.compensate,
    adapt_norms: Annotated[
        bool, typer.Option(help="Let the statistics of batch norms follow the cut.")
    ] = PruneOptions.adapt_norms,
    calibration_images: Annotated[
        int, typer.Option(help="Training images that calibrate, or that own matrices are held to.")
    ] = PruneOptions.calibration_images,
    recover: Annotated[
        int, typer.Option(help="Epochs to train on, with the same optimizer.")
    ] = PruneOptions.recover,
    recover_lr: Annotated[
        float | None,
        typer.Option(help="Their first step size; .3 of the run's for RLS, else a fifth."),
    ] = PruneOptions.recover_lr,
    export: Annotated[
        str | None, typer.Option(help="Comma list of onnx and pt2 (torch.export).")
    ] = PruneOptions.export,
    measure_batch: Annotated[
        int | None,
        typer.Option(help="Images of the forward that is timed; the run's batch by default."),
    ] = PruneOptions.measure_batch,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the result; RUN-pruned by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the pruning in --out.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where torchvision keeps its downloads.")
    ] = None,
) -> None:
    """Make the network of a finished run smaller, without training or with a little.

    The folder of the result holds report.html, report.png, report.json, the pruned network as
    safetensors and what it was exported to.
    """
    from rlscuda.cli import prune as command
    from rlscuda.cli.execution import Execution

    fields = dataclasses.fields(PruneOptions)
    options = PruneOptions(**{field.name: context.params[field.name] for field in fields})
    execution = Execution(device, threads, cache=cache)
    folder = out or _pruned_folder(run)
    try:
        command.prune(run, optimizer, options, execution, folder, overwrite, terminal())
    except KeyboardInterrupt:
        raise UserError("interrupted; no file is half-written", exit_code=130) from None


@app.command()
def info() -> None:
    """Print versions, what was built, and what runs here."""
    from rlscuda.cli.info import print_info

    print_info(terminal())


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


def _pruned_folder(run: Path) -> Path:
    """RUN-pruned; of a path that ends in no name, such as ``.``, by the name of its folder."""
    named = run if run.name not in ("", "..") else run.resolve()
    return named.parent / f"{named.name}-pruned"


def _data_stem(data: str) -> str:
    return Path(data.replace(":", ".")).name.removesuffix(".npz") or "data"
