"""The learning benchmark: its tasks, its optimizers, its runs and its report."""

import argparse
import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.common import grid
from benchmarks.common.data import SHAPES, Split
from benchmarks.learning import quality, report, sources
from benchmarks.learning.optimizers import ROWS, Scheduled
from benchmarks.learning.running import Training, train
from benchmarks.learning.tasks import TASKS

NEEDED = {"soap": ("pytorch_optimizer",), "kron": ("pytorch_optimizer", "opt_einsum")}
CIFAR, MNIST = ("vit", "resnet8", "mobilenet", "cifar_cnn"), ("autoencoder", "small_cnn")
IMAGES = dict.fromkeys(CIFAR, "cifar10") | dict.fromkeys(MNIST, "mnist")


def settings(row):
    return {"lr": 1e-3} if ROWS[row].rates else {}


def splits(name, count=8):
    """The data of a task, images being random ones."""
    if name in IMAGES:
        x = torch.rand(count, *SHAPES[IMAGES[name]])
        y = x.flatten(1) if name == "autoencoder" else torch.arange(count)
        return {part: Split(x, y) for part in sources.PARTS}
    if name == "digits":
        pytest.importorskip("sklearn")
    return TASKS[name].source(None)


def skip_without(row):
    for module in NEEDED.get(row, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"no {module}")


def job(task, row, **changes):
    return {
        "task": task, "optimizer": row, "phase": "steps", "seed": 0, "steps": 20,
        "settings": settings(row),
    } | changes  # fmt: skip


def untimed(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "ms", "ms_min")}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name, dense", [*((n, False) for n in TASKS), ("resnet8", True)])
def test_every_optimizer_trains_every_network(name, dense, row):
    skip_without(row)
    task = replace(TASKS[name], batch=4, bfloat16=dense)  # which is channels-last, too
    run = Training(job(name, row), task, splits(name)["train"])
    before = [p.detach().clone() for p in run.model.parameters()]
    run.advance(3)
    assert run.finite
    for (place, p), old in zip(run.model.named_parameters(), before, strict=True):
        assert p.isfinite().all()
        assert p.dim() == 1 or not p.equal(old), f"{place} stands still"


def test_muon_and_adamw_share_the_parameters():
    for name, task in TASKS.items():
        model = task.build(0)
        muon, others = Scheduled("muon", model, task, 1, 0, lr=1e-3).optimizers
        flat = {p.data_ptr() for p in muon._weights}
        rest = {p.data_ptr() for p in others.param_groups[0]["params"]}
        assert not flat & rest
        assert flat | rest == {p.data_ptr() for p in model.parameters()}
        assert set(task.ends) <= {place for place, _ in model.named_parameters()}, name


@pytest.mark.parametrize("row", ["rls", "muon"])
def test_a_seed_says_it_all(row):
    task = TASKS["friedman1"]
    first, again = (untimed(train(job("friedman1", row), task, None)) for _ in range(2))
    assert first == again
    assert untimed(train(job("friedman1", row, seed=1), task, None))["test"] != first["test"]


