"""Ways to damage what the program reads; each is the same for the same seed."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

Damage = Callable[[Path, Random], object]
DEEP = 100_000

HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**9, 10**18, 10**400, 0.5, -0.0,
    1e308, math.inf, -math.inf, math.nan, "", "x", "\x00", "\ud800", "$x_{$[red]\x1b[31m",
    "9" * 5000, "n" * 10_000, [], {}, [[[[]]]], {"a": {"b": {}}}, [0] * 1000,
    {"": ""}, [None], ["x"],
]  # fmt: skip


def tensors() -> list[Any]:
    """What may stand in a checkpoint besides plain values."""
    return [
        torch.zeros(()), torch.zeros(3), torch.zeros(0), torch.full((2, 3), math.nan),
        torch.zeros(1).expand(10**6, 10**6), torch.ones(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.complex64), torch.ones(2, dtype=torch.bool),
        torch.eye(3).to_sparse(), torch.empty(2, device="meta"), (), (1, 2), torch.float16,
        torch.Size([3]), {1: 2}, {torch.float32: 1}, b"bytes",
    ]  # fmt: skip


# The bytes of a file


def truncate(path: Path, random: Random) -> None:
    with open(path, "rb+") as file:
        file.truncate(random.randrange(path.stat().st_size))


def flip(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 1, 8, 64))):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    write(path, bytes(content))


def erase(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    start = random.randrange(len(content))
    end = min(len(content), start + random.randrange(1, 5000))
    content[start:end] = bytes(end - start)
    write(path, bytes(content))


def noise(path: Path, random: Random) -> None:
    write(path, random.randbytes(random.choice((1, 10, 1000, 50_000))))


def text(path: Path, random: Random) -> None:
    write(
        path,
        random.choice((b"", b"no such thing\n", b"\xff\xfe{\x00}\x00", b"PK\x03\x04", b"\x93")),
    )


def append(path: Path, random: Random) -> None:
    write(path, path.read_bytes() + random.randbytes(random.choice((1, 100, 70_000))))


def repeat(path: Path, random: Random) -> None:
    write(path, path.read_bytes() * 2)


def stretch(path: Path, random: Random) -> None:
    """A terabyte on paper, nothing on the disk."""
    with open(path, "rb+") as file:
        file.truncate(2 ** random.choice((34, 40)))


BYTES = (truncate, truncate, flip, flip, erase, noise, text, append, repeat, stretch)


def write(path: Path, content: bytes) -> None:
    """A new file of that name, whatever has it now."""
    remove(path)
    path.write_bytes(content)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(path.name + ".aside"))
    else:
        path.unlink(missing_ok=True)


# Something else of the name of a file


def folder(path: Path, random: Random) -> None:
    remove(path)
    path.mkdir()


def pipe(path: Path, random: Random) -> None:
    remove(path)
    os.mkfifo(path)


def unix_socket(path: Path, random: Random) -> None:
    remove(path)
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link_to(target: str) -> Damage:
    def link(path: Path, random: Random) -> None:
        remove(path)
        path.symlink_to(target)

    link.__name__ = f"link to {target}"
    return link


def itself(path: Path, random: Random) -> None:
    remove(path)
    path.symlink_to(path.name)


def unreadable(path: Path, random: Random) -> None:
    path.chmod(0)


def missing(path: Path, random: Random) -> None:
    remove(path)


KINDS = (
    folder, pipe, unix_socket, itself, unreadable, missing, link_to("/dev/zero"),
    link_to("/dev/full"), link_to("/nothing/there"), link_to("/proc/self/mem"),
)  # fmt: skip


# Plain documents


def places(document: Any, place: tuple = ()) -> Iterator[tuple]:
    """Where in a document something stands: the keys that lead there."""
    if place:
        yield place
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*place, key))
    elif isinstance(document, (list, tuple)):
        for number, value in list(enumerate(document))[:50]:
            yield from places(value, (*place, number))


def changed(document: Any, place: tuple, change: Callable[[Any, Any], Any]) -> Any:
    """The document with the container of one place replaced by ``change(container, key)``."""
    if len(place) == 1:
        return change(document, place[0])
    inner = changed(document[place[0]], place[1:], change)
    return _with(document, place[0], inner)


def _with(container: Any, key: Any, value: Any) -> Any:
    if isinstance(container, tuple):
        return (*container[:key], value, *container[key + 1 :])
    result = copy.copy(container)
    result[key] = value
    return result


def mutated(document: Any, random: Random, values: list[Any], under: tuple = ()) -> Any:
    """A document with one thing in it replaced, gone, or one too many."""
    found = [place for place in places(document) if place[: len(under)] == under]
    depth = random.choice(sorted({len(place) for place in found}))  # few are shallow: as often
    place = random.choice([place for place in found if len(place) == depth])

    def change(container: Any, key: Any) -> Any:
        kind = random.random()
        if kind < 0.15 and not isinstance(container, tuple):
            result = copy.copy(container)
            del result[key]
            return result
        if kind < 0.2 and isinstance(container, dict):
            return {**container, random.choice(["extra", 5, ""]): random.choice(values)}
        return _with(container, key, random.choice(values))

    return changed(document, place, change)


def json_value(path: Path, random: Random) -> None:
    document = mutated(json.loads(path.read_text()), random, HOSTILE)
    write(path, json.dumps(document).encode("utf-8", "surrogatepass"))


def json_option(path: Path, random: Random) -> None:
    """One option of a run, out of its range or type."""
    document = json.loads(path.read_text())
    key = random.choice(list(document["options"]))
    document["options"][key] = random.choice(HOSTILE)
    write(path, json.dumps(document).encode("utf-8", "surrogatepass"))


def json_text(path: Path, random: Random) -> None:
    whole = path.read_text()
    write(path, random.choice((
        "[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, whole[:-3], whole.replace(":", ","),
        whole.encode("utf-16").decode("latin-1"), "\ufeff" + whole, "9" * 100_000, "NaN", "null",
        '"\\ud800"', "-" * 10, whole.replace("1", "1e999"), whole.replace("0", "NaN"),
    )).encode("utf-8", "replace"))  # fmt: skip


JSON = (json_value, json_value, json_value, json_value, json_text)


# Archives of torch.save


def archive(change: Callable[[Any, Random], Any]) -> Damage:
    def damage(path: Path, random: Random) -> None:
        document = torch.load(path, weights_only=True)
        document = change(document, random)
        remove(path)
        torch.save(document, path)

    damage.__name__ = change.__name__
    return damage


def any_value(document: Any, random: Random) -> Any:
    return mutated(document, random, HOSTILE + tensors())


def position(document: Any, random: Random) -> Any:
    """What says where the training was."""
    part = random.choice(["epoch", "step", "order", "history", "scheduler", "rng", "shuffler",
                          "loss_sum", "epoch_seconds", "pruning"])  # fmt: skip
    return mutated(document, random, HOSTILE + tensors(), ("training", part))


def optimizer(document: Any, random: Random) -> Any:
    return mutated(document, random, HOSTILE + tensors(), ("training", "optimizer"))


def group(document: Any, random: Random) -> Any:
    return mutated(document, random, HOSTILE, ("training", "optimizer", "param_groups", 0))


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def pickled(path: Path, random: Random) -> None:
    """Another pickle in the archive: nested deeply, with code, or none."""
    kept = records(path)
    name = next(name for name in kept if name.endswith("data.pkl"))
    kept[name] = random.choice((
        b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        b"\x80\x02" + b"}" * DEEP + b".",
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exitq\x00\x85R.",
        pickle.dumps(Path("x"), 2), b"\x80\x02(" * 100, b"", b".", b"\x80\x02J\xff\xff\xff\x7f.",
        kept[name][: len(kept[name]) // 2], b"\x80\x02\x8b\xff\xff\xff\x7f",
    ))  # fmt: skip
    rezip(path, kept)


def rezipped(path: Path, random: Random) -> None:
    """The same records, kept in another way, or one of them in another size."""
    kept = records(path)
    kind = random.randrange(5)
    if kind == 0:
        rezip(path, kept, zipfile.ZIP_DEFLATED)
    elif kind == 1:
        name = random.choice([name for name in kept if "/data/" in name] or list(kept))
        kept[name] = kept[name][: len(kept[name]) // 2]
        rezip(path, kept)
    elif kind == 2:
        del kept[random.choice(list(kept))]
        rezip(path, kept)
    elif kind == 3:
        rezip(path, {**kept, "archive/bomb": bytes(2**27)}, zipfile.ZIP_DEFLATED)
    else:
        rezip(path, kept)
        encrypt(path, random)


def rezip(path: Path, kept: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    remove(path)
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, content in kept.items():
            zipped.writestr(name, content)


def encrypt(path: Path, random: Random) -> None:
    """Marks every record of a zip archive as encrypted."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(mark)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(mark, start + 4)
    write(path, bytes(content))


