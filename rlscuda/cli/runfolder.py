"""The folder of a run: which files it holds, and when it may be written."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from rlscuda.cli.config import OPTIMIZERS
from rlscuda.cli.errors import UserError, reading
from rlscuda.cli.files import check_folder, is_there
from rlscuda.cli.json_files import read_json, write_json
from rlscuda.cli.out_folder import check_free, is_empty
from rlscuda.cli.prune_files import PruneFiles
from rlscuda.cli.swap import finish, is_pending, replaced
from rlscuda.files.atomic import remove_leftovers, write_text
from rlscuda.files.documents import check

FORMAT = "rlscuda-run"
VERSION = 1
COLUMNS = (
    "optimizer",
    "epoch",
    "steps",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "seconds",
    "lr",
)
PRUNING_COLUMNS = (
    "parameters",
    "flops",
    "pruning",
    "changed_val_loss",
    "changed_val_accuracy",
)  # of the rows of a training that prunes as it goes


class Fingerprint(TypedDict):
    """Of the data, in ``config.json``."""

    fingerprint: str


class Config(TypedDict):
    """``config.json``: what is read of it; the options are checked by :class:`RunConfig`."""

    options: dict[str, Any]
    data: Fingerprint


class Result(TypedDict):
    """Of one optimizer, in ``summary.json``: what is read of it."""

    test_accuracy: float
    seconds: float
    steps: int


class Summary(TypedDict):
    """``summary.json``."""

    title: str
    results: dict[str, Result]


class Metrics(TypedDict):
    """A row of ``metrics.json``: what is read of it."""

    optimizer: str
    epoch: int
    val_accuracy: float


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Options, data and versions of the run."""
        return self.path / "config.json"

    @property
    def metrics_csv(self) -> Path:
        """One line an optimizer and epoch."""
        return self.path / "metrics.csv"

    @property
    def metrics_json(self) -> Path:
        """The same, as a list."""
        return self.path / "metrics.json"

    @property
    def summary(self) -> Path:
        """Final test accuracy and timings; written once, at the end."""
        return self.path / "summary.json"

    @property
    def plot(self) -> Path:
        """Loss and accuracy by epoch and by second."""
        return self.path / "curves.png"

    @property
    def pruning(self) -> PruneFiles:
        """The report of a training that prunes as it goes, and the network it gave."""
        return PruneFiles(self.path / "pruning")

    def checkpoint(self, optimizer: str) -> Path:
        """The checkpoint of one optimizer."""
        return self.path / "checkpoints" / f"{optimizer}.pt"

    def files(self) -> list[Path]:
        """Every file of the run that exists.

        Raises:
            UserError: something that is no file has the name of one, or no folder that of one.
        """
        check_folder(self.path / "checkpoints")
        named = [self.config, self.metrics_csv, self.metrics_json, self.summary, self.plot]
        checkpoints = sorted((self.path / "checkpoints").glob("*.pt"))
        return [path for path in named + checkpoints if is_there(path)] + self.pruning.existing()

    def check_new(self, overwrite: bool) -> None:
        """Check that a new run may be put here; touch nothing.

        Raises:
            UserError: the folder holds a run and ``overwrite`` is False, or something that is no
                run.
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
        """Read files of the run that belong together, in the block.

        Raises:
            UserError: another process writes to the folder, or has done so meanwhile.
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
        """Go on where a process was killed while it replaced files; else change nothing."""
        finish(self.path, self.files())
        remove_leftovers(self.path / "checkpoints")
        self.pruning.finish()
        self.pruning.remove_folder()

    def read_config(self) -> dict[str, Any]:
        """Read ``config.json``.

        Raises:
            UserError: there is none, or it is not one of this program's.
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

    def begin(self, document: dict[str, Any]) -> None:
        """Write ``config.json`` in place of all the files of the run that is here."""
        with replaced(self.path, self.files()) as new:
            write_json(new / "config.json", {"format": FORMAT, "version": VERSION, **document})
        self.pruning.remove_folder()

    def read_summary(self) -> Summary | None:
        """Read ``summary.json``; None while the run is not finished.

        Raises:
            UserError: it is not one of this program's.
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

    def write_summary(self, document: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.summary, document)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write ``metrics.csv`` and ``metrics.json``: one row an optimizer and epoch."""
        text = io.StringIO()
        pruned = [name for name in PRUNING_COLUMNS if any(name in row for row in rows)]
        writer = csv.DictWriter(text, [*COLUMNS, *pruned], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.metrics_csv, text.getvalue())
        write_json(self.metrics_json, rows)

    def read_metrics(self) -> list[Metrics]:
        """Read ``metrics.json``; NaN and infinity come back as None.

        Raises:
            UserError: it is not one of this program's.
        """
        rows = read_json(self.metrics_json)
        with reading(str(self.metrics_json)):
            check(rows, list[Metrics], "the metrics")
            if not rows:
                raise ValueError("the metrics must have a row, got none")
        return rows
