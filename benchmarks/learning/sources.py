"""The data of the learning benchmark: images, formulas, and text that every Python carries."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import data
from benchmarks.common.data import Split

CODES = 96  # printable ASCII, and one for all else
WINDOW = 64  # characters
MODULES = (
    "_pydecimal",
    "argparse",
    "doctest",
    "inspect",
    "mailbox",
    "pickletools",
    "tarfile",
    "typing",
)
Splits = dict[str, Split]
PARTS = ("train", "validation", "test")


def encode(text: str) -> Tensor:
    """The codes [len(text)] int64 of a text's characters, below `CODES`."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 32
    return torch.from_numpy(np.where((codes < 0) | (codes >= CODES - 1), CODES - 1, codes))


@lru_cache(maxsize=1)
def documentation(folder: Path) -> Splits:
    """Windows of Python's own documentation; the target is the next character.

    Its topics repeat one another: each paragraph is taken once. The first 80 % of the text are
    trained on, from any place; the rest is read in two halves.
    """
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    codes = encode("\n\n".join({" ".join(p.split()): p for p in paragraphs}.values()))
    parts, steps = _cut(codes, (0.8, 0.1, 0.1)), (1, WINDOW, WINDOW)
    windows = [part.unfold(0, WINDOW + 1, step) for part, step in zip(parts, steps)]
    return {name: Split(x[:, :-1], x[:, 1:]) for name, x in zip(PARTS, windows)}


@lru_cache(maxsize=1)
def modules(folder: Path) -> Splits:
    """Windows of the source of eight modules of the standard library, and which it is.

    Each file's first 70 % are trained on, and its windows overlap; the next 15 % validate.
    """
    counts, splits = (1250, 120, 120), {name: [] for name in PARTS}
    for label, module in enumerate(MODULES):
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        codes = encode(" ".join(source.split()))
        for name, part, count in zip(PARTS, _cut(codes, (0.7, 0.15, 0.15)), counts):
            starts = torch.linspace(0, len(part) - WINDOW, count).long()
            x = part.unfold(0, WINDOW, 1)[starts]
            splits[name].append(Split(x, torch.full((count,), label)))
    return {
        name: Split(torch.cat([s.x for s in parts]), torch.cat([s.y for s in parts]))
        for name, parts in splits.items()
    }


@lru_cache(maxsize=1)
def friedman1(folder: Path) -> Splits:
    """Y = 10 sin(πx₁x₂) + 20 (x₃ - ½)² + 10x₄ + 5x₅ + noise of ten inputs, of unit variance.

    Source: Friedman 1991, Multivariate adaptive regression splines.
    """
    random = np.random.default_rng(0)
    x = random.uniform(size=(6000, 10))
    y = 10 * np.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y += 10 * x[:, 3] + 5 * x[:, 4] + random.normal(size=6000)
    whole = Split(torch.from_numpy(x).float(), torch.from_numpy(y).float()[:, None])
    parts = _parts(whole, 2000, 2000)
    fit = parts["train"]
    return {name: Split(_like(part.x, fit.x), _like(part.y, fit.y)) for name, part in parts.items()}


@lru_cache(maxsize=1)
def digits(folder: Path) -> Splits:
    """The 1,797 digits of scikit-learn, 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(x).float()[order] / 16, torch.from_numpy(y).long()[order]
    return _parts(Split(x, y), 997, 400)


def images(name: str, counts: tuple[int, int, int], folder: Path) -> Splits:
    """So many training, validation and test images of `mnist` or `cifar10`, with their labels.

    They are normalised as `data.load` does it; where the sets that it reads are enough, they are
    its first ones.
    """
    usual = tuple(data.COUNTS.values())
    splits = data.load(name, folder, *map(max, counts, usual))
    return {k: Split(splits[k].x[:n], splits[k].y[:n]) for k, n in zip(PARTS, counts)}


def own_pixels(folder: Path) -> Splits:
    """MNIST's images in [0, 1], each its own target."""
    splits = {}
    for name, split in data.load("mnist", folder).items():
        low, high = split.x.amin(), split.x.amax()
        x = (split.x - low) / (high - low)
        splits[name] = Split(x, x.flatten(1))
    return splits


def batches(
    split: Split, size: int, seed: int, augment: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Minibatches without end: each epoch in an order of its own, in whole batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(split.y), generator=generator)
        for index in order[: len(order) // size * size].split(size):
            x = split.x[index]
            yield (flip_and_crop(x, generator) if augment else x), split.y[index]


def flip_and_crop(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image [C, H, W] mirrored at random, and moved by up to `padding` pixels."""
    count, _, height, width = x.shape
    flip, down, right = (
        torch.randint(high, (count,), generator=generator)
        for high in (2, 2 * padding + 1, 2 * padding + 1)
    )
    padded = torch.nn.functional.pad(x, [padding] * 4)
    rows = down[:, None] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(flip[:, None] == 1, columns.flip(1), columns) + right[:, None]
    image = torch.arange(count)[:, None, None]
    chosen = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    return chosen.permute(0, 3, 1, 2).contiguous()


def _cut(codes: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """Parts of a text one after another."""
    sizes = [int(share * len(codes)) for share in shares[:-1]]
    return list(codes.split([*sizes, len(codes) - sum(sizes)]))


def _parts(whole: Split, train: int, validation: int) -> Splits:
    sizes = [train, validation, len(whole.y) - train - validation]
    return {
        name: Split(x, y) for name, x, y in zip(PARTS, whole.x.split(sizes), whole.y.split(sizes))
    }


def _like(x: Tensor, reference: Tensor) -> Tensor:
    """`x` scaled by the mean and the standard deviation of each column of `reference`."""
    return (x - reference.mean(0)) / reference.std(0)