CHECKPOINT = tuple(map(archive, (any_value, position, position, position, optimizer, group))) + (
    pickled, rezipped,
)  # fmt: skip


# Images


def png(width: int, height: int, pixels: bytes = b"", kind: int = 0, depth: int = 8) -> bytes:
    """A PNG file that says it has a size, and has the pixels that are given."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))  # fmt: skip


def image(path: Path, random: Random) -> None:
    """An image that is none, or another than the rest."""
    stretched = io.BytesIO()
    with zipfile.ZipFile(stretched, "w") as zipped:
        zipped.writestr("a", b"b")
    write(path, random.choice((
        png(60_000, 60_000), png(20_000, 20_000, bytes(1000)), png(9_000, 9_000), png(8, 8),
        png(8, 8, bytes(72), kind=2), png(8, 8, bytes(72), depth=3), png(0, 8),
        png(9, 8, bytes(80)), png(8, 8, bytes(136), depth=16), png(2**31 - 1, 2**31 - 1),
        stretched.getvalue(),
        b"\xff\xd8\xff\xe0" + bytes(30), b"GIF89a\xff\xff\xff\xff" + bytes(20), b"BM" + bytes(60),
        b"II*\x00\x08\x00\x00\x00\xff\xff", b"RIFF\x00\x00\x00\x00WEBPVP8 ", b"P5 99999999 9 255\n",
        b"P6\n8 8\n255\n", b"P5 8 8 65535\n" + bytes(128),
    )))  # fmt: skip


IMAGE = (truncate, flip, flip, erase, noise, text, image, image, image)
