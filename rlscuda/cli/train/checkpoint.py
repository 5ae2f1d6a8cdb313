"""Checkpoint files: one per optimizer, read with `torch.load(weights_only=True)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from rlscuda.cli.common.errors import UserError, reading
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
    """Writes a checkpoint atomically.

    Args:
        path: The file to replace.
        run: Fingerprint of the run, see `RunConfig.fingerprint`.
        optimizer_name: `rls`, `sgd` or `adam`.
        training: Of `Trainer.state_dict`.
    """
    document = Checkpoint(
        format=FORMAT, version=VERSION, run=run, optimizer_name=optimizer_name, training=training
    )
    write_atomically(path, lambda stream: save_archive(document, stream))


def load_checkpoint(path: Path, run: str, optimizer_name: str) -> dict[str, Any]:
    """Reads a checkpoint and checks that it belongs to this run.

    Returns:
        The `training` part, its tensors on the CPU.

    Raises:
        UserError: The file is truncated or damaged, is no checkpoint of this program, or belongs to
            another run or optimizer. Nothing is written.
    """
    kept = "; nothing was overwritten"
    try:
        with open(path, "rb") as stream:
            document = load_archive(stream)
    except Exception as error:  # damaged bytes lead to errors of any type
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is truncated, damaged or was not "
            f"written by rlscuda ({reason[0][:120]}){kept}; put back a copy of "
            f"it, or delete it and summary.json: train --resume trains {optimizer_name} again"
        ) from None
    with reading(f"{path} is not an rlscuda checkpoint", kept):
        check(document, Checkpoint, "the checkpoint")
    if document["format"] != FORMAT:
        raise UserError(f"{path} is not an rlscuda checkpoint{kept}")
    if document["version"] != VERSION:
        raise UserError(
            f"{path} is a checkpoint of format version {document['version']}, expected "
            f"{VERSION}{kept}"
        )
    if document["optimizer_name"] != optimizer_name:
        raise UserError(
            f"{path} holds a run of the optimizer {document['optimizer_name']}, expected "
            f"{optimizer_name}{kept}"
        )
    if document["run"] != run:
        raise UserError(
            f"{path} belongs to another run (fingerprint {document['run'][:12]}, this run's "
            f"config.json and data give {run[:12]}){kept}"
        )
    return document["training"]
