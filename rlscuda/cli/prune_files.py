"""The folder of a pruning: which files it holds, and when it may be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlscuda.cli.errors import UserError
from rlscuda.cli.files import check_folder, is_there
from rlscuda.cli.json_files import read_json, write_json
from rlscuda.cli.out_folder import check_writable

FORMAT = "rlscuda-prune"
VERSION = 1
MODELS = {
    "pruned.safetensors": "the network just pruned and the optimizer's state, for load_pruned",
    "recovered.safetensors": "the same after training on",
    "model.onnx": "the final network for onnxruntime and others, any batch size",
    "model.pt2": "the final network as a torch.export program, any batch size",
}
REPORTS = {
    "report.html": "the report, to look at",
    "report.png": "its figures on one sheet",
    "report.json": "its numbers",
}


@dataclass(frozen=True)
class PruneFiles:
    """The files of one pruning.

    Attributes:
        path: their folder.
    """

    path: Path

    @property
    def _new(self) -> Path:
        """The folder beside it that is written first."""
        path = self.path.resolve()
        return path.parent / f".{path.name}.tmp"

    def existing(self) -> list[Path]:
        """Every file of the pruning that exists, report.json last.

        Raises:
            UserError: something that is no file has the name of one, or no folder that of theirs.
        """
        check_folder(self.path)
        return [self.path / name for name in (*MODELS, *REPORTS) if is_there(self.path / name)]

    def remove_folder(self) -> None:
        """Remove the folder where it is there and empty."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def check_new(self, overwrite: bool) -> None:
        """Check that a pruning may be put here; touch nothing.

        Raises:
            UserError: the folder cannot be written, holds a pruning and ``overwrite`` is False, or
                holds something that is no pruning.
        """
        check_writable(self.path)
        check_writable(self._new.parent, f"the folder beside --out {self.path}, written first,")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        marker = self.path / "report.json"
        document = read_json(marker) if is_there(marker) else None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise UserError(
                f"--out {self.path} is not empty and holds no pruning of rlscuda (no report.json "
                "of one); choose another folder"
            )
        self.existing()
        if not overwrite:
            raise UserError(f"--out {self.path} already holds a pruning: --overwrite replaces it")

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """A new folder to write to, whose files then take the place of those here.

        Where the block raises, this folder stays as it was.
        """
        new = self._new
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            self.path.mkdir(exist_ok=True)
            for path in reversed(self.existing()):
                path.unlink()
            for name in (*MODELS, *REPORTS):
                if (new / name).is_file():
                    os.replace(new / name, self.path / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def write_document(path: Path, content: dict[str, Any]) -> None:
    """Write ``report.json``."""
    write_json(path, {"format": FORMAT, "version": VERSION, **content})
