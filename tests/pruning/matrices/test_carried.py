"""Matrices travel beside a checkpoint, and a network is pruned by them without data."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import (
    CarriedMatrices,
    RLSPruner,
    calibrate,
    load_matrices,
    own_matrices,
    save_matrices,
)

X = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def net(width=6, bias=True):
    return nn.Sequential(
        nn.Conv2d(2, width, 3, bias=bias), nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5),
    )  # fmt: skip


@pytest.fixture
def trained():
    """A network and the matrices that its optimizer has tracked."""
    torch.manual_seed(1)
    model = net()
    optimizer = RLSOptimizer(model)
    for _ in range(6):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_pruning_by_a_file_is_pruning_by_the_optimizer(trained, tmp_path):
    model, optimizer = trained
    save_matrices(own_matrices(optimizer), tmp_path / "m")
    other = copy.deepcopy(model)
    carried = load_matrices(other, tmp_path / "m")
    for ratio in (0.3, 0.6):  # the matrices follow the first cut
        RLSPruner(model, optimizer, X[:2], ratio=ratio).step()
        report = RLSPruner(other, None, X[:2], ratio=ratio, tracker=carried).step()
        assert not report.uncompensated and report.source == "carried"
    torch.testing.assert_close(other(X), model(X), rtol=1e-4, atol=1e-5)


def test_matrices_come_back_to_the_bit_and_see_no_forward(trained, tmp_path):
    model, _ = trained
    matrices = calibrate(model, [X])
    save_matrices(matrices, tmp_path / "m")
    carried = load_matrices(model, tmp_path / "m")
    model.train()(X).square().mean().backward()
    assert carried.matrices().keys() == matrices.keys()
    assert all(torch.equal(carried.matrices()[name], P) for name, P in matrices.items())


def test_compensation_without_data_is_better_than_none(trained, tmp_path):
    model, _ = trained
    save_matrices(calibrate(model, [X]), tmp_path / "m")
    errors = []
    for compensate in (True, False):
        pruner = RLSPruner(
            model, None, X[:2], ratio=0.5, compensate=compensate,
            tracker=load_matrices(model, tmp_path / "m"),
        )  # fmt: skip
        (pruned,) = pruner.copies([0.5])
        errors.append((pruned(X) - model(X)).square().mean().item())
    assert errors[0] < 0.5 * errors[1]


def test_a_snapshot_brings_them_back(trained, tmp_path):
    model, optimizer = trained
    carried = CarriedMatrices(model, own_matrices(optimizer))
    before = carried.matrices()
    pruner = RLSPruner(model, optimizer, X[:2], ratio=0.5, tracker=carried)
    snapshot = pruner.snapshot()
    pruner.step()
    assert carried.matrices()["2"].shape != before["2"].shape
    snapshot.restore()
    assert all(torch.equal(carried.matrices()[name], P) for name, P in before.items())


def test_a_matrix_without_the_bias_column_fits_too(trained):
    model, _ = trained
    matrices = {"0": torch.eye(18).double()[None], "6": torch.eye(25).double()[None]}
    carried = CarriedMatrices(model, matrices)
    RLSPruner(model, None, X[:2], ratio=0.5, tracker=carried).step()
    assert {n: list(P.shape) for n, P in carried.matrices().items()} == {
        "0": [1, 18, 18], "6": [1, 17, 17]
    }  # fmt: skip


def test_what_does_not_fit_is_refused(trained, tmp_path):
    model, _ = trained
    save_matrices(calibrate(model, [X]), tmp_path / "m")
    with pytest.raises(ValueError, match=r"m does not fit the model: the matrix of '[26]' must be"):
        load_matrices(net(width=8), tmp_path / "m")
    with pytest.raises(ValueError, match="names '0', which the model does not have"):
        load_matrices(nn.Linear(3, 2), tmp_path / "m")
    with pytest.raises(ValueError, match=r"'0' must be \[1, 18, 18\] by the model.*got \[1, 19"):
        load_matrices(net(bias=False), tmp_path / "m")
    with pytest.raises(ValueError, match="names '1', which can have no matrix"):
        CarriedMatrices(model, {"1": torch.eye(3)[None]})
    for bad in (
        -torch.eye(18),
        torch.eye(18) * torch.nan,
        torch.eye(18) + torch.ones(18, 18).triu(1) / 99,
    ):
        with pytest.raises(ValueError, match="finite, symmetric and positive definite"):
            save_matrices({"0": bad[None]}, tmp_path / "n")
    with pytest.raises(ValueError, match=r"must be \[groups, n, n\]"):
        save_matrices({"0": torch.eye(18)}, tmp_path / "n")
    with pytest.raises(TypeError, match="floating-point"):
        save_matrices({"0": torch.eye(18).long()[None]}, tmp_path / "n")
    with pytest.raises(ValueError, match="at least one layer"):
        save_matrices({}, tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_damage_is_seen(trained, tmp_path):
    model, _ = trained
    path = tmp_path / "m"
    with pytest.raises(FileNotFoundError):
        load_matrices(model, path)
    save_matrices(calibrate(model, [X]), path)
    data = path.read_bytes()
    for size in (0, 7, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            load_matrices(model, path)
    for place in range(9, len(data), len(data) // 150):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(ValueError):
            load_matrices(model, path)
    save_file({"0": torch.eye(18)}, path)
    with pytest.raises(ValueError, match="was not written by save_matrices"):
        load_matrices(model, path)
    path.write_bytes(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    save_file(load_file(path), path, {**header, "version": "2"})
    with pytest.raises(ValueError, match="format version 1, got 2"):
        load_matrices(model, path)
