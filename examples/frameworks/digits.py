"""What the examples train: a small network that reads the 8 x 8 digits of scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def network() -> nn.Module:
    """Takes images [N, 1, 8, 8] and gives logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )


def splits() -> tuple[TensorDataset, TensorDataset]:
    """1,437 digits to learn from, and 360 to be judged by."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])
