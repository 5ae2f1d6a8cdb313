"""Transformers pruned in one shot, nothing trained since: a ViT, and a language model after Llama.

The ViT learns 40,000 images of CIFAR-10 for five epochs. It loses half or three quarters of the
dimensions of its heads and of its MLPs; or half of its heads as a whole; or a quarter of its
embedding. The language model, with RMSNorm, rotary positions, heads that share keys and SwiGLU,
learns to continue text, and loses a share of its parameters. Every method sees the same 512
training images or windows of text. What `RLSPruner` cuts by different importances has equal widths;
those like SlimGPT and FLAP take groups of heads and hidden units until as many parameters are gone.

    python -m benchmarks.pruning.transformers --workers 1  # run, or go on after an interruption
    python -m benchmarks.pruning.transformers --report     # the tables of the results
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.common import data, grid
from benchmarks.common.data import CLASSES, SHAPES
from benchmarks.common.training import accuracy
from benchmarks.learning import sources
from benchmarks.learning.networks import Attention, Block
from benchmarks.learning.report import markdown
from benchmarks.pruning.methods import heads
from rlscuda.files.archives import load_archive, save_archive
from rlscuda.files.atomic import write_atomically
from rlscuda.pruning import RLSPruner
from rlscuda.pruning.running.measure import count_parameters

SEEDS = (0, 1, 2)
IMAGES = (40_000, 5_000, 5_000)  # training, validation and test images
EPOCHS, BATCH = 5, 128  # of the ViT
STEPS, WINDOWS = 1_500, 16  # of the language model, and the windows of a step
RATE, CALIBRATED = 2e-3, 512
PARTS = ("*.attention.query", "*.attention.value", "*.up")
HALF, QUARTER = "half of head dimensions and MLPs", "3/4 of head dimensions and MLPs"
CUTS: dict[str, dict[str, Any]] = {  # of the ViT
    HALF: {"ratio": dict.fromkeys(PARTS, 0.5)},
    QUARTER: {"ratio": dict.fromkeys(PARTS, 0.75)},
    "half of heads and of MLPs": {"ratio": {PARTS[0]: 0.5, PARTS[-1]: 0.5}, "heads": True},
    "1/4 of the embedding": {"ratio": {"stem.6": 0.25}},
}
SHARES = (0.2, 0.5)  # of the parameters of the language model, gone
OPTIONS: dict[str, dict[str, Any]] = {  # of `RLSPruner`
    "ours": {},
    "ours, in turn": {"compensate": "in turn"},
    "magnitude (L2)": {"importance": "l2", "compensate": False},
    "Taylor": {"importance": "taylor", "compensate": False},
    "random": {"importance": "random", "compensate": False},
}
GROUP = "torch-pruning, group magnitude"
HEADS = {"like SlimGPT": heads.slim, "like FLAP": heads.flap}
METHODS = {"vit": (*OPTIONS, GROUP), "llama": (*OPTIONS, *HEADS)}


class VisionTransformer(nn.Module):
    """A ViT whose tokens three convolutions make: 16 of an image of 32 x 32 pixels.

    Source of the stem: Xiao et al. 2021, Early convolutions help transformers see better.
    """

    def __init__(self, width: int = 96, heads: int = 4, depth: int = 6):
        super().__init__()
        channels = (SHAPES["cifar10"].channels, 32, 64, width)
        parts: list[nn.Module] = []
        for inputs, outputs in zip(channels, channels[1:]):
            parts += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.stem = nn.Sequential(*parts[:-2])
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [N, 3, 32, 32] to logits [N, classes]."""
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class RMSNorm(nn.Module):
    """Features scaled by the root of their mean square, as Llama writes it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., width] to the same shape."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def _rotated(x: Tensor) -> Tensor:
    """Half of a head's dimensions in place of the other."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions, in which several queries share a key."""

    def __init__(self, width: int, heads: int, keys: int):
        super().__init__()
        self.keys, self.shared = keys, heads // keys
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width // self.shared, bias=False)
        self.v_proj = nn.Linear(width, width // self.shared, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps [N, T, width] to the same shape; `cos` and `sin` are [T, head_dim]."""
        q = self.q_proj(x).unflatten(-1, (self.keys * self.shared, -1)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.keys, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.keys, -1)).transpose(1, 2)
        q, k = (part * cos + _rotated(part) * sin for part in (q, k))
        k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LlamaBlock(nn.Module):
    """Attention and a SwiGLU MLP, each after an RMSNorm."""

    def __init__(self, width: int, heads: int, keys: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention = GroupedAttention(width, heads, keys)
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps [N, T, width] to the same shape."""
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """A decoder of characters after Llama: 1.0 M parameters."""

    def __init__(self, width: int = 128, heads: int = 8, keys: int = 4, hidden=384, depth=5):
        super().__init__()
        self.tokens = nn.Embedding(sources.CODES, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        blocks = (LlamaBlock(width, heads, keys, hidden) for _ in range(depth))
        self.blocks, self.norm = nn.ModuleList(blocks), RMSNorm(width)
        self.head = nn.Linear(width, sources.CODES, bias=False)
        size = width // heads
        speeds = 10_000 ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(sources.WINDOW)[:, None] * speeds.repeat(2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps codes [N, T] to logits [N, T, vocabulary]."""
        y = self.tokens(x)
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for block in self.blocks:
            y = block(y, cos, sin)
        return self.head(self.norm(y))


NETWORKS = {"vit": VisionTransformer, "llama": Llama}


def loss_of(model: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    """Mean cross-entropy of the classes, or of the next characters."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), **options)


def splits_of(network: str, folder: Path) -> dict[str, data.Split]:
    """What a network learns from, and is judged on."""
    if network == "vit":
        return data.load("cifar10", folder, *IMAGES)
    return sources.documentation(folder)


def trained(network: str, seed: int, split: data.Split, folder: Path) -> nn.Module:
    """The network of a seed, kept on disk once it is trained."""
    torch.manual_seed(seed)
    model, path = NETWORKS[network](), folder / f"transformers-{network}-{seed}.pt"
    if path.is_file():
        with open(path, "rb") as stream:
            model.load_state_dict(load_archive(stream))
        return model.eval()
    images = network == "vit"
    size, steps = (BATCH, EPOCHS * len(split.y) // BATCH) if images else (WINDOWS, STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = OneCycleLR(optimizer, RATE, steps, pct_start=0.15)
    batches = sources.batches(split, size, seed, augment=images)
    for _ in range(steps):
        loss = loss_of(model, *next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(save_archive, model.state_dict()))
    return model.eval()


@torch.no_grad()
def quality(network: str, model: nn.Module, split: data.Split) -> float:
    """Percentage of images labelled correctly, or nats a character."""
    if network == "vit":
        return accuracy(model, split)
    pairs = zip(split.x.split(100), split.y.split(100), strict=True)
    total = sum(float(loss_of(model.eval(), x, y, reduction="sum")) for x, y in pairs)
    return total / split.y.numel()


def prune(job: dict[str, Any], model: nn.Module, split: data.Split) -> None:
    """Prune a network in the way of a job."""
    network, method, cut = job["network"], job["method"], job["cut"]
    stride = 1 if network == "vit" else len(split.y) // CALIBRATED
    x, y = (part[::stride][:CALIBRATED] for part in (split.x, split.y))
    if method == GROUP:
        by_torch_pruning(model, x[:1], CUTS[cut]["ratio"][PARTS[0]])
    elif method in HEADS:
        HEADS[method](model, list(x.split(64)), counts_of(model, cut))
    else:
        options = OPTIONS[method]
        if options.get("importance") == "taylor":
            loss_of(model, x, y).backward()
        target = CUTS[cut] if network == "vit" else widths_of(model, cut)
        RLSPruner(
            model, None, x[:2], source="calibration", loader=list(x.split(64)), seed=job["seed"],
            **target, **options,
        ).step()  # fmt: skip


def by_torch_pruning(model: nn.Module, example: Tensor, share: float) -> None:
    """A share of the dimensions of heads and of the MLPs gone, by the norms of their groups.

    The division of logits by the root of fewer dimensions is made up for.
    """
    import torch_pruning

    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    cut: list[nn.Module] = [m.up for m in model.modules() if isinstance(m, Block)]
    cut += [part for m in attentions for part in (m.query, m.key, m.value)]
    torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(cut, share),
        num_heads={part: m.heads for m in attentions for part in (m.query, m.key, m.value)},
        ignored_layers=[
            m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) if m not in cut
        ],
    ).step()
    for one in attentions:
        for parameter in one.query.parameters():
            parameter.data *= math.sqrt(1 - share)


def widths_of(model: Any, share: float) -> dict[str, Any]:
    """The least ratio of values and hidden units that takes a share of all parameters.

    Rotary frequencies stay: all heads of all blocks have only eight, together.
    """
    block, wanted = model.blocks[0], share * count_parameters(model) / len(model.blocks)
    attention, hidden = block.attention, block.down_proj.in_features
    size = attention.v_proj.out_features // attention.keys
    value = (attention.v_proj.weight.numel() + attention.o_proj.weight.numel()) // size
    for ratio in (count / hidden for count in range(hidden)):
        gone = 3 * block.down_proj.out_features * round(ratio * hidden) + value * int(ratio * size)
        if gone >= wanted:
            return {"ratio": dict.fromkeys(("*.v_proj", "*.gate_proj"), ratio)}
    raise ValueError(f"share must leave something of each block, got {share}")


def counts_of(model: Any, share: float) -> dict[str, int]:
    """Groups of heads and hidden units that each block loses for a share of all parameters."""
    block, depth = model.blocks[0], len(model.blocks)
    heads = round(share * block.attention.keys)
    group = count_parameters(block.attention) / block.attention.keys
    rest = share * count_parameters(model) / depth - heads * group
    return {"heads": heads, "mlp": math.ceil(rest / (3 * block.down_proj.out_features))}


def measure(job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Prune the network of a seed, and read what it is worth then."""
    splits, start = splits_of(job["network"], args.data_dir), time.perf_counter()
    model = trained(job["network"], job["seed"], splits["train"], args.journal.parent)
    if job["method"] != "whole":
        start = time.perf_counter()
        prune(job, model, splits["train"])
    seconds = round(time.perf_counter() - start, 1)
    test = quality(job["network"], model, splits["test"])
    return job | {"test": test, "parameters": count_parameters(model), "seconds": seconds}


def run_job(job: dict[str, Any], args: argparse.Namespace) -> str:
    """Run one job and say what came out."""
    record = grid.finish(job, args, measure)
    return f"{list(job.values())}: {record['test']:.3f} in {record['seconds']} s"


def planned(networks: list[str], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """All jobs, seed by seed."""
    for network in networks:
        for seed in seeds:
            job = {"network": network, "seed": seed}
            yield job | {"cut": None, "method": "whole"}
            for cut in CUTS if network == "vit" else SHARES:
                for method in METHODS[network]:
                    if method != GROUP or cut in (HALF, QUARTER):
                        yield job | {"cut": cut, "method": method}


def report(results: Path) -> str:
    """One table a network, of the means over seeds."""
    runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
    titles = {
        "vit": "ViT, CIFAR-10: accuracy in %",
        "llama": "language model: nats a character",
    }
    tables = [_table(title, [r for r in runs if r["network"] == n]) for n, title in titles.items()]
    return "\n".join(table for table in tables if table)


def _table(title: str, runs: list[dict[str, Any]]) -> str:
    """One line a method, one column a cut; '' where there are no runs."""
    cuts = list(dict.fromkeys(run["cut"] for run in runs))
    titles = [c if isinstance(c, str) else f"{c:.0%} of parameters gone" for c in cuts[1:]]
    lines = [[title, "whole", *titles]]
    known = {run["method"] for run in runs}
    for method in (m for m in ("whole", *OPTIONS, GROUP, *HEADS) if m in known):
        own = [[r for r in runs if (r["method"], r["cut"]) == (method, cut)] for cut in cuts]
        lines.append([method, *(_cell(group) for group in own)])
    left = ["parameters left"]
    for cut in cuts:
        left.append(f"{statistics.fmean(r['parameters'] for r in runs if r['cut'] == cut):,.0f}")
    return markdown([*lines, left]) if runs else ""


def _cell(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation."""
    values = [run["test"] for run in runs]
    if not values:
        return ""
    digits = 1 if runs[0]["network"] == "vit" else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def main() -> None:
    """Run the benchmark, then print its tables."""
    parser = grid.parser(__doc__, "transformers")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    if not args.report:
        constants = {
            "images": IMAGES, "epochs": EPOCHS, "batch": BATCH, "steps": STEPS, "windows": WINDOWS,
            "rate": RATE, "calibrated": CALIBRATED,
        }  # fmt: skip
        jobs = list(planned(args.networks, args.seeds))
        grid.run(run_job, jobs, args, constants, {"torch_pruning": version("torch-pruning")})
    print(report(args.results))


if __name__ == "__main__":
    main()
