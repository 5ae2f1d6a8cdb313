"""`rlscuda study pretraining`, small: its files, its lines for errors, and its resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.cli import call, make_images, snapshot

from rlscuda.cli import main
from rlscuda.cli.study.cells import CELLS
from rlscuda.studies import Study
from rlscuda.zoo import ImageShape

pytest.importorskip("typer")
OPTIONS = {
    "network": "mlp", "seeds": "0", "ratios": "0,.5,.9", "rules": "saliency+,l1",
    "fairness": "epochs", "epochs": "6", "source-epochs": "1", "rates": ".05", "batch-size": "20",
    "train-images": "80", "val-images": "40", "calibration-images": "50",
}  # fmt: skip
WORDS = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten classes, a bright column each."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    x, y = make_images(400, side=12, classes=10)
    x_test, y_test = make_images(100, side=12, classes=10, seed=1)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return path


def study(capsys, data, out, *more):
    return call(capsys, "study", "pretraining", "--data", data, "--out", out, *WORDS, *more)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A finished study."""
    out = tmp_path_factory.mktemp("study") / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["study", "pretraining", "--data", str(data), "--out", str(out), *WORDS])
    assert not stopped.value.code
    return out


def test_one_table_one_plot_one_json(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "curves.png", "journal.jsonl", "networks", "study.json", "study.md"
    }  # fmt: skip
    document = json.loads((folder / "study.json").read_text())
    found = Study.from_dict(document)
    assert len(found.arms) == 2 and found.markdown() == (folder / "study.md").read_text()
    assert found.protocol.ratios == (0, 0.5, 0.9) and not found.failed
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_study_is_shown_again(folder, capsys):
    before = snapshot(folder)
    status, out, _ = call(capsys, "study", "pretraining", "--resume", "--out", folder)
    assert status == 0 and "is finished" in out and "saliency+" in out
    assert snapshot(folder) == before


def test_an_interrupted_study_goes_on_to_the_same_table(
    folder, data, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rlscuda.studies.runner._Runner._sources", interrupted)
        status, _, error = study(capsys, data, out)
    assert status == 130 and f"--resume --out {out} continues" in error
    status, *_ = call(capsys, "study", "pretraining", "--resume", "--out", out)
    assert status == 0
    assert (out / "study.md").read_text() == (folder / "study.md").read_text()


def test_errors_are_one_line(folder, data, tmp_path, capsys):
    before = snapshot(folder)
    for more, line in (
        (("--out", folder), "already holds a study: --resume continues it, --overwrite"),
        (("--rules", "best"), "--rules must be one of saliency+, saliency"),
        (("--ratios", "0,2"), "--ratios must ascend from 0 and stay below 1"),
        (("--seeds", "a"), "--seeds must be a comma list of numbers, got 'a'"),
        (("--network", "vgg"), "--network of mnist must be one of lenet5, mlp, got 'vgg'"),
        (("--cell", "svhn"), "--cell must be one of mnist, cifar10, efficientnet"),
        (("--epochs", 1), "--frozen_epochs must be less than the 1 epochs"),
        (("--data", tmp_path / "no.npz"), "no such file"),
        (("--train-images", 3), "must have training images of the 5 classes [5, 6, 7, 8, 9]"),
    ):
        status, _, error = study(capsys, data, tmp_path / "new", *more)
        assert status == 1 and line in error and error.count("\n") == 1, (line, error)
        assert not (tmp_path / "new").exists()
    status, _, error = call(
        capsys, "study", "pretraining", "--resume", "--out", folder, "--seeds", "5"
    )
    assert status == 1 and "--seeds was 0, got 5" in error
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file").write_text("mine")
    status, _, error = study(capsys, data, tmp_path / "some")
    assert status == 1 and "holds no study of rlscuda" in error
    assert snapshot(folder) == before


def test_every_cell_makes_its_networks():
    pytest.importorskip("efficientnet_lite_pytorch")
    for cell in CELLS.values():
        side = cell.pixels or 32
        for make in cell.networks.values():
            model = make(ImageShape(3, side, side), 4)
            assert model(torch.randn(2, 3, side, side)).shape == (2, 4)
