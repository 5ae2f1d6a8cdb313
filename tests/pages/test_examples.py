"""The examples run as a reader would run them, and do what their README says."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from rlscuda.pruning import load_pruned

FOLDER = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the source tree")

EXAMPLES = sorted(FOLDER.rglob("*.py"))


def test_an_example_is_short_and_the_readme_names_what_runs():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) > 15
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 60, path
        assert str(path.relative_to(FOLDER)) in readme or "__main__" not in text, path


@pytest.fixture
def basic(tmp_path, monkeypatch, capsys):
    """Runs an example as a script, in an empty folder; gives the lines that it prints."""
    pytest.importorskip("sklearn", reason="the digits are in the extra [examples]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)

    def lines(name):
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return lines


def test_digits_are_learnt_better_than_by_adam(basic):
    lines = basic("train_digits.py")
    reached = {line[:20].strip(): float(line.split()[-1]) for line in lines[1:5]}
    rls = reached.pop("RLS")
    assert len(reached) == 3 and rls > max(95, *reached.values())
    assert lines[-1].startswith("3 exact")


def named(lines):
    """The figures in % by their names."""
    found = (re.match(r"(.*): +([\d.]+) %", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def test_a_cnn_is_pruned_trained_on_and_exported(basic, tmp_path):
    found = named(basic("prune_cnn.py"))
    assert found["ours"] > found["trained"] - 3 > max(found["L1 magnitude"], found["random"]) + 10
    assert found["ours, trained on for two epochs"] == found["pruned.pt2"] > found["trained"] - 2
    assert [path.name for path in tmp_path.iterdir()] == ["pruned.pt2"]


def test_a_transformer_loses_heads(basic):
    lines = basic("transformer_heads.py")
    found = named(lines)
    assert found["trained"] > 92 and found["ours"] > found["trained"] - 2
    assert found["ours"] >= found["L2"]
    heads = [line.split()[1:3] for line in lines if ".query" in line]
    assert heads and all(pair == ["6", "3"] for pair in heads)


def test_a_filter_follows_a_stream(basic):
    lines = basic("filter_stream.py")
    errors = {line.split()[1]: [float(v) for v in line.split()[3:]] for line in lines[1:-1]}
    remembers, forgets, window = errors["2000"]
    assert remembers > 1 and forgets < 0.05 and window < 0.2
    assert 0.1 < float(re.search(r"0\.\d+", lines[-1])[0]) < 0.11


@pytest.fixture
def faces(tmp_path, monkeypatch):
    """The example of MTCNN, to be run in an empty folder."""
    pytest.importorskip("skimage", reason="the patches are in the extra [examples]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("mtcnn_faces")


def run(example, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [example.__file__, *arguments])
    example.main()


def test_mtcnn_is_pruned(faces, tmp_path, monkeypatch, capsys):
    stages = faces.mtcnn_stages
    try:
        faces.mtcnn_weights.wheel()
    except SystemExit as error:
        pytest.skip(str(error))
    run(faces, monkeypatch, "--out", "picture.png")
    printed = capsys.readouterr().out
    rows = {tuple(w[:2]): w for w in map(str.split, printed.splitlines()) if "-Net" in w[0]}
    for name, least, parameters in (("R-Net", 95, 100_178), ("O-Net", 97, 389_040)):
        whole, ours, l2 = (rows[name, method] for method in ("whole", "ours", "L2"))
        sizes = [int(row[-4].replace(",", "")) for row in (whole, ours, l2)]
        assert sizes[0] == parameters > 15 * sizes[1] and sizes[1] == sizes[2]
        assert int(whole[-2]) == 100 and int(ours[-2]) >= least and int(l2[-2]) <= 75
        assert 0 == float(whole[-1]) < float(ours[-1]) < float(l2[-1])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    pruned = load_pruned(stages.rnet, tmp_path / "picture.rnet.safetensors")
    assert [head.out_features for head in pruned.heads] == [2, 4]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("out", ["faces.txt", "faces", "nowhere/faces.png"])
def test_mtcnn_refuses(faces, tmp_path, monkeypatch, capsys, out):
    with pytest.raises(SystemExit):
        run(faces, monkeypatch, "--out", out)
    assert f"in a folder there is, got {out}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_weights(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit, match="could not download facenet-pytorch==2.6.0"):
        faces.mtcnn_weights.wheel()
    assert not list((tmp_path / "hub").iterdir())


@pytest.fixture
def streaming(tmp_path, monkeypatch, capsys):
    """Runs an example of `examples/streaming`; gives the figures that it prints by their names."""
    pytest.importorskip("padasip", reason="a peer, in the extra [test]")
    pytest.importorskip("sklearn", reason="a peer, in the extra [sklearn]")
    monkeypatch.syspath_prepend(FOLDER / "streaming")

    def figures(name):
        picture = tmp_path / "picture.png"
        run(importlib.import_module(name), monkeypatch, "--plot", str(picture))
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 60_000
        lines = capsys.readouterr().out.splitlines()[1:]
        rows = [re.fullmatch(r"(.*?)((?: {2,}[\d.]+%?)+)", line).groups() for line in lines]
        return {name.strip(): [float(v.rstrip("%")) for v in row.split()] for name, row in rows}

    return figures


def test_echo(streaming):
    found = streaming("echo")
    ours, rls, nlms = found["RLSFilter"], found["padasip RLS"], found["padasip NLMS"]
    assert (
        ours[:2] == pytest.approx(rls[:2], abs=0.2)
        and ours[0] > nlms[0] + 10
        and ours[1] > nlms[1] + 20
    )
    assert ours[2] > rls[2] + 15  # after a tone, in which the textbook's matrix winds up
    assert ours[3] == pytest.approx(rls[3], abs=0.2) and ours[3] < nlms[3]


def test_force(streaming):
    found = streaming("force")
    assert max(found["RLSFilter"][0], found["NumPy"][0]) < 0.01


def test_bandit(streaming):
    found = streaming("bandit")
    ours = found.pop("LinUCB")
    assert len(found) == 3
    for regret, right in found.values():
        assert ours[0] < 0.6 * regret and ours[1] > right


def test_drift(streaming):
    found = streaming("drift")
    forgetting, window = found["forgetting=0.99"], found["window=100"]
    plain, sgd = found["forgetting=1"], found["SGDRegressor"]
    assert plain[0] < min(forgetting[0], window[0]) and plain[2] > 3 * max(forgetting[2], window[2])
    assert window[1] < 0.2 * forgetting[1] < 0.2 * sgd[1]
    assert forgetting[2] < 1.2 * sgd[2]


def test_the_classifier_of_photos_is_cut_by_both_methods(monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite_pytorch", reason="it is in the extra [studies]")
    monkeypatch.syspath_prepend(FOLDER)
    photos = importlib.import_module("efficientnet_photos")
    monkeypatch.setattr(photos, "RATIOS", (0.05,))
    crops = photos.crops
    monkeypatch.setattr(photos, "crops", lambda seed: crops(seed, 12))
    photos.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["ours", "L2"]
    assert len({line.split()[-3] for line in lines[1:]}) == 1  # of equal parameters