@pytest.mark.parametrize("row", ["rls", "sgd", "adamw", "muon", "soap"])
def test_an_interrupted_run_ends_the_same(row, tmp_path, monkeypatch):
    skip_without(row)
    task, kept = TASKS["friedman1"], tmp_path / "run.pt"
    whole = train(job("friedman1", row), task, None)
    advance = Training.advance

    def interrupted(run, step):
        if step == 12:
            raise KeyboardInterrupt
        advance(run, step)

    monkeypatch.setattr(Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(job("friedman1", row), task, None, checkpoint=kept)
    assert kept.is_file()
    monkeypatch.setattr(Training, "advance", advance)
    assert untimed(train(job("friedman1", row), task, None, checkpoint=kept)) == untimed(whole)
    assert not kept.exists()


@pytest.mark.parametrize("name", ["gpt", "gru", "friedman1", "digits"])
def test_no_example_is_in_two_splits(name):
    parts = splits(name)
    keys = {
        part: {x.contiguous().numpy().tobytes() for x in split.x} for part, split in parts.items()
    }
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert len(keys[one] & keys[other]) <= 0.01 * len(keys[other])  # a text may repeat itself


def test_tuning_reads_no_test_data():
    record = train(job("friedman1", "rls", phase="tune"), TASKS["friedman1"], None)
    assert record["test"] is None and record["validation"] > 0


def test_a_run_that_diverges_says_so():
    record = train(job("friedman1", "sgd", settings={"lr": 1e6}), TASKS["friedman1"], None)
    assert record["diverged"] and record["test"] is None
    assert quality.score(TASKS["friedman1"], record) == -math.inf


def test_the_schedule_warms_up_and_ends_at_nothing():
    task = TASKS["friedman1"]
    run = Training(job("friedman1", "adamw", steps=50), task, splits("friedman1")["train"])
    rates = []
    for step in range(1, 51):
        run.advance(step)
        rates.append(run.optimizer.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == pytest.approx(2e-4) and max(rates) == rates[4] == rates[5] == 1e-3
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 5e-6


@pytest.mark.parametrize(
    ("rates", "best", "beyond"),
    [((0.01, 0.3), 0.3, 1.0), ((3e-4, 1e-2), 3e-4, 1e-4), ((3e-4, 1e-2), 1e-2, 0.03)],
)
def test_a_best_rate_at_an_edge_asks_for_the_next(rates, best, beyond):
    assert quality.neighbour(list(rates), best) == beyond
    assert quality.neighbour([0.01, 0.03, 0.1], 0.03) is None


def test_flipped_and_cropped_images_are_the_old_ones_moved():
    x = torch.rand(64, 3, 8, 8) + 1
    y = sources.flip_and_crop(x, torch.Generator().manual_seed(0), padding=1)
    assert y.shape == x.shape
    padded = torch.nn.functional.pad(x, [1] * 4)
    shifts = [(i, j, flip) for i in range(3) for j in range(3) for flip in (False, True)]
    for image, new in zip(padded, y):
        views = [image[:, i : i + 8, j : j + 8] for i, j, _ in shifts]
        assert any(new.equal(v) or new.equal(v.flip(2)) for v in views)
    assert len({bool(a.equal(b)) for a, b in zip(x, y)}) == 2 or not y.equal(x)


def fake(task, row, values, phase="steps", **settings):
    return [
        job(task, row, phase=phase, seed=seed, settings=settings)
        | {"diverged": v is None, "validation": v, "test": v, "curve": [[10, v]], "seconds": 1}
        for seed, v in enumerate(values)
    ]


@pytest.fixture
def results(tmp_path):
    runs = [
        *fake("vit", "rls", (40, 41, 42)), *fake("vit", "adamw", (30, 31, 32), lr=0.003),
        *fake("vit", "muon", (41, 42, 43), lr=0.01), *fake("vit", "sgd", (10, None, 12), lr=0.3),
        *fake("gpt", "rls", (1.9, 1.9, 1.9)), *fake("gpt", "adamw", (2.1, 2.1, 2.1), lr=0.003),
        *fake("gpt", "muon", (1.5, 1.6, 1.7), lr=0.03),
        *fake("vit", "muon", (35, 35, 35), phase="time", lr=0.01),
        *fake("vit", "muon", (1, 2), phase="tune", lr=0.01),
        *fake("vit", "rls", (35, 36, 37), phase="flat", lr=0.3),
        *fake("vit", "rls", (36, 36, 36), phase="flat", lr=0.03),
        *(job("vit", row, phase="pace") | {"ms": 10.0, "ratio": ratio}
          for row, ratio in (("rls", 1.5), ("adamw", 1.0), ("muon", 2.0))),
    ]  # fmt: skip
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"runs": runs}))
    return path


