"""The folder of a run: which files it holds, and when it may be written."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.cli.common.files import check_folder, is_there, read_json, write_json
from rlscuda.cli.common.out_folder import check_free, is_empty
from rlscuda.cli.common.swap import finish, is_pending, replaced
from rlscuda.cli.report.folder import ReportFolder
from rlscuda.cli.train.checkpoint import COLUMNS, PRUNING_COLUMNS
from rlscuda.cli.train.options import OPTIMIZERS, RunConfig
from rlscuda.files.atomic import remove_leftovers, write_text
from rlscuda.files.documents import check

FORMAT = "rlscuda-run"
VERSION = 1


class Fingerprint(TypedDict):
    """Of the data, in `config.json`."""

    fingerprint: str


class Config(TypedDict):
    """`config.json`: what is read of it; the options are checked by `RunConfig`."""

    options: dict[str, Any]
    data: Fingerprint


class Result(TypedDict):
    """Of one optimizer, in `summary.json`: what is read of it."""

    test_accuracy: float
    seconds: float
    steps: int


class Summary(TypedDict):
    """`summary.json`."""

    title: str
    results: dict[str, Result]


class Metrics(TypedDict):
    """A row of `metrics.json`: what is read of it."""

    optimizer: str
    epoch: int
    val_accuracy: float


class RunFolder:
    """Paths and files of one run.

    Attributes:
        path: The folder.
        config: Options, data and versions of the run.
        metrics: One row an optimizer and epoch; `metrics.csv` holds the same.
        summary: Final test accuracy and timings; written once, at the end.
        plot: Loss and accuracy by epoch and by second.
        pruning: The report of a training that prunes as it goes, and the network it gave.
        board: Event files for TensorBoard, in a folder an optimizer.
    """

    def __init__(self, path: Path):
        self.path = path
        names = ("config.json", "metrics.json", "summary.json", "curves.png")
        self.config, self.metrics, self.summary, self.plot = (path / name for name in names)
        self.pruning = ReportFolder(path / "pruning")
        self.board = path / "tensorboard"

    def checkpoint(self, optimizer: str) -> Path:
        """The checkpoint of one optimizer."""
        return self.path / "checkpoints" / f"{optimizer}.pt"

    def files(self) -> list[Path]:
        """Every file of the run that exists.

        Raises:
            UserError: Something that is no file has the name of one, or no folder that of one.
        """
        check_folder(self.path / "checkpoints")
        check_folder(self.board)
        csv_file = self.metrics.with_suffix(".csv")
        named = [self.config, csv_file, self.metrics, self.summary, self.plot]
        checkpoints = sorted((self.path / "checkpoints").glob("*.pt"))
        events = sorted(self.board.glob("*/events.out.tfevents.*"))
        found = [path for path in named + checkpoints + events if is_there(path)]
        return found + self.pruning.existing()

    def check_new(self, overwrite: bool) -> None:
        """Checks that a new run may be put here; touches nothing.

        Raises:
            UserError: The folder holds a run and `overwrite` is False, or something that is no run.
        """
        if is_empty(self.path):
            return
        if not is_there(self.config):
            raise UserError(
                f"--out {self.path} is not empty and holds no run of rlscuda (no config.json); "
                "choose another folder"
            )
        self.read_config()
        self.files()
        if not overwrite:
            raise UserError(
                f"--out {self.path} already holds a run: --resume continues it, --overwrite "
                "replaces it"
            )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Reads files of the run that belong together, in the block.

        Raises:
            UserError: Another process writes to the folder, or has done so meanwhile.
        """
        before = self._state()
        try:
            yield
        finally:
            if self._state() != before:
                raise UserError(f"{self.path} was changed by another process while it was read")

    def _state(self) -> list[tuple[Path, int, int]]:
        check_free(self.path)
        state = []
        for path in self.files():
            with suppress(FileNotFoundError):  # deleted just now
                stat = path.stat()
                state.append((path, stat.st_ino, stat.st_mtime_ns))
        return state

    @property
    def is_pending(self) -> bool:
        """Whether a process was killed while it replaced the run that was here."""
        return is_pending(self.path)

    def finish(self) -> None:
        """Goes on where a process was killed while it replaced files; else changes nothing."""
        finish(self.path, self.files())
        remove_leftovers(self.path / "checkpoints")
        self.pruning.finish()
        self.pruning.remove_folder()

    def begin(self, document: dict[str, Any]) -> None:
        """Writes `config.json` in place of all the files of the run that is here."""
        with replaced(self.path, self.files()) as new:
            write_json(new / "config.json", {"format": FORMAT, "version": VERSION, **document})
        self.pruning.remove_folder()

    def read_config(self) -> dict[str, Any]:
        """Reads `config.json`.

        Raises:
            UserError: There is none, or it is not one of this program's.
        """
        if not is_there(self.config):
            raise UserError(f"nothing to resume in {self.path}: {self.config} does not exist")
        document = read_json(self.config)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise UserError(f"{self.config} is not the config of a run of rlscuda")
        if document.get("version") != VERSION:
            raise UserError(
                f"{self.config} has format version {document.get('version')}, expected {VERSION}"
            )
        with reading(str(self.config)):
            check(document, Config, "the run")
        return document

    def read_options(self, given: Mapping[str, Any]) -> RunConfig:
        """The options in `config.json`, which those given again agree with.

        Raises:
            UserError: They do not, or the file is not one of this program's.
        """
        return RunConfig.resumed(self.read_config()["options"], given)

    def read_summary(self) -> Summary | None:
        """Reads `summary.json`; None while the run is not finished.

        Raises:
            UserError: It is not one of this program's.
        """
        if not is_there(self.summary):
            return None
        document = read_json(self.summary)
        with reading(str(self.summary)):
            check(document, Summary, "the summary")
            for name, result in document["results"].items():
                if name not in OPTIMIZERS or result["steps"] < 1:
                    raise ValueError(f"steps of one of {', '.join(OPTIMIZERS)} expected, got "
                                     f"{result['steps']} of {name!r}")  # fmt: skip
        return document

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Writes `metrics.csv` and `metrics.json`: one row an optimizer and epoch."""
        text = io.StringIO()
        pruned = [name for name in PRUNING_COLUMNS if any(name in row for row in rows)]
        writer = csv.DictWriter(text, [*COLUMNS, *pruned], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics.with_suffix(".csv"), text.getvalue())
        write_json(self.metrics, rows)

    def read_metrics(self) -> list[Metrics]:
        """Reads `metrics.json`; NaN and infinity come back as None.

        Raises:
            UserError: It is not one of this program's.
        """
        rows = read_json(self.metrics)
        with reading(str(self.metrics)):
            check(rows, list[Metrics], "the metrics")
            if not rows:
                raise ValueError("the metrics must have a row, got none")
        return rows
