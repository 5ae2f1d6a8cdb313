"""The folder of a study: which files it holds, and when it may be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlscuda.cli.common.errors import UserError, reading
from rlscuda.cli.common.files import is_there, read_json, write_json
from rlscuda.cli.common.out_folder import is_empty
from rlscuda.studies.report import Study

FORMAT = "rlscuda-study"
VERSION = 1


class StudyFolder:
    """Paths and files of one study.

    Attributes:
        path: The folder.
        config: Its options.
        journal: A line for each piece of work that is done.
        result: Everything that was found; there once the study is finished.
        table: The tables, in Markdown.
        plot: The curves.
    """

    def __init__(self, path: Path):
        self.path = path
        names = ("config.json", "journal.jsonl", "study.json", "study.md", "curves.png")
        self.config, self.journal, self.result, self.table, self.plot = (path / n for n in names)

    def files(self) -> list[Path]:
        """Every file of the study that exists, but for the networks trained on the source."""
        named = (self.config, self.journal, self.result, self.table, self.plot)
        return [path for path in named if is_there(path)]

    def check_new(self, overwrite: bool) -> None:
        """Checks that a new study may be put here; touches nothing.

        Raises:
            UserError: The folder holds a study and `overwrite` is False, or something else.
        """
        if is_empty(self.path):
            return
        if not is_there(self.config):
            raise UserError(
                f"--out {self.path} is not empty and holds no study of rlscuda (no config.json); "
                "choose another folder"
            )
        self.read_options()
        if not overwrite:
            raise UserError(
                f"--out {self.path} already holds a study: --resume continues it, --overwrite "
                "replaces it"
            )

    def begin(self, options: dict[str, Any]) -> None:
        """Begins a study, in place of one that is here."""
        for path in [*self.files(), *(self.path / "networks").glob("source-*")]:
            path.unlink()
        write_json(self.config, {"format": FORMAT, "version": VERSION, "options": options})

    def read_options(self) -> Any:
        """The options of the study that is here, unchecked.

        Raises:
            UserError: There is none.
        """
        if not is_there(self.config):
            raise UserError(f"nothing to resume in {self.path}: {self.config} does not exist")
        document = read_json(self.config)
        expected = (FORMAT, VERSION)
        found = isinstance(document, dict) and (document.get("format"), document.get("version"))
        if found != expected:
            raise UserError(f"{self.config} is not the config of a study of this rlscuda")
        return document.get("options")

    def read_result(self) -> Study | None:
        """What was found; None while the study is not finished.

        Raises:
            UserError: The file is not one of this program's.
        """
        if not is_there(self.result):
            return None
        with reading(f"{self.result} is no study"):
            found = Study.from_dict(read_json(self.result))
            found.markdown()  # which reads all of it
            return found
