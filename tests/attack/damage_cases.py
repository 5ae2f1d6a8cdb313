"""What is damaged, how, and the command that then reads it."""

from __future__ import annotations

import functools
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import damages
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from workspace import DATA, TRAIN

from rlscuda import RLSOptimizer
from rlscuda.pruning.saving import load_optimizer, load_pruned

Action = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One damage and what reads it.

    Attributes:
        name: where and what.
        apply: damages the workspace, which is the current folder.
        argv: the command; None where ``call`` reads instead.
        call: a function of the library.
        size: bytes that a file may have: a disk that is full beyond them.
    """

    name: str
    apply: Callable[[Random], object]
    argv: tuple[str, ...] | None = None
    call: Action | None = None
    size: int | None = None

    @property
    def late(self) -> bool:
        """Whether it is what test images hold, which are read at the end of a training."""
        return "new" in (self.argv or ()) and "test" in self.name


PRUNE = ("prune", "--run", "run", "--ratio", "0.3", "--measure-batch", "1")
RESUME = ("train", "--resume", "--out")
NEW = ("train", "--model", "mlp", "--epochs", "1", "--optimizer", "sgd", "--batch-size", "5",
       "--out", "new", "--data")  # fmt: skip


def cases(count: int) -> Iterator[Case]:
    """About ``count`` cases, every kind of them in its share."""
    kinds: list[tuple[float, Callable[[int], Iterator[Case]]]] = [
        (0.19, checkpoints), (0.17, documents), (0.07, other_kinds), (0.19, archives),
        (0.07, folders), (0.09, options), (0.1, pruned_files), (0.08, states), (0.02, factories),
        (0.02, full_disks),
    ]  # fmt: skip
    for share, kind in kinds:
        yield from kind(max(2, round(share * count)))


def _file(path: str, damage: damages.Damage) -> Callable[[Random], object]:
    return lambda random: damage(Path(path), random)


def _spread(count: int, *lists: Any) -> Iterator[tuple[Any, ...]]:
    """``count`` combinations of one thing from each list, all of them in turn."""
    for number in range(count):
        chosen = []
        for things in lists:
            number, place = divmod(number, len(things))
            chosen.append(things[place])
        yield tuple(chosen)


def checkpoints(count: int) -> Iterator[Case]:
    """Of trainings that were stopped, with and without rounds of pruning, and of finished ones."""
    reads = [
        ("part/checkpoints/rls.pt", (*RESUME, "part")),
        ("rounds/checkpoints/rls.pt", (*RESUME, "rounds")),
        ("part/checkpoints/sgd.pt", (*RESUME, "part")),
        ("run/checkpoints/rls.pt", (*PRUNE, "--out", "new")),
        ("run/checkpoints/sgd.pt", (*PRUNE, "--optimizer", "sgd", "--out", "new")),
    ]
    for damage, (path, argv) in _spread(count, damages.CHECKPOINT * 2 + damages.BYTES, reads):
        yield Case(f"{path}: {damage.__name__}", _file(path, damage), argv)


def documents(count: int) -> Iterator[Case]:
    reads = [
        ("part/config.json", (*RESUME, "part")),
        ("run/summary.json", (*RESUME, "run")),
        ("run/metrics.json", (*RESUME, "run")),
        ("run/config.json", (*PRUNE, "--out", "new")),
        ("rounds/config.json", (*RESUME, "rounds")),
        ("run/summary.json", (*PRUNE, "--out", "new")),
        ("pruned/report.json", (*PRUNE, "--out", "pruned", "--overwrite")),
        ("run/config.json", (*TRAIN, "--overwrite", "--out", "run")),
    ]
    ways = (*damages.JSON, damages.json_option, damages.truncate, damages.flip, damages.noise,
            damages.text, damages.stretch, damages.append)  # fmt: skip
    for damage, (path, argv) in _spread(count, ways, reads):
        if damage is damages.json_option and "config" not in path:
            damage = damages.json_value
        yield Case(f"{path}: {damage.__name__}", _file(path, damage), argv)


def other_kinds(count: int) -> Iterator[Case]:
    """A folder, a pipe, a device, ... where a file is expected."""
    reads = [
        (DATA, (*TRAIN, "--out", "new")),
        ("part/config.json", (*RESUME, "part")),
        ("part/checkpoints/rls.pt", (*RESUME, "part")),
        ("run/summary.json", (*PRUNE, "--out", "new")),
        ("run/metrics.json", (*RESUME, "run")),
        ("images/train/b/0.png", (*NEW, "images")),
        ("pruned/pruned.safetensors", (*PRUNE, "--out", "pruned", "--overwrite")),
        ("pruned/report.json", (*PRUNE, "--out", "pruned", "--overwrite")),
        ("images/test/b/0.png", (*NEW, "images")),
        ("part/metrics.csv", (*RESUME, "part")),
        ("part/checkpoints", (*RESUME, "part")),
        ("run/curves.png", (*TRAIN, "--overwrite", "--out", "run")),
        ("rounds/pruning", (*RESUME, "rounds")),
        ("run/config.json", (*TRAIN, "--out", "run")),
    ]
    for damage, (path, argv) in _spread(count, damages.KINDS, reads):
        if Path(path).suffix == "" and damage is damages.folder:
            damage = damages.pipe
        if path == "rounds/pruning":
            yield Case(f"{path}: {damage.__name__}", functools.partial(_put, path, damage), argv)
        else:
            yield Case(f"{path}: {damage.__name__}", _file(path, damage), argv)


def _put(path: str, damage: damages.Damage, random: Random) -> None:
    if damage not in (damages.unreadable, damages.missing):
        damage(Path(path), random)


# Data sets

_LABELS = np.arange(90) % 3
_ARRAYS: dict[str, list[Any]] = {
    "x_train": [
        np.zeros(()), np.zeros(90), np.zeros((90, 0, 8)), np.zeros((0, 8, 8)), np.zeros((90, 8, 8), "c8"),
        np.full((90, 8, 8), None), np.zeros((90, 8, 8), "U3"), np.zeros((90, 8, 8), bool),
        np.full((90, 8, 8), math.nan), np.full((90, 8, 8), -math.inf), np.full((90, 8, 8), 1e300),
        np.full((90, 8, 8), 1e38, "f4"), np.zeros((89, 8, 8)), np.zeros((1, 8, 8)), np.zeros((2, 8, 8)),
        np.zeros((90, 1, 1, 1, 1)), np.zeros((90, 7, 8, 8)), np.zeros((90, 8, 8), ">f4"),
        np.zeros((90, 8, 8), "f2"), np.zeros((90, 8, 8), np.longdouble), np.zeros((90, 8, 8), "M8[s]"),
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
_JPEG: dict[str, list[Any]] = {
    "train_ends": [
        np.array(5), np.zeros(0, int), np.arange(90)[::-1], np.full(90, -1), np.full(90, 2**62),
        np.arange(1.0, 91), np.arange(1, 91, dtype="u8"), np.arange(1, 91), np.array([None] * 90),
        np.full((90, 1), 3), np.arange(1, 90), np.full(90, 2**63, "u8"),
    ],
    "train_jpeg": [np.zeros(0, "u1"), np.zeros((5, 5), "u1"), np.zeros(9), np.array("a"),
                   np.full(3, None), np.zeros(10_000, "u1"), np.zeros(100, "i8")],
    "train_labels": [_LABELS * 10**9, np.zeros(0, int), np.array(1), _LABELS[:5], _LABELS - 5],
    "test_ends": [np.array(5), np.full(30, 2**62), np.arange(3.0)],
    "test_labels": [np.full(30, 77), np.full(29, 1)],
    "classes": [np.array(["a", "b"]), np.array([None] * 3, object)],
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
    arrays = [(DATA, key, array) for key, values in _ARRAYS.items() for array in values]
    arrays += [("jpeg.npz", key, array) for key, values in _JPEG.items() for array in values]
    for path, key, array in arrays[: count // 2]:
        what = f"{path}: {key} {array.dtype} {array.shape}"
        yield Case(what, functools.partial(_replaced, path, key, array), (*NEW, path))
    ways = (_header, _bomb, _rezipped, "bytes", _header, "encrypt", "bytes")
    paths = (DATA, DATA, "jpeg.npz")
    for number, (way, path) in enumerate(_spread(count - count // 2, ways, paths)):
        if way == "bytes" or (path != DATA and way in (_header, _bomb)):
            damage = damages.BYTES[number % len(damages.BYTES)]
        elif way == "encrypt":
            damage = damages.encrypt
        else:
            yield Case(f"{path}: {way.__name__}", functools.partial(way, path), (*NEW, path))
            continue
        yield Case(f"{path}: {damage.__name__}", _file(path, damage), (*NEW, path))


def _large(random: Random) -> None:
    """Images that are whole, but too many pixels all together."""
    for path in Path("images").rglob("*.png"):
        Image.new("1", (9000, 9000)).save(path)


def folders(count: int) -> Iterator[Case]:
    """Folders of images."""
    files = ("images/train/a/0.png", "images/test/a/0.png", "images/train/c/9.png")
    sides: list[tuple[str, ...]] = [(), (), ("--image-size", "6")]
    for damage, path, more in _spread(count - 6, damages.IMAGE, files, sides):
        yield Case(f"{path}: {damage.__name__}", _file(path, damage), (*NEW, "images", *more))
    for more in ("--image-size", "1000000000"), ("--image-size", "100000"), ():
        yield Case(f"images: large {more}", _large, (*NEW, "images", *more))
    for path, damage in (
        ("images/train/a", damages.missing), ("images/test", damages.pipe),
        ("images/train/c", damages.unreadable),
    ):  # fmt: skip
        yield Case(f"{path}: {damage.__name__}", _file(path, damage), (*NEW, "images"))


# The command line

_VALUES = ("", "-1", "0", "nan", "inf", "1e999", "9" * 30, "9" * 5000, "x", "1=1", ",", "rls=1,rls=2",
           "$x_{$[red]", "\x1b[31m", "../..", "n" * 300, "/dev/null/x", "cuda:99999999999999999999",
           "0.5", "1000000000", "1" * 18)  # fmt: skip
_TRAINING = ("model", "data", "optimizer", "epochs", "batch-size", "seed", "out", "lr", "weight-decay",
             "schedule", "form", "val-fraction", "image-size", "device", "threads",
             "checkpoint-every", "cache", "prune-schedule")  # fmt: skip
_PRUNING = ("optimizer", "ratio", "target-flops", "target-params", "max-loss", "importance",
            "selection", "scope", "source", "round-to", "calibration-images", "recover", "recover-lr",
            "export", "measure-batch", "out", "device", "threads")  # fmt: skip
_SCHEDULES = ("cubic", "cubic:0.5:" + "9" * 5000, "cubic:0.5:999999999", "cubic:nan:1", "linear:1:1",
              "linear:0.5:1,budget=" + "9" * 18, "one_shot:0.5:2,warmup=99", "cubic:0.5:1,x=1",
              "cubic:0.5:1,tolerance=" + "9" * 400 + "%")  # fmt: skip


def options(count: int) -> Iterator[Case]:
    """Options out of their range."""

    def nothing(random: Random) -> None: ...

    for schedule in _SCHEDULES[: max(1, count // 10)]:
        argv = (*TRAIN, "--out", "new", "--epochs", "1", "--prune-schedule", schedule)
        yield Case(f"--prune-schedule {schedule[:40]}", nothing, argv)
    for value, flag in _spread(count - len(_SCHEDULES), _VALUES, (*_TRAINING, *_PRUNING)):
        flags = _PRUNING if flag in _PRUNING else _TRAINING
        argv = (*PRUNE, "--out", "new") if flags is _PRUNING else (*TRAIN, "--out", "new")
        if flag in ("target-flops", "target-params", "max-loss"):
            argv = tuple(word for word in argv if word not in ("--ratio", "0.3"))
        if (flag, value) == ("epochs", "1000000000"):
            continue  # valid, and as long as it says
        yield Case(f"{argv[0]} --{flag} {value[:40]!r}", nothing, (*argv, f"--{flag}={value}"))


def factories(count: int) -> Iterator[Case]:
    """Modules of the user that fail."""
    bodies = [
        "1/0", "def net(: pass", "raise RecursionError", "import nothing_of_that_name", "net = 5",
        "def net(**k): raise KeyError('a')", "def net(**k): return net(**k)",
        "def net(**k): return None", "def net(a): return a", "def net(): 1/0", "x = 1",
        "import torch\ndef net(): return torch.nn.Linear(3, 3)",
        "import torch\ndef net(): return torch.nn.Linear(2**40, 2**40)",
        "import torch\nclass N(torch.nn.Module):\n def forward(self, x): raise OverflowError\n"
        "def net(): return N()",
        "import torch\nclass N(torch.nn.Module):\n def forward(self, x): return x.nothing\n"
        "def net(): return N()",
        "raise MemoryError", "\x00", "def net(x=[]*10**9): pass", "net = lambda **k: k",
        "import torch\nnet = torch.nn.Identity",
    ]  # fmt: skip
    for number, body in enumerate(bodies[:count]):
        module = f"factory{number}"

        def put(random: Random, module: str = module, body: str = body) -> None:
            Path(f"{module}.py").write_text(body)

        argv = (*TRAIN, "--out", "new", "--model", f"{module}:net")
        yield Case(f"factory: {body[:40]!r}", put, argv)


def full_disks(count: int) -> Iterator[Case]:
    """Disks that are full after so many bytes."""

    def nothing(random: Random) -> None: ...

    commands = ((*TRAIN, "--out", "new"), (*RESUME, "part"), (*PRUNE, "--out", "new"),
                (*PRUNE, "--out", "pruned", "--overwrite"), (*TRAIN, "--overwrite", "--out", "run"))  # fmt: skip
    for number, argv in enumerate(commands * count):
        if number >= count:
            return
        size = (0, 100, 1000, 5000, 50_000, 400_000)[number % 6]
        yield Case(f"{' '.join(argv[:2])}: full after {size}", nothing, argv, size=size)


# The library


def _metadata(change: Callable[[dict[str, Any], Random], dict[str, Any]]) -> damages.Damage:
    """Another manifest, with the checksums that go with it left out."""

    def damage(path: Path, random: Random) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        metadata.pop("sha256", None)
        manifest = json.loads(metadata["manifest"])
        manifest.pop("sha256", None)
        save_file(tensors, path, {**metadata, **change(manifest, random)})

    damage.__name__ = change.__name__
    return damage


def manifest_value(manifest: dict[str, Any], random: Random) -> dict[str, Any]:
    return {"manifest": json.dumps(damages.mutated(manifest, random, damages.HOSTILE[:24]))}


def attribute(manifest: dict[str, Any], random: Random) -> dict[str, Any]:
    under = ("modules", random.choice(["fc1", "fc2", ""]), "attributes")
    under = under if manifest["modules"][under[1]]["attributes"] else ("modules",)
    return {"manifest": json.dumps(damages.mutated(manifest, random, damages.HOSTILE[:24], under))}


def manifest_text(manifest: dict[str, Any], random: Random) -> dict[str, Any]:
    return {"manifest": random.choice((
        "[" * damages.DEEP, '{"a":' * damages.DEEP, "", "null", "5", "[]", "{}", "NaN", '"x"', "{",
        json.dumps({**manifest, "modules": None}), json.dumps({**manifest, "ties": {"a": "b"}}),
    ))}  # fmt: skip


def other_version(manifest: dict[str, Any], random: Random) -> dict[str, Any]:
    return {random.choice(["version", "format"]): random.choice(["", "2", "x" * 1000])}


def optimizer_bytes(path: Path, random: Random) -> None:
    """Other bytes of the optimizer's state."""
    with safe_open(path, "pt") as file:
        metadata = {"manifest": file.metadata()["manifest"], "format": "rlscuda-pruned"}
    manifest = json.loads(metadata["manifest"])
    manifest.pop("sha256", None)
    metadata |= {"manifest": json.dumps(manifest), "version": "1"}
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    state = tensors[".optimizer"]
    tensors[".optimizer"] = random.choice((
        state[: len(state) // 2], state[:0], state.float(), state.flip(0), state.bfloat16(),
        torch.randint(0, 256, (500,), dtype=torch.uint8), torch.zeros(3, 3, dtype=torch.uint8),
    )).clone()  # fmt: skip
    save_file(tensors, path, metadata)


def _whole() -> torch.nn.Module:
    from rlscuda.cli.models import ImageShape, mlp

    return mlp(ImageShape(1, 8, 8), 3)


def _load_pruned() -> None:
    path = "pruned/pruned.safetensors"
    try:
        model = load_pruned(_whole, path)
        load_optimizer(RLSOptimizer(model), path)
    except (ValueError, FileNotFoundError, PermissionError):  # as documented
        pass


def pruned_files(count: int) -> Iterator[Case]:
    """Files of ``save_pruned``."""
    path = "pruned/pruned.safetensors"
    ways = (*map(_metadata, (manifest_value, attribute, manifest_text, manifest_value, other_version)),
            optimizer_bytes, damages.truncate, damages.flip, damages.noise, damages.append,
            damages.text, damages.erase, damages.folder, damages.pipe, damages.itself)  # fmt: skip
    for (damage,) in _spread(count, ways * count):
        yield Case(f"{path}: {damage.__name__}", _file(path, damage), call=_load_pruned)


def _load_state(form: str, seed: int) -> None:
    """A state that was changed is refused with a ValueError, or trains on."""
    random = Random(seed)
    torch.manual_seed(0)

    def make() -> tuple[torch.nn.Module, RLSOptimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
        return model, RLSOptimizer(model, form=form)

    def train(model: torch.nn.Module, optimizer: RLSOptimizer) -> None:
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    train(model, optimizer)
    under = random.choice([(), ("state",), ("param_groups", 0), ("state", 0), ("state", 2)])
    state = damages.mutated(
        optimizer.state_dict(), random, damages.HOSTILE + damages.tensors(), under
    )
    twin, other = make()
    train(twin, other)
    before = [p.detach().clone() for p in twin.parameters()]
    kept = str(other.state_dict())
    try:
        other.load_state_dict(state)
    except ValueError:
        assert str(other.state_dict()) == kept
        assert all(map(torch.equal, before, twin.parameters()))
        return
    train(twin, other)


def states(count: int) -> Iterator[Case]:
    """States of the optimizer."""

    def nothing(random: Random) -> None: ...

    for seed in range(count):
        form = ("adaptive", "paper", "natural")[seed % 3]
        yield Case(f"state of {form} {seed}", nothing,
                   call=functools.partial(_load_state, form, seed))  # fmt: skip
