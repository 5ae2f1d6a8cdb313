"""What is damaged, how, and the command that then reads it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import damages
from case import Case, file, nothing, spread
from data_cases import archives, folders
from library_cases import pruned_files, states
from workspace import DATA, NEW, TRAIN

PRUNE = ("prune", "--run", "run", "--ratio", "0.3", "--measure-batch", "1")
RESUME = ("train", "--resume", "--out")


def cases(count: int) -> Iterator[Case]:
    """About ``count`` cases, every kind of them in its share."""
    kinds: list[tuple[float, Callable[[int], Iterator[Case]]]] = [
        (0.19, checkpoints), (0.17, documents), (0.07, other_kinds), (0.19, archives),
        (0.07, folders), (0.09, options), (0.1, pruned_files), (0.08, states), (0.02, factories),
        (0.02, full_disks),
    ]  # fmt: skip
    for share, kind in kinds:
        yield from kind(max(2, round(share * count)))


def checkpoints(count: int) -> Iterator[Case]:
    """Of trainings that were stopped, with and without rounds of pruning, and of finished ones."""
    reads = [
        ("part/checkpoints/rls.pt", (*RESUME, "part")),
        ("rounds/checkpoints/rls.pt", (*RESUME, "rounds")),
        ("part/checkpoints/sgd.pt", (*RESUME, "part")),
        ("run/checkpoints/rls.pt", (*PRUNE, "--out", "new")),
        ("run/checkpoints/sgd.pt", (*PRUNE, "--optimizer", "sgd", "--out", "new")),
    ]
    for damage, (path, argv) in spread(count, damages.CHECKPOINT * 2 + damages.BYTES, reads):
        yield Case(f"{path}: {damage.__name__}", file(path, damage), argv)


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
    for damage, (path, argv) in spread(count, ways, reads):
        if damage is damages.json_option and "config" not in path:
            damage = damages.json_value
        yield Case(f"{path}: {damage.__name__}", file(path, damage), argv)


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
    for damage, (path, argv) in spread(count, damages.KINDS, reads):
        if Path(path).suffix == "" and damage is damages.folder:
            damage = damages.pipe
        if path == "rounds/pruning":
            yield Case(f"{path}: {damage.__name__}", functools.partial(_put, path, damage), argv)
        else:
            yield Case(f"{path}: {damage.__name__}", file(path, damage), argv)


def _put(path: str, damage: damages.Damage, random: Random) -> None:
    if damage not in (damages.unreadable, damages.missing):
        damage(Path(path), random)


# The command line

_VALUES = ("", "-1", "0", "nan", "inf", "1e999", "9" * 30, "9" * 5000, "x", "1=1", ",",
           "rls=1,rls=2", "$x_{$[red]", "\x1b[31m", "../..", "n" * 300, "/dev/null/x",
           "cuda:99999999999999999999", "0.5", "1000000000", "1" * 18)  # fmt: skip
_TRAINING = ("model", "data", "optimizer", "epochs", "batch-size", "seed", "out", "lr",
             "weight-decay", "schedule", "form", "val-fraction", "image-size", "device", "threads",
             "checkpoint-every", "cache", "prune-schedule")  # fmt: skip
_PRUNING = ("optimizer", "ratio", "target-flops", "target-params", "max-loss", "importance",
            "selection", "scope", "source", "round-to", "calibration-images", "recover",
            "recover-lr", "export", "measure-batch", "out", "device", "threads")  # fmt: skip
_SCHEDULES = ("cubic", "cubic:0.5:" + "9" * 5000, "cubic:0.5:999999999", "cubic:nan:1",
              "linear:1:1", "linear:0.5:1,budget=" + "9" * 18, "one_shot:0.5:2,warmup=99",
              "cubic:0.5:1,x=1", "cubic:0.5:1,tolerance=" + "9" * 400 + "%")  # fmt: skip


def options(count: int) -> Iterator[Case]:
    """Options out of their range."""

    for schedule in _SCHEDULES[: max(1, count // 10)]:
        argv = (*TRAIN, "--out", "new", "--epochs", "1", "--prune-schedule", schedule)
        yield Case(f"--prune-schedule {schedule[:40]}", nothing, argv)
    for value, flag in spread(count - len(_SCHEDULES), _VALUES, (*_TRAINING, *_PRUNING)):
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

    commands = (
        (*TRAIN, "--out", "new"),
        (*RESUME, "part"),
        (*PRUNE, "--out", "new"),
        (*PRUNE, "--out", "pruned", "--overwrite"),
        (*TRAIN, "--overwrite", "--out", "run"),
    )
    for number, argv in enumerate(commands * count):
        if number >= count:
            return
        size = (0, 100, 1000, 5000, 50_000, 400_000)[number % 6]
        yield Case(f"{' '.join(argv[:2])}: full after {size}", nothing, argv, size=size)
