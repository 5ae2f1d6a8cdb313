"""The tables of the README's first page: what the committed results say, in a few rows.

Each figure is read from the results that a benchmark has written; nothing is run here.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import shapes
from benchmarks.learning import report as learning
from benchmarks.learning.optimizers import ROWS
from benchmarks.learning.tasks import TASKS
from benchmarks.pruning import adaptive, plots
from benchmarks.pruning.methods.channels import BASELINES, METHODS
from rlscuda.studies.report import Study, signed

TASKS_SHOWN = ("gpt", "vit", "cifar_cnn")
CUTS_SHOWN = (("lenet5", 0.7), ("resnet20", 0.5))  # networks of `pruning`, and channels gone
SHARE, THIS = 0.5, "ours"  # of the language model's parameters; our pruner among its methods
QUARTER = "3/4 of head dimensions and MLPs"
Row = tuple[str, str, str, str]


def headline(results: Path) -> list[Row]:
    """What, ours, the usual baseline, and the best of all others.

    Args:
        results: The folder of result files.
    """
    head = ("", "rlscuda", "usual", "best other")
    return [head, *_trained(results), *_pruned(results), *_transformers(results), *_times(results)]


def _trained(results: Path) -> Iterable[Row]:
    found = learning.Results(_runs(results, "quality"))
    for task in TASKS_SHOWN:
        cells = {row: found.cell("steps", task, row) for row in found.peers}
        known = {row: cell for row, cell in cells.items() if cell is not None}
        usual = known.pop(learning.BASELINE)
        best = max(known, key=lambda row: known[row].merit)
        ours = found.cell("steps", task, learning.OURS)
        yield (
            f"{TASKS[task].title}, {TASKS[task].objective.metric}", f"**{ours}**",
            f"{usual} ({ROWS[learning.BASELINE].title})",
            f"{known[best]} ({ROWS[best].title})",
        )  # fmt: skip
    long = {r["optimizer"]: r["test"] for r in _runs(results, "long_runs") if r["task"] != "gpt"}
    ours, usual = long.pop(learning.OURS), long.pop(learning.BASELINE)
    best = max(long, key=lambda row: long[row])
    yield (
        "ResNet-20, CIFAR-10, 30 epochs, accuracy %, one seed", f"{ours:.1f}",
        f"{usual:.1f} ({ROWS[learning.BASELINE].title})", f"{long[best]:.1f} ({ROWS[best].title})",
    )  # fmt: skip


def _pruned(results: Path) -> Iterable[Row]:
    runs = plots.grouped(results / "pruning.json")
    for case, ratio in CUTS_SHOWN:
        found = {m: plots.accuracy(runs, (case, ratio, m, None)) for m in METHODS}
        others = {m: found[m] or 0.0 for m in BASELINES if m != "l2"}
        best = max(others, key=others.__getitem__)
        whole = plots.accuracy(runs, (case, 0.0, "whole", None))
        yield (
            f"{plots.CASES[case].title} without {ratio:.0%} of its channels, of {whole:.1f} %",
            f"**{found['in_turn']:.1f}**", f"{found['l2']:.1f} ({METHODS['l2'].title})",
            f"{others[best]:.1f} ({METHODS[best].title})",
        )  # fmt: skip


def _transformers(results: Path) -> Iterable[Row]:
    runs = _runs(results, "transformers")
    cases: tuple[tuple[str, str, Any, Callable], ...] = (
        ("vit", "ViT without 3/4 of its head dimensions and MLPs, of {:.1f} %", QUARTER, max),
        ("llama", "small Llama without half of its parameters, nats, of {:.3f}", SHARE, min),
    )  # fmt: skip
    for network, title, cut, better in cases:
        digits = 1 if network == "vit" else 3
        own: dict[str, list[float]] = {}
        for run in runs:
            if run["network"] == network and run["cut"] in (cut, None):
                own.setdefault(run["method"], []).append(run["test"])
        means = {method: statistics.fmean(values) for method, values in own.items()}
        whole, ours = means.pop("whole"), means.pop(THIS)
        usual = means.pop("magnitude (L2)")
        others = {m: value for m, value in means.items() if not m.startswith(THIS)}
        best = better(others, key=others.__getitem__)
        yield (
            title.format(whole), f"**{ours:.{digits}f}**", f"{usual:.{digits}f} (magnitude)",
            f"{others[best]:.{digits}f} ({best})",
        )  # fmt: skip


def _times(results: Path) -> Iterable[Row]:
    document = _read(results, "training_step")
    pair = "RLS spectral / " + shapes.BASELINE
    ratios = [f"{case['ratios'][pair]['median']:.2f}" for case in document["cases"]]
    titles = ", ".join(case["case"].split(",")[0] for case in document["cases"])
    yield f"time of a training step: {titles}", ", ".join(ratios), "1 (fused Adam)", ""


def _runs(results: Path, name: str) -> list[dict]:
    return _read(results, name)["runs"]


def _read(results: Path, name: str) -> dict:
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


def systems(results: Path) -> list[Row]:
    """Five published systems: what they are, how to run them, what they gave, their limits.

    Args:
        results: The folder of result files.
    """
    runs = plots.grouped(results / "pruning.json")
    ours, l2 = (plots.accuracy(runs, ("lenet5", 0.7, m, None)) for m in ("in_turn", "l2"))
    whole = plots.accuracy(runs, ("lenet5", 0.0, "whole", None))
    return [
        ("system", "how to run it", "what it gave", "limits"),
        (
            "RLS training and pruning (Zhang et al. 2021, Yu et al. 2022)", "`make demo`",
            f"LeNet-5 with 30 % of its channels, untrained since: {ours:.1f} % (L2 magnitude "
            f"{l2:.1f}, whole {whole:.1f})", "`P` costs n² floats a layer",
        ),
        (
            "neural relief, in the spirit of Dekhovich et al. 2024",
            "`python -m benchmarks.pruning.relief`",
            _relief(results),
            "ranks no better than magnitude",
        ),
        (
            "layer gates, in the spirit of Guenter and Sideris 2024",
            "`rlscuda train --gates 0.03`", _gates(results),
            "one more forward a step while gates learn",
        ),
        (
            "adaptive channels and layers, in the spirit of Zhang et al. 2019",
            "`rlscuda train --prune-adaptive 0.5`", _adaptive(results),
            "small networks",
        ),
        (
            "pre-training study, after Hubens et al. 2020", "`rlscuda study pretraining`",
            _pretraining(results), "channels alone",
        ),
    ]  # fmt: skip


def _relief(results: Path) -> str:
    runs = [
        run for run in _runs(results, "relief")
        if (run["network"], run["optimizer"], run["method"]) == ("lenet5", "adam", "refit")
    ]  # fmt: skip
    least: dict[int, float] = {}  # of each seed
    for run in runs:
        for one in run["rounds"]:
            if one["validation"] >= run["whole"]["validation"]:
                least[run["seed"]] = min(one["left"], least.get(run["seed"], one["left"]))
    return (f"LeNet-5, Adam: {statistics.fmean(least.values()):.1f} % of the connections do as "
            "well as all before")  # fmt: skip


def _gates(results: Path) -> str:
    runs = [run for run in _runs(results, "gates") if run["network"] == "resnet20"]
    gated = [r["points"][0] for r in runs if (r["way"], r.get("price")) == ("gates", 0.06)]
    whole = [r["points"][0]["test"] for r in runs if r["way"] == "deleted, then trained"]
    flops = statistics.fmean(point["flops"] for point in gated)
    test = statistics.fmean(point["test"] for point in gated)
    return (f"ResNet-20 with {flops:.0%} of its FLOPs: {test:.1f} %, whole "
            f"{statistics.fmean(whole):.1f}")  # fmt: skip


def _adaptive(results: Path) -> str:
    runs = [r for r in _runs(results, "adaptive") if r["seed"] in adaptive.HELD_OUT]
    parts = []
    for network, title in (("resnet20", "ResNet-20"), ("vgg", "VGG")):
        whole = {
            r["seed"]: r["test"] for r in runs if (r["network"], r["method"]) == (network, "whole")
        }
        method = "output" if network == "resnet20" else "output-channels"  # a VGG has no branches
        own = [r for r in runs if (r["network"], r["method"]) == (network, method)]
        left = statistics.fmean(r["left"][-1] for r in own)
        gap = statistics.fmean(r["test"] - whole[r["seed"]] for r in own)
        parts.append(f"{title} with {left:.0%} of its parameters: {gap:+.1f} point")
    return "; ".join(parts)


def _pretraining(results: Path) -> str:
    run = next(r for r in _runs(results, "pretraining") if r["network"] == "lenet5")
    rows = {
        row.rule: signed(row.area_gain, 2)
        for row in Study.from_dict(run["study"]).rows if row.fairness == "epochs"
    }  # fmt: skip
    return (f"LeNet-5, area under accuracy, pre-trained less from scratch: {rows['l1']} by l1, "
            f"{rows['saliency+']} with compensation")  # fmt: skip
