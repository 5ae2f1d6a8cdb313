"""Checkpoint files: one per optimizer, read with ``torch.load(weights_only=True)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from rlscuda.cli.errors import UserError, reading
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically
from rlscuda.files.documents import check

FORMAT = "rlscuda-checkpoint"
VERSION = 1


class Checkpoint(TypedDict):
    """What a file holds."""

    format: str
    version: int
    run: str
    optimizer_name: str
    training: dict[str, Any]


def save_checkpoint(path: Path, run: str, optimizer_name: str, training: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file to replace.
        run: fingerprint of the run, see :meth:`rlscuda.cli.config.RunConfig.fingerprint`.
        optimizer_name: ``rls``, ``sgd`` or ``adam``.
        training: :meth:`rlscuda.cli.training.Trainer.state_dict`.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "run": run,
        "optimizer_name": optimizer_name,
        "training": training,
    }
    write_atomically(path, lambda stream: save_archive(document, stream))


def load_checkpoint(path: Path, run: str, optimizer_name: str) -> dict[str, Any]:
    """Read a checkpoint and check that it belongs to this run.

    Returns:
        the ``training`` part, its tensors on the CPU.

    Raises:
        UserError: the file is truncated or damaged, is no checkpoint of this program, or belongs to
            another run or optimizer. Nothing is written.
    """
    document = _read(path, optimizer_name)
    with reading(f"{path} is not an rlscuda checkpoint", "; nothing was overwritten"):
        check(document, Checkpoint, "the checkpoint")
    if document["format"] != FORMAT:
        raise UserError(f"{path} is not an rlscuda checkpoint; nothing was overwritten")
    if document["version"] != VERSION:
        raise UserError(
            f"{path} is a checkpoint of format version {document.get('version')}, expected "
            f"{VERSION}; nothing was overwritten"
        )
    if document["optimizer_name"] != optimizer_name:
        raise UserError(
            f"{path} holds a run of the optimizer {document['optimizer_name']}, expected "
            f"{optimizer_name}; nothing was overwritten"
        )
    if document["run"] != run:
        raise UserError(
            f"{path} belongs to another run (fingerprint {document['run'][:12]}, this run's "
            f"config.json and data give {run[:12]}); nothing was overwritten"
        )
    return document["training"]


def _read(path: Path, optimizer_name: str) -> Any:
    try:
        with open(path, "rb") as stream:
            return load_archive(stream)
    except Exception as error:  # damaged bytes lead to errors of any type
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is truncated, damaged or was not "
            f"written by rlscuda ({reason[0][:120]}); nothing was overwritten; put back a copy of "
            f"it, or delete it and summary.json: train --resume trains {optimizer_name} again"
        ) from None
