"""RLS in place of Adam: the same loop trains a small CNN on the 8 x 8 digits of scikit-learn.

RLS is at its defaults, Adam at three rates, all with a cosine schedule.

    python examples/train_digits.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from rlscuda import RLSOptimizer

BATCH = 64


def splits():
    """Images [N, 1, 8, 8] and their digits [N]: 1,437 to learn from, 360 to be judged by."""
    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target)
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def network():
    """Takes images [N, 1, 8, 8] and gives logits [N, 10]."""
    convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 10))


@torch.no_grad()
def accuracy(model, x, y):
    """The share of images in % whose digit is named."""
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def train(model, optimizer, x, y, epochs):
    """Trains by any optimizer of torch, and stops after each epoch for the caller to look."""
    schedule = CosineAnnealingLR(optimizer, epochs * -(-len(x) // BATCH))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
        yield


if __name__ == "__main__":
    data, test = splits()
    print("test accuracy in %   after epoch 2, 4, 6, 8 and 10")
    for rate in (0.003, 0.01, 0.03, None):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), rate) if rate else RLSOptimizer(model)
        reached = [accuracy(model, *test) for _ in train(model, optimizer, *data, epochs=10)]
        name = f"Adam, lr={rate}" if rate else "RLS"
        print(f"{name:20}", *(f"{value:5.1f}" for value in reached[1::2]))
    print(optimizer.coverage())  # of RLS: what trains each layer
