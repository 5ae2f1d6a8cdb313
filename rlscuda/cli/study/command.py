"""`rlscuda study pretraining`: from options to a folder with one table, one plot and one JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlscuda.cli.common.errors import reading
from rlscuda.cli.common.execution import Execution
from rlscuda.cli.common.files import write_json
from rlscuda.cli.common.out_folder import writing
from rlscuda.cli.common.texts import one_line, print_files
from rlscuda.cli.data.dataset import load_dataset
from rlscuda.cli.study.folder import StudyFolder
from rlscuda.cli.study.options import StudyOptions
from rlscuda.cli.study.plot import plot_study
from rlscuda.files.atomic import write_text
from rlscuda.optional import optional
from rlscuda.studies.report import HEADS, Study
from rlscuda.studies.runner import pretraining

_VALIDATION = 0.2  # of the training images
_NEEDED = {"safetensors": "pruning", "matplotlib": "cli"}


def start(
    options: StudyOptions, execution: Execution, out: Path, overwrite: bool, console: Console
) -> None:
    """Starts a study in a folder.

    Raises:
        UserError: An option is wrong, the data cannot be read, or the folder holds something,
            cannot be written or is written by another process.
    """
    folder = StudyFolder(out)
    with writing(out):
        folder.check_new(overwrite)
        prepared = _Prepared(options, execution, console)
        folder.begin(dataclasses.asdict(options))
        prepared.run(folder)


def resume(given: Mapping[str, Any], execution: Execution, out: Path, console: Console) -> None:
    """Goes on with the study in a folder; of a finished one, shows the table.

    Args:
        given: The options written on the command line; they must agree with the study's.
        execution: How to run it.
        out: The folder.
        console: Where to print.

    Raises:
        UserError: There is no study, or an option or the data differ.
    """
    folder = StudyFolder(out)
    options = StudyOptions.resumed(folder.read_options(), given)
    done = folder.read_result()
    if done is not None:
        console.print(f"the study in {one_line(out)} is finished", soft_wrap=True)
        _show(done, folder, console)
        return
    with writing(out):
        _Prepared(options, execution, console).run(folder)


class _Prepared:
    """A study whose packages are there and whose data have been read.

    Args:
        options: What is studied.
        execution: How to run it.
        console: Where to print.
    """

    def __init__(self, options: StudyOptions, execution: Execution, console: Console):
        for package, extra in _NEEDED.items():
            optional(package, extra)  # what is used at the end is looked for at the start
        device, self.cell = execution.prepare(), options.settings
        self.options, self.console = options, console
        with console.status(Text(f"reading {one_line(self.cell.data)}")):
            data = load_dataset(self.cell.data, _VALIDATION, None, execution.cache).to(device)
        self.target, self.source = self.cell.tasks(data)
        self.shape = self.cell.shape(data)

    def run(self, folder: StudyFolder) -> None:
        """Runs what is left of it, writes the files of the result and shows it."""
        console, options, target = self.console, self.options, self.target
        name = options.network or next(iter(self.cell.networks))
        network, shape, title = self.cell.networks[name], self.shape, f"{name}, {options.cell}"
        console.print(Text(title, "bold"))
        console.print(
            f"{len(target.train)} training, {len(target.val)} validation and {len(target.test)} "
            "test images of the target",
            soft_wrap=True,
        )
        with reading("the study cannot go on"):
            study = pretraining(
                lambda classes: network(shape, classes), target, self.source, folder.path,
                options.protocol, lambda text: console.print(one_line(text), soft_wrap=True),
            )  # fmt: skip
        write_text(folder.table, study.markdown())
        plot_study(folder.plot, title, study)
        write_json(folder.result, study.to_dict())  # last: it says that the study is finished
        _show(study, folder, console)


def _show(study: Study, folder: StudyFolder, console: Console) -> None:
    """Prints the table and names the files."""
    for title, rows in study.tables():
        table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
        for head in HEADS:
            table.add_column(head, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table)
    for line in study.failures():
        console.print(line, soft_wrap=True)
    print_files(console, "study", folder.files())
