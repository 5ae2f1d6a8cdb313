"""Neural network relief in rounds: how few connections keep the accuracy, and what else would.

LeNet-300-100 and LeNet-5 (Caffe's) learn MNIST for two epochs; then eight rounds prune and train
for two epochs each, with cosine decay. `rewind` trains from the initial weights again, as the paper
does for LeNets; all others go on from what pruning left. `magnitude` and `saliency` remove as many
weights of every layer in every round as `refit` did with the same seed, so that rows compare at
equal counts. `dense` trains as long as they do and prunes nothing.

The last two columns of the table are the least share of connections at which validation images are
read as well as by the network that was first pruned, after its two epochs, and as well as by the
one that has trained as long without pruning, which is the harder: it has not converged before.

    python -m benchmarks.pruning.relief --workers 1  # run, or go on after an interruption
    python -m benchmarks.pruning.relief --report     # the table of the results
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rlscuda
from benchmarks.common import data, grid
from benchmarks.common.training import BATCH, Run, accuracy
from rlscuda import zoo
from rlscuda.closed_form.single_weights import refit
from rlscuda.pruning import calibrate, prune_relief, prune_weights
from rlscuda.pruning.masks.layers import mask_layer, write_mask

SEEDS, ROUNDS, EPOCHS = (0, 1, 2), 8, 2
SCORED, CALIBRATED = 1000, 2000  # training images for signals, and for matrices
PARTS = ("validation", "test")
TITLES = {"lenet300": "LeNet-300-100", "lenet5": "LeNet-5"}
METHODS = {
    "dense": "no pruning",
    "rewind": "relief, rewound",
    "relief": "relief",
    "refit": "relief + refit",
    "magnitude": "magnitude + refit",
    "saliency": "`prune_weights`",
}
RATES = {"adam": 1e-3, "sgd": 0.05, "rls": None}  # None: the optimizer's own
ALPHAS = ((0.95, 0.9), (0.85, 0.8))  # of linear layers, of convolutions


def lenet5() -> nn.Module:
    """LeNet-5 as Caffe has it: 20 and 50 filters of 5 x 5 without padding, 500 units."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet300": lambda: zoo.mlp(data.SHAPES["mnist"], data.CLASSES),
    "lenet5": lenet5,
}


