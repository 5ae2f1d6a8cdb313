"""Damaged inputs: one line that says what was expected, before anything large is allocated."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pytest
import torch
from support.cli import ROOT, call, snapshot, subprocess_environment, write_npz

from rlscuda.cli import app, main
from rlscuda.cli.common import memory
from rlscuda.cli.common.errors import UserError, line_of, reading
from rlscuda.cli.common.files import is_there
from rlscuda.cli.data.dataset import load_dataset
from rlscuda.cli.data.folder import decoded, opened
from rlscuda.cli.train.models import build_model
from rlscuda.files.documents import check
from rlscuda.zoo import ImageShape


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sample_of_the_attack_leaves_nothing_over():
    """Of all 1,900, which `tests/attack/damaged_inputs.py` tries one after the other."""
    script = ROOT / "tests" / "attack" / "damaged_inputs.py"
    ended = subprocess.run(
        [sys.executable, str(script), "--every", "100"],
        env=subprocess_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "0 left over" in ended.stdout


# From an exception to a line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("x must be 1, got 2"), "x must be 1, got 2"),
        (OSError(28, "No space left on device", "a.json"), "No space left on device: a.json"),
        (PermissionError(13, "Permission denied", "d"), "Permission denied: d"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
         "not enough memory: DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        (RuntimeError("shape mismatch"), None),
        (TypeError("of ours"), None),
        (KeyError("of ours"), None),
    ],
)  # fmt: skip
def test_which_exceptions_are_a_line(error, line):
    assert line_of(error) == line


def raise_in_info(monkeypatch, error):
    def fail(console):
        raise error

    monkeypatch.setattr("rlscuda.cli.info.print_info", fail)
    assert app.app is not None


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    raise_in_info(monkeypatch, TypeError("of ours"))
    with pytest.raises(TypeError, match="of ours"):
        main(["info"])


def test_a_full_disk_is_one_line_and_the_traceback_can_be_had(monkeypatch, capsys):
    raise_in_info(monkeypatch, OSError(28, "No space left on device", "a\nb"))
    assert call(capsys, "info") == (1, "", "error: No space left on device: a\\nb\n")
    monkeypatch.setenv("RLSCUDA_TRACEBACK", "1")
    with pytest.raises(OSError, match="No space left"):
        main(["info"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RecursionError("maximum"), "nested too deeply"),
        (KeyError("name"), "'name' is missing"),
        (IsADirectoryError(21, "Is a directory", "x"), "Is a directory"),
        (ValueError("one\ntwo"), "one"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (MemoryError(), "it needs more memory than there is"),
    ],
)
def test_a_reader_may_raise_anything(error, reason):
    with pytest.raises(UserError) as caught, reading("x.json: no JSON", "; nothing changed"):
        raise error
    assert str(caught.value) == f"x.json: no JSON: {reason}; nothing changed"
    assert caught.value.__cause__ is error
    with pytest.raises(KeyboardInterrupt), reading("x"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="^inner$"), reading("x"):
        raise UserError("inner")


# Documents against their types


class Inner(TypedDict):
    number: float
    names: list[str]


@dataclasses.dataclass
class Whole:
    inner: dict[str, Inner]
    place: tuple[int, ...]
    kind: str | None = None


GOOD: dict[str, Any] = {
    "inner": {"a": {"number": 1, "names": ["x"]}},
    "place": (1, 2),
    "kind": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": []}, "inner of it must be of the type dict[str, tests.Inner], got a list of 0"),
        ({"inner": {"a": {"number": "1", "names": []}}},
         "number of inner of it['a'] must be of the type float, got '1'"),
        ({"inner": {"a": {"number": True, "names": []}}}, "must be of the type float, got True"),
        ({"inner": {"a": {"number": 10**400, "names": []}}}, "type float, got an int of 1329 bits"),
        ({"inner": {"a": {"number": 1.0, "names": [None]}}},
         "names of inner of it['a'][0] must be of the type str, got None"),
        ({"inner": {"a": {"number": 1.0}}}, "it['a'] must have number, names; names is missing"),
        ({"inner": {3: {"number": 1.0, "names": []}}},
         "a key of inner of it must be of the type str, got 3"),
        ({"place": (1, 2.0)}, "place of it[1] must be of the type int, got 2.0"),
        ({"place": [1]}, "place of it must be of the type tuple[int, ...], got a list of 1"),
        ({"place": (2**63,)}, "place of it[0] must be of the type int, got 9223372036854775808"),
        ({"kind": 5}, "kind of it must be of the type str, got 5"),
    ],
)  # fmt: skip
def test_documents_are_checked_all_the_way_down(change, message):
    check(GOOD, Whole, "it")
    with pytest.raises(ValueError) as caught:
        check({**GOOD, **change}, Whole, "it")
    assert message.replace("tests.", f"{__name__}.") in str(caught.value)


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), [1.0]])
def test_a_tensor_of_a_document_has_its_data(tensor):
    check(torch.zeros(2), torch.Tensor, "it")
    with pytest.raises(ValueError, match="it must be of the type Tensor"):
        check(tensor, torch.Tensor, "it")


# Names that are no files


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "a named pipe"),
        (os.mkdir, "a folder"),
        (lambda path: os.symlink("/nothing/there", path), "a link to nothing"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
        (lambda path: os.symlink(path, path), "symbolic links"),
    ],
    ids=["pipe", "folder", "dangling", "device", "loop"],
)
@pytest.mark.parametrize("name", ["data.npz", "run/config.json", "images/a/x.png"])
def test_what_is_no_file_is_never_opened(folder, capsys, make, what, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    with pytest.raises(UserError, match=what):
        is_there(path)
    data = "images" if "images" in name else "data.npz"
    more = ("--resume",) if "run" in name else ()
    status, out, error = call(capsys, "train", "--data", data, "--out", "run", *more)
    assert status == 1 and error.count("\n") == 1 and error.startswith("error: ")


# Sizes before allocations


@pytest.fixture
def small_machine(monkeypatch):
    """A machine of 2 MiB."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**21)


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    whole = memory.machine_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_GROUP_LIMIT", limit)
    for text, expected in (("max\n", None), ("4096\n", 4096), (f"{2**60}\n", None)):
        limit.write_text(text)
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert memory.machine_memory() == (expected or physical)
    assert whole > 0


