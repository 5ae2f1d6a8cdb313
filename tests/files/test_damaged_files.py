"""Bits that flip in files, and full disks: one clear error, and what was there is whole."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import signal
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cli import assert_same, call, run_in, snapshot, working_copy
from torch import nn

from rlscuda.cli.common.errors import UserError
from rlscuda.cli.train.checkpoint import load_checkpoint, save_checkpoint
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically, write_text
from rlscuda.pruning.files.saving import load_optimizer, load_pruned, save_pruned

TRAIN = ("train", "--model", "mlp", "--data", "data.npz", "--optimizer", "sgd", "--epochs", 1,
         "--batch-size", 20, "--out", "run")  # fmt: skip
PRUNE = ("prune", "--run", "run", "--ratio", 0.5, "--source", "calibration")


@contextmanager
def largest_file(size: int):
    """No file of this process can grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def training() -> dict:
    """What a checkpoint holds, small."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    order = torch.randperm(50)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "order": order}


def flips(data: bytes, count: int):
    """Copies of the data in which one bit differs, all over them."""
    draw = random.Random(0)
    for place in sorted(draw.sample(range(8 * len(data)), count)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        yield bytes(flipped)


# Bits


def test_a_checkpoint_of_a_flipped_bit_is_refused_or_the_same(tmp_path):
    path, state = tmp_path / "sgd.pt", training()
    save_checkpoint(path, "run", "sgd", state)
    refused = same = 0
    for damaged in flips(path.read_bytes(), 400):
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path, "run", "sgd")
        except UserError as error:
            assert str(path) in str(error) and "nothing was overwritten; put back a" in str(error)
            refused += 1
        else:
            assert assert_same(state, found) > 5
            same += 1  # it is in the room between two records
    assert refused > 200 and same > 0


def test_a_record_that_is_another_or_taken_for_a_folder_is_refused():
    stream = io.BytesIO()
    save_archive({"a": torch.arange(10), "b": torch.ones(5)}, stream)
    data = stream.getvalue()
    with zipfile.ZipFile(stream) as archive:
        records = len(archive.infolist())
    place = -1
    for _ in range(records):
        place = data.index(b"PK\1\2", place + 1)
        attributes = place + 38
        damaged = data[:attributes] + b"\x10" + data[attributes + 1 :]  # the flag of a folder
        with pytest.raises(ValueError, match="record 'archive/.*' is not as torch.save writes it"):
            load_archive(io.BytesIO(damaged))
    numbers = data.index(torch.arange(10).numpy().tobytes())
    damaged = data[:numbers] + b"\1" + data[numbers + 1 :]
    assert torch.load(io.BytesIO(damaged))["a"][0] == 1  # PyTorch does not see it
    with pytest.raises(ValueError, match="'archive/data/0' does not have the checksum"):
        load_archive(io.BytesIO(damaged))


def test_checksums_are_written_where_the_process_has_switched_them_off():
    stream = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        save_archive({"a": torch.arange(10)}, stream)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    stream.seek(0)
    assert torch.equal(load_archive(stream)["a"], torch.arange(10))


def saved_network(path: Path) -> tuple[dict, dict]:
    """Save a pruned network with its optimizer; their states."""
    model = network(width=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    save_pruned(model, path, optimizer=optimizer)
    return dict(model.state_dict()), optimizer.state_dict()


def loaded_network(path: Path) -> tuple[dict, dict]:
    model = load_pruned(network, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    load_optimizer(optimizer, path)
    return dict(model.state_dict()), optimizer.state_dict()


def test_a_saved_network_of_a_flipped_bit_is_refused_or_the_same(tmp_path):
    path = tmp_path / "network"
    states = saved_network(path)
    refused = 0
    for damaged in flips(path.read_bytes(), 400):
        path.write_bytes(damaged)
        try:
            found = loaded_network(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert assert_same(states[0], found[0]) + assert_same(states[1], found[1]) > 5
    assert refused > 350


def test_a_file_that_another_process_replaces_while_it_is_read_is_not_torn(tmp_path):
    path = tmp_path / "network"
    models = [network(width=3), network(width=2)]
    save_pruned(models[0], path)
    if not (writer := os.fork()):
        try:
            while True:
                for model in models:
                    save_pruned(model, path)
        finally:
            os._exit(1)
    try:
        widths = [load_pruned(network, path)[0].out_features for _ in range(300)]
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    assert set(widths) == {2, 3}


def test_what_is_damaged_is_named(tmp_path):
    path = tmp_path / "network"
    model, _ = saved_network(path)
    data = path.read_bytes()
    place = data.index(model["2.weight"].numpy().tobytes())
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(ValueError, match="network is damaged: '2.weight' is not what its SHA-256"):
        load_pruned(network, path)
    path.write_bytes(data.replace(b"momentum_buffer", b"momentum_Buffer"))
    with pytest.raises(ValueError, match="network is damaged: '.optimizer' is not what its"):
        load_optimizer(torch.optim.SGD(network(width=3).parameters(), lr=0.5), path)
    path.write_bytes(data.replace(b"num_features", b"num_featureS"))
    with pytest.raises(ValueError, match="network is damaged: the manifest is not what its"):
        load_pruned(network, path)


def test_a_network_saved_before_there_were_checksums_is_loaded(tmp_path):
    path = tmp_path / "network"
    states = saved_network(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["manifest"])
    assert manifest.pop("sha256").keys() == load_file(path).keys() and metadata.pop("sha256")
    save_file(load_file(path), path, metadata={**metadata, "manifest": json.dumps(manifest)})
    found = loaded_network(path)
    assert assert_same(states[0], found[0]) + assert_same(states[1], found[1]) > 5


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(0, 3), torch.tensor(1.5), torch.ones(3, dtype=torch.bool),
     torch.randn(3, dtype=torch.bfloat16), torch.randn(2, 3, dtype=torch.complex64).mT],
    ids=["empty", "scalar", "bool", "bfloat16", "strided"],
)  # fmt: skip
def test_checksums_of_any_tensor(tensor, tmp_path):
    def factory() -> nn.Module:
        model = nn.Module()
        model.register_buffer("value", tensor.clone())
        return model

    save_pruned(factory(), tmp_path / "network")
    assert torch.equal(load_pruned(factory, tmp_path / "network").value, tensor)


# Full disks


@pytest.mark.parametrize("name", ["bytes", "checkpoint", "network"])
def test_a_file_that_cannot_be_written_whole_is_the_old_one(tmp_path, name):
    path = tmp_path / "file"
    write_text(path, "old")
    write = {
        "bytes": lambda: write_atomically(path, lambda stream: stream.write(bytes(10_000))),
        "checkpoint": lambda: save_checkpoint(path, "run", "sgd", {"x": torch.zeros(10_000)}),
        "network": lambda: save_pruned(nn.Linear(100, 100), path),
    }[name]
    with largest_file(4096), pytest.raises(OSError) as raised:
        write()
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert snapshot(tmp_path) == {"file": b"old"}
    write()
    assert len(path.read_bytes()) > 4096


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run and its pruning, made once."""
    return run_in(tmp_path_factory.mktemp("trained"), TRAIN, PRUNE)