class Rounds:
    """The training of one job, round after round.

    Args:
        job: Network, optimizer, seed, method and alpha.
        split: Training images.
    """

    def __init__(self, job: dict, split: data.Split):
        torch.manual_seed(job["seed"])
        self.job, self.split = job, split
        self.model = NETWORKS[job["network"]]()
        self.initial = {p: p.detach().clone() for p in self.model.parameters()}
        self.optimizer = self._optimizer()
        self.blank = copy.deepcopy(self.optimizer.state_dict())
        self.layers = [
            name for name, m in self.model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
        ]
        self.round = 0

    def _optimizer(self) -> torch.optim.Optimizer:
        name, parameters = self.job["optimizer"], self.model.parameters()
        if name == "rls":
            return rlscuda.RLSOptimizer(self.model, seed=self.job["seed"])
        if name == "sgd":
            return torch.optim.SGD(parameters, RATES[name], momentum=0.9, weight_decay=5e-4)
        return torch.optim.Adam(parameters, RATES[name], weight_decay=5e-4)

    def train(self) -> None:
        """Train for the epochs of a round, with a schedule of its own."""
        for group, blank in zip(self.optimizer.param_groups, self.blank["param_groups"]):
            group["lr"] = group["initial_lr"] = blank["lr"]
        seed = 100 * self.job["seed"] + self.round
        count, plain = len(self.split.y), torch.contiguous_format
        run = Run(self.model, self.optimizer, EPOCHS, count, seed, plain)
        for _ in range(EPOCHS):
            run.train_epoch(self.split)
        self.round += 1

    def rewind(self) -> None:
        """Return to the weights and the optimizer of the beginning; the masks stay."""
        with torch.no_grad():
            for parameter, value in self.initial.items():
                parameter.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(self.blank))

    def prune(self, counts: list[int] | None) -> None:
        """Prune once; `counts` are the weights to keep of each layer where another run says so."""
        method = self.job["method"]
        needs_matrices = method in ("refit", "magnitude", "saliency")
        images = list(self.split.x[:CALIBRATED].split(500))
        matrices = calibrate(self.model, images) if needs_matrices else None
        if method in ("rewind", "relief", "refit"):
            alpha, alpha_conv = self.job["alpha"]
            prune_relief(
                self.model, self.split.x[:SCORED].split(500), alpha=alpha, alpha_conv=alpha_conv,
                matrices=matrices, optimizers=self.optimizer,
            )  # fmt: skip
        elif method != "dense":
            assert counts is not None and matrices is not None
            for name, count in zip(self.layers, counts):
                _keep(self.model, name, count, matrices, self.optimizer, method)
        if method == "rewind":
            self.rewind()
        elif isinstance(self.optimizer, rlscuda.RLSOptimizer):
            self.optimizer.restart()

    def kept(self) -> list[int]:
        """Weights that are not masked, by layer."""
        modules = [self.model.get_submodule(name) for name in self.layers]
        return [int(getattr(m, "weight_mask", torch.ones_like(m.weight)).sum()) for m in modules]

    def left(self) -> float:
        """Percentage of weights and biases that are not masked."""
        everything = sum(p.numel() for p in self.initial)
        masked = sum(int((b == 0).sum()) for n, b in self.model.named_buffers() if "_mask" in n)
        return 100 * (1 - masked / everything)


def _keep(
    model: nn.Module,
    name: str,
    count: int,
    matrices: dict[str, Tensor],
    optimizer: Any,
    method: str,
) -> None:
    """Keep so many weights of a layer, by saliency or by size, and refit them."""
    layer = mask_layer(model, name, matrices)
    total = layer.weight.numel()
    if count == int(layer.kept()[:, : layer.columns].sum()):
        return
    if method == "saliency":
        prune_weights(
            model, matrices, sparsity=1 - count / total, layers=[name], optimizer=optimizer
        )
        return
    W = layer.rows()
    keep, n = torch.ones_like(W, dtype=torch.bool), layer.columns
    strongest = W[:, :n].abs().flatten().topk(count).indices
    keep[:, :n] = torch.zeros(total, dtype=torch.bool).index_fill_(0, strongest, True).view(-1, n)
    assert layer.P is not None
    rows, _ = refit(layer.P[0], W, keep)
    write_mask(layer, keep, rows, layer.moments(optimizer), permanent=False)


def measure(job: dict, args: argparse.Namespace) -> dict:
    """Run one job: train, then prune and train in rounds."""
    splits = data.load("mnist", args.data_dir)
    counts = None
    if job["method"] in ("magnitude", "saliency"):
        counts = [
            r["kept"] for r in grid.finish(job | {"method": "refit"}, args, measure)["rounds"]
        ]
    start = time.perf_counter()
    rounds, found = Rounds(job, splits["train"]), []

    def read() -> dict[str, float]:
        return {part: accuracy(rounds.model, splits[part]) for part in PARTS}

    rounds.train()
    whole = read()
    for number in range(ROUNDS):
        rounds.prune(None if counts is None else counts[number])
        pruned = read()
        rounds.train()
        found.append(
            {"left": round(rounds.left(), 3), "kept": rounds.kept(), "pruned": pruned} | read()
        )
    seconds = round(time.perf_counter() - start, 1)
    return job | {"whole": whole, "rounds": found, "seconds": seconds}


def run_job(job: dict, args: argparse.Namespace) -> str:
    """Run one job and say what came out."""
    record = grid.finish(job, args, measure)
    last = record["rounds"][-1]
    name = " ".join(str(value) for value in job.values())
    return f"{name}: {last['left']:.1f} % left, {last['test']:.2f} in {record['seconds']} s"


