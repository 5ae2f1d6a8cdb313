"""Damaged data sets."""

from __future__ import annotations

import functools
import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import damages
import numpy as np
from case import Case, file, nothing, spread
from workspace import DATA, NEW

_LABELS = np.arange(90) % 3
_ARRAYS: dict[str, list[Any]] = {
    "x_train": [
        np.zeros(()), np.zeros(90), np.zeros((90, 0, 8)), np.zeros((0, 8, 8)),
        np.zeros((90, 8, 8), "c8"),
        np.full((90, 8, 8), None), np.zeros((90, 8, 8), "U3"), np.zeros((90, 8, 8), bool),
        np.full((90, 8, 8), math.nan), np.full((90, 8, 8), -math.inf), np.full((90, 8, 8), 1e300),
        np.full((90, 8, 8), 1e38, "f4"), np.zeros((89, 8, 8)), np.zeros((1, 8, 8)),
        np.zeros((2, 8, 8)),
        np.zeros((90, 1, 1, 1, 1)), np.zeros((90, 7, 8, 8)), np.zeros((90, 8, 8), ">f4"),
        np.zeros((90, 8, 8), "f2"), np.zeros((90, 8, 8), np.longdouble),
        np.zeros((90, 8, 8), "M8[s]"),
        np.zeros((90, 8, 8), [("a", "f4")]), np.zeros((90, 8, 8), "S4"), np.zeros((90, 9, 9)),
        np.full((90, 8, 8), 2**62), np.full((90, 8, 8), 2**63, "u8"), np.zeros((90, 1)),
    ],
    "y_train": [
        _LABELS * 10**9, _LABELS + 10**9, np.full(90, 2**62), np.full(90, 2**63, "u8"), _LABELS - 1,
        _LABELS.astype(float), _LABELS[:, None, None], _LABELS[:89], np.zeros(90, int), np.array(3),
        np.zeros((90, 3), int), _LABELS.astype(bool), _LABELS.astype("U2"), _LABELS.astype(object),
        _LABELS.astype(">i4"), _LABELS * 100, np.zeros(0, int), _LABELS.astype("u1")[:, None],
    ],
    "x_test": [np.zeros((30, 9, 9)), np.full((30, 8, 8), math.nan), np.zeros((30, 3, 8, 8)),
               np.zeros(30), np.full((30, 8, 8), None), np.zeros((29, 8, 8))],
    "y_test": [np.full(30, 5), np.full(30, 10**9), np.zeros(30), np.full(30, -1), np.zeros(29, int),
               np.full(30, 2**63, "u8")],
    "classes": [np.array("a"), np.zeros((2, 2)), np.array(["a", "b"]), np.array([None] * 3, object),
                np.zeros(0), np.array(["x"] * 100_000), np.array([math.nan] * 3)],
    "other": [np.zeros(3), np.full(3, None)],
}  # fmt: skip


def _replaced(path: str, key: str, array: Any, random: Random) -> None:
    with np.load(path) as archive:
        kept = {**archive, key: array}
    np.savez(path, **kept)


def _header(path: str, random: Random) -> None:
    """Another header of an array, or sizes in the archive that are not so."""
    key = random.choice(["x_train", "y_train", "x_test"])
    with np.load(path) as archive:
        kept = dict(archive)
    shape = random.choice((
        "(90, 100000, 100000)", "(1099511627776,)", "(90, -8, 8)", "(90, 8.0, 8)", "(90, 8, 9)",
        "(" * 3000, "()", "(90,) * 10**9", "(9" + "9" * 500 + ",)", "[90, 8, 8]", "None",
    ))  # fmt: skip
    kind = random.choice(
        ("'|u1'", "'<f8'", "'|O'", "'<U1000000'", "'u1' * 9", "object", "[('a', '<f4')]")
    )
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    version = random.choice(((1, 0), (2, 0), (3, 0), (9, 9)))
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    content = b"\x93NUMPY" + bytes(version) + length + header + bytes(6000)
    huge = random.random() < 0.4
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in kept.items():
            stream = io.BytesIO()
            np.save(stream, array)
            archive.writestr(f"{name}.npy", content if name == key else stream.getvalue())
        if huge:
            archive.getinfo(f"{key}.npy").file_size = 2**41


def _bomb(path: str, random: Random) -> None:
    """An array whose size is that in the archive, and is far beyond any memory."""
    shape, size = random.choice((((2**40, 8, 8), 2**46), ((90, 2**20, 2**20), 90 * 2**40)))
    key = random.choice(["x_train", "x_test"])
    with np.load(path) as archive:
        kept = dict(archive)
    kept["y" + key[1:]] = np.zeros(1, int)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in kept.items():
            stream = io.BytesIO()
            if name == key:
                np.lib.format.write_array_header_1_0(
                    stream, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
            elif name == "y" + key[1:]:
                np.lib.format.write_array_header_1_0(
                    stream, {"descr": "|u1", "fortran_order": False, "shape": shape[:1]}
                )
            else:
                np.save(stream, array)
            archive.writestr(f"{name}.npy", stream.getvalue())
        archive.getinfo(f"{key}.npy").file_size += size
        archive.getinfo(f"y{key[1:]}.npy").file_size += shape[0]


def _rezipped(path: str, random: Random) -> None:
    kept = damages.records(Path(path))
    kind = random.randrange(5)
    if kind == 0:
        kept[random.choice(list(kept))] = b"no array"
    elif kind == 1:
        kept["notes.txt"] = b"no array"
    elif kind == 2:
        name = random.choice(list(kept))
        kept[name] = kept[name][:-7]
    elif kind == 3:
        del kept[random.choice(list(kept))]
    damages.rezip(Path(path), kept)
    if kind == 4:
        damages.encrypt(Path(path), random)


def archives(count: int) -> Iterator[Case]:
    """Archives of NumPy."""
    arrays = [(key, array) for key, values in _ARRAYS.items() for array in values]
    for key, array in arrays[: count // 2]:
        what = f"{DATA}: {key} {array.dtype} {array.shape}"
        yield Case(what, functools.partial(_replaced, DATA, key, array), (*NEW, DATA))
    ways = (_header, _bomb, _rezipped, "bytes", _header, "encrypt", "bytes")
    for number, (way,) in enumerate(spread(count - count // 2, ways)):
        if way == "bytes":
            damage = damages.BYTES[number % len(damages.BYTES)]
        elif way == "encrypt":
            damage = damages.encrypt
        else:
            yield Case(f"{DATA}: {way.__name__}", functools.partial(way, DATA), (*NEW, DATA))
            continue
        yield Case(f"{DATA}: {damage.__name__}", file(DATA, damage), (*NEW, DATA))


def folders(count: int) -> Iterator[Case]:
    """Folders of images."""
    files = ("images/train/a/0.png", "images/test/a/0.png", "images/train/c/9.png")
    sides: list[tuple[str, ...]] = [(), (), ("--image-size", "6")]
    for damage, path, more in spread(count - 5, damages.IMAGE, files, sides):
        yield Case(f"{path}: {damage.__name__}", file(path, damage), (*NEW, "images", *more))
    for side in "1000000000", "100000":
        yield Case(f"images: {side} pixels wide", nothing, (*NEW, "images", "--image-size", side))
    for path, damage in (
        ("images/train/a", damages.missing), ("images/test", damages.pipe),
        ("images/train/c", damages.unreadable),
    ):  # fmt: skip
        yield Case(f"{path}: {damage.__name__}", file(path, damage), (*NEW, "images"))
