"""The benchmark of relief: its methods keep equally many weights, and its table has them all."""

import json
from argparse import Namespace

import pytest
import torch

relief = pytest.importorskip("benchmarks.pruning.relief", reason="needs the source tree")


def test_methods_and_table(tmp_path, monkeypatch):
    split = relief.data.Split(torch.rand(128, 1, 28, 28), torch.arange(128) % 10)
    splits = dict.fromkeys(("train", "validation", "test"), split)
    monkeypatch.setattr(relief.data, "load", lambda *args: splits)
    monkeypatch.setattr(relief, "ROUNDS", 2)
    small = {"lenet300": lambda: relief.zoo.mlp(relief.data.SHAPES["mnist"], 10, hidden=(5, 4))}
    monkeypatch.setattr(relief, "NETWORKS", small)
    args = Namespace(journal=tmp_path / "journal.jsonl", data_dir=None)
    job = {"network": "lenet300", "optimizer": "rls", "seed": 0, "alpha": [0.8, 0.8]}
    runs = {}
    for method in ("saliency", *relief.METHODS):
        assert relief.run_job(job | {"method": method}, args).startswith("lenet300 rls 0")
        runs[method] = relief.grid.finish(job | {"method": method}, args, relief.measure)
    kept = {method: [r["kept"] for r in run["rounds"]] for method, run in runs.items()}
    assert kept["refit"] == kept["magnitude"] == kept["saliency"] and kept["refit"][1][0] < 2500
    assert kept["dense"] == [[3920, 20, 40]] * 2
    assert all(run["rounds"][1]["left"] < 80 for m, run in runs.items() if m != "dense")
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": list(runs.values())}))
    rows = [line.split(" | ")[2] for line in relief.report(path).splitlines()[2:]]
    assert rows == list(relief.METHODS.values())


def test_every_job_of_the_plan_can_run():
    jobs = list(relief.planned())
    for job in jobs:
        assert job["network"] in relief.NETWORKS and job["optimizer"] in relief.RATES
        if job["method"] in ("magnitude", "saliency"):
            assert job | {"method": "refit"} in jobs
        assert any(
            other["method"] == "dense" and all(
                other[key] == job[key] for key in ("network", "optimizer", "seed")
            )
            for other in jobs
        )  # fmt: skip
