"""The networks of the learning benchmark that `rlscuda.zoo` does not have."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlscuda import zoo

SMALL_CNN = partial(zoo.lenet5, widths=(16, 32), hidden=(100,))
CIFAR_CNN = partial(
    zoo.vgg,
    widths=(24, 48, 64),
    depths=(1, 1, 1),
    hidden=(128,),
    pixels=4,
    norm=False,
    bias=True,
)


class Attention(nn.Module):
    """Multi-head self-attention with a Linear layer each for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, T, width] to the same shape."""
        parts = (layer(x) for layer in (self.query, self.key, self.value))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block: layer norm before attention and before the GELU MLP."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, T, width] to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _blocks(width: int, heads: int, depth: int, causal: bool) -> nn.Sequential:
    return nn.Sequential(*(Block(width, heads, causal) for _ in range(depth)))


class GPT(nn.Module):
    """A decoder of characters, with learned positions and a head of its own."""

    def __init__(self, vocabulary: int, context: int, width: int = 64, heads: int = 4, depth=3):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = _blocks(width, heads, depth, causal=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps codes [N, T] to logits [N, T, vocabulary]."""
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions[: x.shape[1]])))


class ViT(nn.Module):
    """A vision transformer on patches of 4 x 4 pixels, with the mean of the tokens at its end."""

    def __init__(self, shape: zoo.ImageShape, classes: int, width=64, heads=4, depth=3):
        super().__init__()
        self.patches = nn.Conv2d(shape.channels, width, 4, 4)
        count = (shape.height // 4) * (shape.width // 4)
        self.positions = nn.Parameter(0.02 * torch.randn(count, width))
        self.blocks = _blocks(width, heads, depth, causal=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [N, C, H, W] to logits [N, classes]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class TextClassifier(nn.Module):
    """A GRU over embedded characters; two Linear layers read its last state."""

    def __init__(self, vocabulary: int, classes: int, embedded: int = 32, width: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedded)
        self.gru = nn.GRU(embedded, width, batch_first=True)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps codes [N, T] to logits [N, classes]."""
        _, state = self.gru(self.tokens(x))
        return self.head(self.hidden(state[0]).relu())


def multilayer(*units: int) -> nn.Sequential:
    """Linear layers with a ReLU between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(units, units[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def autoencoder() -> nn.Sequential:
    """784-250-100-30 and back, with a linear code."""
    encoder, decoder = multilayer(784, 250, 100, 30), multilayer(30, 100, 250, 784)
    return nn.Sequential(nn.Flatten(), *encoder, *decoder)


def mobilenet(shape: zoo.ImageShape, classes: int) -> nn.Sequential:
    """Depthwise-separable convolutions with batch norm, after MobileNet."""
    layers = _normed(nn.Conv2d(shape.channels, 16, 3, padding=1, bias=False))
    inputs = 16
    for outputs, stride in ((32, 2), (64, 2), (64, 1), (128, 2)):
        depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        layers += _normed(depthwise) + _normed(nn.Conv2d(inputs, outputs, 1, bias=False))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _normed(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]
