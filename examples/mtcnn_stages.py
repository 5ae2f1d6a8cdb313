"""R-Net and O-Net of the face detector MTCNN, in the layout that their trained weights have."""

from __future__ import annotations

from torch import Tensor, nn


class Transposed(nn.Module):
    """[n, channels, rows, columns] -> [n, columns, rows, channels], as the weights expect it."""

    def forward(self, x: Tensor) -> Tensor:
        """Transposes."""
        return x.permute(0, 3, 2, 1)


class Stage(nn.Module):
    """A stage of MTCNN's cascade (Zhang et al. 2016, arXiv 1604.02878).

    Args:
        widths: Channels of the convolutions.
        kernels: Sizes of their kernels.
        pools: Sizes of the poolings after the first of them.
        hidden: Width of the linear layer that follows.
        heads: Outputs of each head.
    """

    def __init__(self, widths, kernels, pools, hidden, heads):
        super().__init__()
        layers = []
        for i, (before, width, kernel) in enumerate(zip((3, *widths), widths, kernels)):
            layers += [nn.Conv2d(before, width, kernel), nn.PReLU(width)]
            layers += [nn.MaxPool2d(size, 2, ceil_mode=True) for size in pools[i : i + 1]]
        layers += [Transposed(), nn.Flatten(), nn.Linear(9 * widths[-1], hidden), nn.PReLU(hidden)]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(hidden, outputs) for outputs in heads)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Probabilities of no face and of a face [n, 2]; box [n, 4], O-Net: landmarks [n, 10]."""
        x = self.trunk(x)
        face, *places = (head(x) for head in self.heads)
        return face.softmax(1), *places


def rnet() -> Stage:
    """R-Net, which sees patches of 24 x 24."""
    return Stage((28, 48, 64), (3, 3, 2), (3, 3), 128, (2, 4)).eval()


def onet() -> Stage:
    """O-Net, which sees patches of 48 x 48."""
    return Stage((32, 64, 64, 128), (3, 3, 3, 2), (3, 3, 2), 256, (2, 4, 10)).eval()
