"""The benchmark of adaptive pruning: its runs share a warm-up, and its table has them all."""

import json
from argparse import Namespace

import pytest
import torch

adaptive = pytest.importorskip("benchmarks.pruning.adaptive", reason="needs the source tree")


def test_methods_and_table(tmp_path, monkeypatch):
    split = adaptive.Split(torch.rand(128, *adaptive.SHAPE), torch.arange(128) % 10)
    splits = dict.fromkeys(("train", "validation", "test"), split)
    monkeypatch.setattr(adaptive.data, "load", lambda *_: splits)
    small = {"vgg": lambda: adaptive.zoo.vgg(adaptive.SHAPE, 10, (4, 6), (1, 1))}
    monkeypatch.setattr(adaptive, "NETWORKS", small)
    for name, epochs in {"EPOCHS": 6, "WARMUP": 2, "SHOT": 3, "PRUNING": 2}.items():
        monkeypatch.setattr(adaptive, name, epochs)
    args = Namespace(journal=tmp_path / "journal.jsonl", data_dir=None)
    methods = [m for m in adaptive.METHODS if m in ("whole", "shot") or "channels" in m]
    runs = []
    for method in methods:
        job = {"network": "vgg", "seed": 0, "method": method}
        assert adaptive.run_job(job, args).startswith(f"vgg 0 {method}")
        runs.append(adaptive.grid.finish(job, args, adaptive.measure))
    assert [run["left"][-1] <= 0.5 for run in runs] == [False] + [True] * (len(runs) - 1)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": runs}))
    rows = [line.split(" | ")[1] for line in adaptive.report(path).splitlines()[2:]]
    assert rows == [adaptive.METHODS[method][0] for method in methods]


def test_every_job_of_the_plan_can_run():
    jobs = list(adaptive.planned())
    assert all(job | {"method": "whole"} in jobs for job in jobs)
    assert all(job["method"] in adaptive.METHODS for job in jobs)
