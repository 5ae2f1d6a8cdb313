"""Networks of kinds that are written by hand: detectors, U-Nets, recurrent readers, generators."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, Tensor]


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Split(nn.Module):
    """A cross-stage block that splits its channels and puts all parts side by side."""

    def __init__(self, width: int, blocks: int = 2):
        super().__init__()
        self.first, self.last = _conv(width, width, 1), _conv(width * (2 + blocks) // 2, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv(width // 2, width // 2), _conv(width // 2, width // 2))
            for _ in range(blocks)
        )

    def forward(self, x):
        """Of [N, C, H, W]."""
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    """In the manner of YOLO: cross-stage blocks, a pyramid of pools, a neck, a head a scale."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = _conv(3, 16, 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(c, 2 * c, 3, 2), Split(2 * c)) for c in (16, 32, 64)
        )
        self.before, self.after = _conv(128, 64, 1), _conv(256, 128, 1)
        self.lateral, self.neck = _conv(192, 64, 1), Split(64)
        self.heads = nn.ModuleList(
            nn.Sequential(_conv(c, 32), nn.Conv2d(32, 5 + classes, 1)) for c in (64, 128)
        )

    def forward(self, x):
        """Boxes and classes of every place, [N, places, 5 + classes]."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        pools = [self.before(maps[-1])]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        deep = self.after(torch.cat(pools, 1))
        wide = F.interpolate(deep, scale_factor=2.0)
        fine = self.neck(self.lateral(torch.cat([wide, maps[-2]], 1)))
        found = [head(m).flatten(2) for head, m in zip(self.heads, (fine, deep))]
        return torch.cat(found, 2).transpose(1, 2)


class Reader(nn.Module):
    """A CRNN: convolutions, then a recurrent net along the line of text."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.convolutions = nn.Sequential(
            _conv(1, 32), nn.MaxPool2d(2), _conv(32, 64), nn.MaxPool2d(2), _conv(64, 128),
            nn.MaxPool2d((2, 1)), _conv(128, 128), nn.MaxPool2d((2, 1)),
        )  # fmt: skip
        self.recurrent = kind(256, 64, bidirectional=True, batch_first=True)
        self.head = nn.Linear(128, 37)

    def forward(self, x):
        """Scores of characters, [N, W / 4, 37]."""
        x = self.convolutions(x)
        x = x.flatten(1, 2).transpose(1, 2)
        return self.head(self.recurrent(x)[0])


class UNet(nn.Module):
    """Down and up again, with what lies on the way put beside; `up` makes what widens."""

    def __init__(self, up: Callable[[int, int], nn.Module]):
        super().__init__()
        self.down = nn.ModuleList(_conv(a, b) for a, b in ((3, 16), (16, 32), (32, 64)))
        self.up = nn.ModuleList(up(2 * c, c) for c in (32, 16))
        self.join = nn.ModuleList(_conv(2 * c, c) for c in (32, 16))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        """A map of each class."""
        kept = []
        for place, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if place else x)
            kept.append(x)
        for up, join, beside in zip(self.up, self.join, reversed(kept[:-1])):
            x = join(torch.cat([up(x), beside], 1))
        return self.head(x)


class Reparametrised(nn.Module):
    """A variational autoencoder, which draws random numbers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(_conv(3, 16, 3, 2), _conv(16, 32, 3, 2), nn.Flatten())
        self.mean, self.spread = nn.Linear(2048, 16), nn.Linear(2048, 16)
        self.decoder = nn.Sequential(
            nn.Linear(16, 2048), nn.Unflatten(1, (32, 8, 8)), nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x):
        """The image again, with the mean and spread of its code."""
        x = self.encoder(x)
        mean, spread = self.mean(x), self.spread(x)
        code = mean + torch.randn_like(mean) * spread.exp()
        return self.decoder(code), mean, spread


class Text(nn.Module):
    """A classifier of text, of torch's own encoder layers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(64, 5)

    def forward(self, words):
        """Scores of classes; word 0 is padding."""
        x = self.encoder(self.words(words), src_key_padding_mask=words == 0)
        return self.head(x.mean(1))


def _generator() -> nn.Module:
    widths, layers = (64, 64, 32, 16), []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.ConvTranspose2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(
        nn.Linear(32, 1024), nn.Unflatten(1, (64, 4, 4)), *layers, nn.Conv2d(16, 3, 3, padding=1)
    )


def _signals() -> nn.Module:
    layers = []
    for a, b in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv1d(a, b, 9, 2, 4), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(256, 10))


def networks() -> dict[str, Callable[[], Made]]:
    """Name -> what makes the network and its example."""

    def widened(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Upsample(scale_factor=2.0), _conv(inputs, outputs))

    def transposed(inputs: int, outputs: int) -> nn.Module:
        return nn.ConvTranspose2d(inputs, outputs, 2, 2)

    return {
        "handwritten: detector like YOLO": lambda: (Detector(), torch.randn(1, 3, 64, 64)),
        "handwritten: CRNN, LSTM": lambda: (Reader(nn.LSTM), torch.randn(1, 1, 32, 64)),
        "handwritten: CRNN, GRU": lambda: (Reader(nn.GRU), torch.randn(1, 1, 32, 64)),
        "handwritten: U-Net, transposed": lambda: (UNet(transposed), torch.randn(1, 3, 32, 32)),
        "handwritten: U-Net, upsampled": lambda: (UNet(widened), torch.randn(1, 3, 32, 32)),
        "handwritten: variational": lambda: (Reparametrised(), torch.randn(1, 3, 32, 32)),
        "handwritten: text, nn.TransformerEncoder": lambda: (Text(), torch.randint(1, 99, (1, 12))),
        "handwritten: generator": lambda: (_generator(), torch.randn(1, 32)),
        "handwritten: signals, Conv1d": lambda: (_signals(), torch.randn(1, 1, 256)),
    }
