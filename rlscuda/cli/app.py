"""The commands and their options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.execution import Execution
from rlscuda.cli.common.options import declared
from rlscuda.cli.common.texts import terminal
from rlscuda.cli.prune.options import PruneOptions
from rlscuda.cli.study.options import StudyOptions
from rlscuda.cli.train.options import RunConfig

app = typer.Typer(
    name="rlscuda",
    help="Recursive-least-squares training for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

studies = typer.Typer(help="Controlled studies, each one command.", no_args_is_help=True)
app.add_typer(studies, name="study")


def unfolded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters `Annotated[dict, Kind]` are the options that `Kind` declares.

    The command is called with a dict of them.
    """
    names: dict[str, list[str]] = {}
    parameters: list[Parameter] = []
    for own in inspect.signature(command, eval_str=True).parameters.values():
        of, kind = (*get_args(own.annotation), None, None)[:2]
        options = [(own.name, own.default, own.annotation)]
        if of is dict:
            options = [
                (field.name, field.default, Annotated[(of, typer.Option(help=option.help))])
                for field, of, option in declared(kind)
            ]
            names[own.name] = [name for name, *_ in options]
        for name, default, hint in options:
            parameters.append(
                Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            )

    @functools.wraps(command)
    def called(**values: Any) -> None:
        dicts = {name: {key: values.pop(key) for key in keys} for name, keys in names.items()}
        command(**values, **dicts)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


@app.command()
@unfolded
def train(
    *,
    context: typer.Context,
    options: Annotated[dict, RunConfig],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/MODEL-DATA by default.")
    ] = None,
    execution: Annotated[dict, Execution],
    checkpoint_every: Annotated[
        int, typer.Option(help="Checkpoint after every N steps too, not only each epoch.")
    ] = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files for TensorBoard too.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it was killed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
) -> None:
    """Train a network with each optimizer in turn and compare them.

    All start from the same weights and see the same images in the same order. Under torchrun each
    process takes an equal share of every minibatch, and the first alone writes. The run folder
    holds config.json, metrics.csv, metrics.json, summary.json, curves.png and checkpoints, in
    pruning/ the report and the network of a training that prunes as it goes, and in tensorboard/
    its event files.
    """
    from rlscuda.cli.train import command, processes

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    how = Execution(**execution, checkpoint_every=checkpoint_every, tensorboard=tensorboard)
    data = Path(options["data"].replace(":", ".")).name.removesuffix(".npz") or "data"
    folder = out or Path("runs") / f"{options['model'].replace(':', '.')}-{data}"
    console = terminal()
    try:
        with processes.together():
            if processes.rank() > 0:
                command.follow(how, folder)
            elif resume:
                command.resume(_named(context, options), how, folder, console)
            else:
                command.start(RunConfig(**options), how, folder, overwrite, console)
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; rlscuda train --resume --out {folder} continues from the last "
            "checkpoint",
            exit_code=130,
        ) from None


@app.command()
@unfolded
def prune(
    *,
    run: Annotated[Path, typer.Option(help="Folder of a finished run; it stays as it is.")],
    optimizer: Annotated[
        str | None, typer.Option(help="Whose network of the run: rls where it has one.")
    ] = None,
    options: Annotated[dict, PruneOptions],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the result; RUN-pruned by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the pruning in --out.")
    ] = False,
    execution: Annotated[dict, Execution],
) -> None:
    """Make the network of a finished run smaller, without training or with a little.

    The folder of the result holds report.html, report.json, the pruned network as safetensors and
    what it was exported to.
    """
    from rlscuda.cli.prune import command
    from rlscuda.cli.train import processes

    processes.check_alone("prune")
    chosen, how = PruneOptions(**options), Execution(**execution)
    named = run if run.name not in ("", "..") else run.resolve()  # `.` by the name of its folder
    folder = out or named.parent / f"{named.name}-pruned"
    try:
        command.prune(run, optimizer, chosen, how, folder, overwrite, terminal())
    except KeyboardInterrupt:
        raise UserError("interrupted; no file is half-written", exit_code=130) from None


@studies.command()
@unfolded
def pretraining(
    *,
    context: typer.Context,
    options: Annotated[dict, StudyOptions],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study; runs/pretraining-CELL by default.")
    ] = None,
    execution: Annotated[dict, Execution],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the study in --out where it was killed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the study in --out.")
    ] = False,
) -> None:
    """Ask whether pre-training makes a network easier to prune, as Hubens et al. 2020 did.

    Networks that have learned other classes before and networks from scratch, paired by seed,
    learn the same images; copies are pruned along a ladder. The folder holds study.md, study.json,
    curves.png, the journal, and the networks of the source with their matrices.
    """
    from rlscuda.cli.study import command
    from rlscuda.cli.train import processes

    processes.check_alone("study")
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    folder = out or Path("runs") / f"pretraining-{options['cell']}"
    how, console = Execution(**execution), terminal()
    try:
        if resume:
            command.resume(_named(context, options), how, folder, console)
        else:
            command.start(StudyOptions(**options), how, folder, overwrite, console)
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; rlscuda study pretraining --resume --out {folder} continues",
            exit_code=130,
        ) from None


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


def _named(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the command line names, without the defaults."""
    return {
        name: value
        for name, value in options.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