@pytest.fixture
def folder(tmp_path, trained):
    """A copy of that folder, which is the current one."""
    with working_copy(trained, tmp_path) as copy:
        yield copy


def test_a_full_disk_ends_a_training_with_a_line_and_it_is_resumed(folder, capsys):
    whole = snapshot(folder / "run")
    with largest_file(100_000):
        status, _, error = call(capsys, *TRAIN, "--overwrite")
    assert status == 1 and error.count("\n") == 1
    assert "error: run/checkpoints/sgd.pt cannot be written: File too large; the files in" in error
    assert set(snapshot(folder / "run")) == {"config.json"}
    assert call(capsys, "train", "--resume", "--out", "run")[0] == 0
    resumed = snapshot(folder / "run")
    assert resumed.keys() == whole.keys()
    networks = [torch.load(io.BytesIO(files["checkpoints/sgd.pt"])) for files in (whole, resumed)]
    assert assert_same(*(one["training"]["model"] for one in networks)) > 5


def test_a_full_disk_ends_a_pruning_with_a_line_and_changes_no_file(folder, capsys):
    before = snapshot(folder)
    for out in ("run-pruned", "other"):
        with largest_file(100_000):
            status, _, error = call(capsys, *PRUNE, "--overwrite", "--out", out)
        assert status == 1 and error.count("\n") == 1
        assert "pruned.safetensors cannot be written: File too large; the files in" in error
        assert snapshot(folder) == before and not (folder / "other").exists()


def test_a_damaged_checkpoint_is_a_line_that_says_what_to_do(folder, capsys):
    path = folder / "run" / "checkpoints" / "sgd.pt"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    place = largest.header_offset + largest.file_size // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    before = snapshot(folder)
    status, _, error = call(capsys, *PRUNE, "--out", "other")
    assert status == 1 and error.count("\n") == 1 and snapshot(folder) == before
    assert "run/checkpoints/sgd.pt cannot be read as a checkpoint: it is truncated" in error
    assert f"{largest.filename!r} does not have the checksum that the file holds" in error
    assert "delete it and summary.json: train --resume trains sgd again" in error
    path.unlink()
    (folder / "run" / "summary.json").unlink()
    assert call(capsys, "train", "--resume", "--out", "run")[0] == 0
    again = load_archive(io.BytesIO(path.read_bytes()))["training"]
    assert assert_same(load_archive(io.BytesIO(data))["training"], again) > 5