def test_the_report_says_who_wins(results, tmp_path):
    text = report.report(results)
    lines = [line for line in text.splitlines() if line.startswith("| ViT")]
    assert "**42.0 ± 1.0**" in lines[0] and lines[0].endswith("| within (Muon) |")
    assert "1 of 3 diverged" in lines[0]
    assert lines[2].endswith("| ahead (Muon) |")
    assert "0.01*" in lines[1] and "1.50" in lines[3] and "50%" in lines[4]
    assert "| behind (Muon) |" in text
    assert "the best peer 0 / 1 / 1; SGD + Nesterov 1 / 0 / 0; AdamW 2 / 0 / 0" in text
    report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_seeds_at_several_settings_are_no_mean(tmp_path):
    runs = [*fake("vit", "muon", (40,), lr=0.01), *fake("vit", "muon", (40,), lr=0.03)]
    (path := tmp_path / "quality.json").write_text(json.dumps({"runs": runs}))
    with pytest.raises(ValueError, match="runs of muon on vit have several settings: --forget"):
        report.report(path)


def test_at_equal_time_a_peer_fills_the_default_s(tmp_path, monkeypatch):
    args = argparse.Namespace(journal=tmp_path / "runs.jsonl", data_dir=None)
    asked, decays = [], set()

    def fake_train(job, task, data_dir):
        asked.append((job["phase"], job["seed"], job["steps"], job["settings"].get("lr")))
        lr, decay = (job["settings"].get(name, 0) for name in ("lr", "weight_decay"))
        error = 0.01 - lr + (decay if job["optimizer"] == "muon" else -decay)
        decays.add(decay)
        return job | {"diverged": lr > 0.2, "validation": error, "test": 1}

    monkeypatch.setitem(ROWS, "rank 1", replace(ROWS["rls"], settings={"rank": 1}))
    ratios = {"rls": 1.5, "adamw": 1.0, "muon": 3.0, "rank 1": 0.75}
    monkeypatch.setattr(quality, "train", fake_train)
    monkeypatch.setattr(quality, "pace", lambda task, row, data_dir: {"ratio": ratios[row]})
    for row, steps in (("adamw", 720), ("muon", 240)):
        asked.clear()
        for phase in ("steps", "time"):
            decays.clear()
            quality.work((phase, "friedman1", row), args)
        assert decays == ({0.2} if row == "adamw" else {0})  # where more decay is better
        tuned = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.1]
        assert [lr for phase, *_, lr in asked if phase == "tune"] == tuned
        assert [a for a in asked if a[0] == "time"] == [("time", s, steps, 0.1) for s in (0, 1, 2)]
        assert [a for a in asked if a[0] == "steps"] == [("steps", s, 480, 0.1) for s in (0, 1, 2)]
    asked.clear()
    for row in ("rls", "rls_tuned", "rank 1"):  # of these the ablation alone has another pace
        quality.work(("time", "friedman1", row), args)
    assert asked == [("time", seed, 960, None) for seed in (0, 1, 2)]
    asked.clear()
    quality.work(("flat", "friedman1", "rls"), args)
    rate = ROWS["rls"].make(TASKS["friedman1"].build(0), None)[0].param_groups[0]["lr"]
    assert sorted({lr for *_, lr in asked}) == pytest.approx([rate / 3, rate * 3])


def test_a_journal_forgets_and_goes_on(tmp_path):
    args = argparse.Namespace(journal=tmp_path / "runs.jsonl")
    wanted, made = [job("gpt", "rls"), job("gpt", "sgd")], []

    def work(job, args):
        made.append(job["optimizer"])
        return job | {"test": 1}

    for _ in range(2):
        [grid.finish(one, args, work) for one in wanted]
    assert made == ["rls", "sgd"]
    grid.forget(args.journal, lambda record: record["optimizer"] == "rls")
    [grid.finish(one, args, work) for one in wanted]
    assert made == ["rls", "sgd", "rls"]
