"""The folder of a pruning: which files it holds, and when it may be written."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.common.files import check_folder, is_there, read_json, write_json
from rlscuda.cli.common.out_folder import is_empty
from rlscuda.cli.common.swap import finish, replaced

FORMAT = "rlscuda-prune"
VERSION = 1
MODELS = {
    "pruned.safetensors": "the network just pruned and the optimizer's state, for load_pruned",
    "recovered.safetensors": "the same after training on",
    "model.onnx": "the final network for onnxruntime and others, any batch size",
    "model.pt2": "the final network as a torch.export program, any batch size",
}
REPORTS = ("report.html", "report.json")
_EARLIER = ("report.png",)  # which versions before wrote: it goes when the others are replaced


@dataclass(frozen=True)
class ReportFolder:
    """The files of one pruning.

    Attributes:
        path: Their folder.
    """

    path: Path

    def existing(self) -> list[Path]:
        """Every file of the pruning that exists, report.json last.

        Raises:
            UserError: Something that is no file has the name of one, or no folder that of theirs.
        """
        check_folder(self.path)
        names = (*MODELS, *_EARLIER, *REPORTS)
        return [self.path / name for name in names if is_there(self.path / name)]

    def remove_folder(self) -> None:
        """Removes the folder where it is there and empty."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def check_new(self, overwrite: bool) -> None:
        """Checks that a pruning may be put here; touches nothing.

        Raises:
            UserError: The folder holds a pruning and `overwrite` is False, or something that is no
                pruning.
        """
        if is_empty(self.path):
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

    def replaced(self) -> AbstractContextManager[Path]:
        """A new folder to write to, whose files then take the place of those here, all at once.

        Where the block raises, the files here stay as they were.
        """
        return replaced(self.path, self.existing())

    def finish(self) -> None:
        """Goes on where a process was killed while it replaced the files; else changes nothing."""
        finish(self.path, self.existing())


def write_document(path: Path, content: dict[str, Any]) -> None:
    """Writes `report.json`."""
    write_json(path, {"format": FORMAT, "version": VERSION, **content})
