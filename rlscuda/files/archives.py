"""Archives of `torch.save`, read without pickled code, and only as they were written."""

from __future__ import annotations

import zipfile
from typing import IO, Any

import torch


def save_archive(document: Any, stream: IO[bytes]) -> None:
    """`torch.save` with checksums, also where the process has switched them off."""
    switched_on = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(document, stream)
    finally:
        torch.serialization.set_crc32_options(switched_on)


def load_archive(stream: IO[bytes]) -> Any:
    """`torch.load` on the CPU, with `weights_only`, of an archive whose checksums are right.

    `torch.save` writes a zip archive, which has the CRC-32 of each record; `torch.load` does
    not compare them. What it would take for something else than the stored bytes of a record, as
    for a folder, is refused as well.

    Args:
        stream: A binary file object at the start of the archive, which can be rewound.

    Raises:
        ValueError: A record is not what was written.
        Exception: Of `zipfile` and `torch.load`, where it is no such archive at all.
    """
    with zipfile.ZipFile(stream) as archive:
        for record in archive.infolist():
            stored = (zipfile.ZIP_STORED, record.file_size, 0)
            if (record.compress_type, record.compress_size, record.external_attr) != stored:
                raise ValueError(f"the record {record.filename!r} is not as torch.save writes it")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the record {damaged!r} does not have the checksum that the file holds")
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=True)