def test_labels_of_a_billion_make_no_network(folder):
    path = write_npz(folder / "d.npz", y_train=np.arange(90) % 3 * 10**9)
    with pytest.raises(
        UserError, match="class numbers counted from 0, below the 90 images; got 2000"
    ):
        load_dataset(str(path), 0.1)


def test_a_network_larger_than_the_memory_is_refused_before_it_is_made(monkeypatch):
    made = []
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: made.append(self.weight))
    with pytest.raises(UserError, match="--model mlp for images .* at most half of the"):
        build_model("mlp", ImageShape(3, 20_000, 20_000), 10)
    assert all(weight.is_meta for weight in made)


def lying_archive(path: Path, shape: tuple, more: int) -> None:
    """An archive whose x_train says it has a shape, and which has so many bytes more on paper."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    labels = io.BytesIO()
    np.save(labels, np.arange(shape[0]) % 3)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", header.getvalue())
        archive.writestr("y_train.npy", labels.getvalue())
        archive.getinfo("x_train.npy").file_size += more


def test_an_array_is_as_large_as_its_header_says(folder):
    lying_archive(folder / "d.npz", (90, 10**6, 10**6), 0)
    with pytest.raises(UserError, match="x_train.npy must hold 90000000000000 bytes"):
        load_dataset("d.npz", 0.1)


def test_a_bomb_is_refused_by_its_size(folder):
    lying_archive(folder / "d.npz", (90, 10**6, 10**6), 90 * 10**12)
    with pytest.raises(UserError, match="x_train must take at most half of the .* got 8.3.* GiB"):
        load_dataset("d.npz", 0.1)


def test_images_are_counted_before_they_are_decoded(folder, small_machine):
    files = [(folder / "missing.png", 0)] * 5
    with pytest.raises(UserError, match="5 images of 1000 x 1000 must take at most half"):
        decoded(folder, files, "L", (8, 8), 1000)
    with pytest.raises(UserError, match="5 images of 500 x 500 must take at most half"):
        decoded(folder, files, "RGB", (500, 500), None)


def test_a_document_has_a_largest_size(folder, capsys):
    (folder / "run").mkdir()
    with open(folder / "run" / "config.json", "wb") as file:
        file.truncate(2**40)
    status, _, error = call(capsys, "train", "--resume", "--out", "run")
    assert status == 1 and "it must have at most 268435456 bytes, got 1099511627776" in error


def test_pixels_that_pillow_doubts_are_refused(folder):
    from PIL import Image

    Image.new("1", (10_000, 10_000)).save(folder / "a.png")
    expected = "a.png: not a readable image: Image size .* exceeds limit"
    with pytest.raises(UserError, match=expected), opened(folder / "a.png"):
        pass


# Nothing is written


def test_a_damaged_test_set_is_found_before_the_training(folder, capsys):
    path = write_npz(folder / "d.npz", test=3000)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("x_test.npy").header_offset + 100_000
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)
    before = snapshot(folder)
    status, _, error = call(capsys, "train", "--data", "d.npz", "--model", "mlp", "--out", "run")
    assert status == 1 and "cannot read x_test: Bad CRC-32" in error
    assert snapshot(folder) == before and not (folder / "run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--seed", 2**63), "--seed must be at most 9223372036854775807"),
        (("--epochs", 10**30), "--epochs must be at most 1000000000"),
        (("--threads", 10**6), "--threads must be at most 1024"),
        (("--device", "cuda:" + "9" * 30), "--device must be auto, cpu, cuda or cuda:N"),
        (("--prune-schedule", "cubic:0.5:" + "9" * 5000), "rounds must be a whole number >= 1"),
    ],
)
def test_numbers_beyond_their_range(folder, capsys, option, message):
    write_npz(folder / "d.npz")
    status, _, error = call(capsys, "train", "--data", "d.npz", "--out", "run", *option)
    assert status == 1 and message in error and error.count("\n") == 1