def planned() -> Iterator[dict]:
    """All jobs."""
    usual, lower = ALPHAS
    fitted = ("dense", "rewind", "refit", "magnitude")
    plan = [("lenet300", o, m, usual, SEEDS) for o in ("adam", "sgd") for m in (*fitted, "relief")]
    plan += [("lenet300", "adam", m, lower, SEEDS) for m in fitted[1:]]
    plan += [("lenet300", "sgd", m, lower, SEEDS) for m in ("refit", "magnitude")]
    plan += [("lenet300", "rls", m, usual, SEEDS) for m in fitted]
    plan += [("lenet300", "adam", "saliency", usual, SEEDS)]
    plan += [("lenet5", "adam", m, usual, SEEDS) for m in fitted]
    plan += [("lenet5", "adam", m, lower, SEEDS) for m in ("refit", "magnitude")]
    plan += [
        ("lenet5", o, m, usual, SEEDS) for o in ("sgd", "rls") for m in fitted if m != "rewind"
    ]
    for network, optimizer, method, alpha, seeds in plan:
        for seed in seeds:
            yield {
                "network": network, "optimizer": optimizer, "seed": seed, "method": method,
                "alpha": list(alpha),
            }  # fmt: skip


def report(path: Path) -> str:
    """The table of a results file, in Markdown."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    dense = {
        (r["network"], r["optimizer"], r["seed"]): r for r in runs if r["method"] == "dense"
    }  # fmt: skip
    lines = [
        "| network | trained by | method | α fc / conv | seeds | left % | masked, untrained "
        "| validation | test | least % left, as good as before | as dense by then |",
        "|" + "---|" * 11,
    ]
    order = [list(NETWORKS), list(RATES), list(METHODS)]

    def place(names: tuple) -> tuple:
        return *(one.index(name) for one, name in zip(order, names)), [-a for a in names[3]]

    for names in sorted({_row(r) for r in runs}, key=place):
        own = [r for r in runs if _row(r) == names]
        network, optimizer, method, alpha = names
        last = [r["rounds"][-1] for r in own]
        pairs = [(r, dense[network, optimizer, r["seed"]]) for r in own]
        before = [_least(r, [r["whole"]] * ROUNDS) for r in own]
        then = [_least(r, whole["rounds"]) for r, whole in pairs]
        cells = [
            TITLES[network], optimizer, METHODS[method],
            "" if method == "dense" else f"{alpha[0]:g} / {alpha[1]:g}", str(len(own)),
            _mean([r["left"] for r in last], 1),
            _mean([r["pruned"]["validation"] for r in last], 2),
            _mean([r["validation"] for r in last], 2), _mean([r["test"] for r in last], 2),
            *(["", ""] if method == "dense" else [_reached(before), _reached(then)]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(run: dict) -> tuple:
    return run["network"], run["optimizer"], run["method"], tuple(run["alpha"])


def _least(run: dict, references: list[dict]) -> float | None:
    """The least percentage left at which validation images are read as well as by a reference."""
    kept = [
        now["left"]
        for now, whole in zip(run["rounds"], references)
        if now["validation"] >= whole["validation"]
    ]
    return min(kept, default=None)


def _reached(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "none"
    share = "" if len(found) == len(values) else f" ({len(found)} of {len(values)} seeds)"
    return _mean(found, 1) + share


def _mean(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    """Run the benchmark, then print its table."""
    args = grid.parser(__doc__, "relief").parse_args()
    if not args.report:
        constants = data.COUNTS | {
            "batch": BATCH,
            "epochs_per_round": EPOCHS,
            "scored_images": SCORED,
            "calibration_images": CALIBRATED,
            "rates": RATES,
        }
        grid.run(run_job, planned(), args, constants)
    print(report(args.results))


if __name__ == "__main__":
    main()
