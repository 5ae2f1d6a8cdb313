"""Networks with residual branches, each written in another way; and what to expect of them."""

import torch
import torch.nn.functional as F
from torch import nn

from rlscuda import zoo
from rlscuda.pruning.running.calls import all_tensors


def copies(model):
    """Copies of all tensors of a model by name."""
    return {name: tensor.detach().clone() for name, tensor in all_tensors(model).items()}


def resnet(widths=(4, 6), blocks=2):
    return zoo.resnet(zoo.ImageShape(3, 8, 8), 5, widths, blocks)


class PreActivation(nn.Module):
    """Norm and ReLU before the convolutions; the projection sees what the branch does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, 2, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 1, 1)
        self.project = nn.Conv2d(4, 6, 1, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = self.conv2(F.relu(self.bn2(self.conv1(x)))) + self.project(x)
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """One ReLU for all, in place, and a sum that is written to the branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.stem(x))
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.head(self.relu(out).mean((2, 3)))


class ChannelsLast(nn.Module):
    """A convolution of images, then Linear layers of pixels; their output is turned back."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.LayerNorm(3)
        self.up, self.down, self.head = nn.Linear(3, 8), nn.Linear(8, 3), nn.Linear(3, 5)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class PostNorm(nn.Module):
    """Attention that returns a tuple, and norms after the sums; a mask enters it, too."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.scale = (
            nn.Linear(8, 16),
            nn.Linear(16, 8),
            nn.Parameter(torch.ones(8)),
        )

    def forward(self, x, padding):
        y, _ = self.attention(x, x, x, key_padding_mask=padding)
        x = self.norm1(x + y)
        return self.norm2(self.scale * self.down(F.gelu(self.up(x))) + x)


class Used(nn.Module):
    """A branch whose output is used elsewhere, so that it does not die with its sum; and one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.second(self.first(x))
        return self.head(x + y) + y


class Shared(nn.Module):
    """A branch whose module runs outside of it, too."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.inner(x).relu()
        return self.head(x + self.inner(x))


class Twice(nn.Module):
    """A branch that begins with one module twice, whose output is then written to."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = F.relu(self.norm(self.norm(x)), inplace=True)
        return self.head(x + self.inner(y))


class Plain(nn.Module):
    """Sums that are no residuals: of two inputs' features, and of two branches alike."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(9, 6), nn.Parameter(torch.randn(4, 6))
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.words(x) + self.places
        return self.left(x) + self.right(x)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
PADDING = torch.tensor([[False] * 4, [False, False, True, True]])
CASES = {  # make, inputs, names of the blocks, names of those refused
    "resnet": (resnet, IMAGES, ["block11", "block12", "block21", "block22"], []),
    "preactivation": (PreActivation, IMAGES, ["conv2"], []),
    "in place": (InPlace, IMAGES, ["conv2"], []),
    "channels last": (ChannelsLast, IMAGES, ["down"], []),
    "post-norm": (PostNorm, (TOKENS, PADDING), ["attention", "down"], []),
    "used": (Used, ROWS, ["head"], []),
    "shared": (Shared, ROWS, [], ["inner"]),
    "twice": (Twice, ROWS, ["inner"], []),
    "plain": (Plain, torch.tensor([[1, 2, 3, 4]]), [], []),
}
