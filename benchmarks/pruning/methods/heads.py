"""Baselines for language models that take whole groups of heads: like SlimGPT, and like FLAP.

Both cut a decoder whose blocks have `attention.q_proj` ... `o_proj` and a gated MLP, the heads that
share a key together, so that every block loses as many groups of heads and hidden units.

Sources: Ling et al. 2024 (arXiv 2412.18110), without its growing ratios; An et al. 2023 (arXiv
2312.11983), at equal widths of all blocks in place of its adaptive ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlscuda.closed_form.formulas import compensate
from rlscuda.closed_form.greedy import Consumer, greedy_path
from rlscuda.pruning import calibrate

# of inverse autocorrelation, weight and blocks of columns: the units that go, and the new weight
Choice = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass
class Part:
    """Attention or MLP of a block: what reads its units, and what makes them.

    Attributes:
        reader: Name of the layer that reads them.
        units: How many there are.
        makers: Names of the layers that make them.
        attention: The module whose `keys` counts them; None of an MLP.
    """

    reader: str
    units: int
    makers: Sequence[str]
    attention: Any = None


def parts_of(model: Any, number: int) -> dict[str, Part]:
    """The attention and the MLP of a block."""
    at, block = f"blocks.{number}.", model.blocks[number]
    heads = [f"{at}attention.{name}_proj" for name in "qkv"]
    return {
        "heads": Part(f"{at}attention.o_proj", block.attention.keys, heads, block.attention),
        "mlp": Part(
            f"{at}down_proj", block.down_proj.in_features, [f"{at}gate_proj", f"{at}up_proj"]
        ),
    }


@torch.no_grad()
def slim(model: Any, loader: list[Tensor], counts: dict[str, int]) -> None:
    """Layer by layer by the optimal brain surgeon, each calibrated on what the cut ones give.

    Args:
        model: The decoder, which is changed.
        loader: Batches of codes.
        counts: How many groups of `heads` and units of the `mlp` each block loses.
    """

    def choose(P: Tensor, W: Tensor, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        gone = greedy_path([Consumer(P, W, blocks, 1.0)], len(blocks)).order[:count]
        return gone, compensate(P, W, blocks[gone].flatten())

    for number in range(len(model.blocks)):
        for kind, part in parts_of(model, number).items():
            P = calibrate(model, loader, [part.reader])[part.reader][0]
            _cut(model, part, P, counts[kind], choose)


@torch.no_grad()
def flap(model: Any, loader: list[Tensor], counts: dict[str, int]) -> None:
    """By the variance of inputs times the squared norm of their weights; biases take the means.

    Args:
        model: The decoder, which is changed; layers that read what is cut get a bias.
        loader: Batches of codes.
        counts: As of `slim`.
    """

    def choose(P: Tensor, W: Tensor, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        A = torch.linalg.inv(P)
        mean = A[-1, :-1] / A[-1, -1]
        fluctuation = (A.diagonal()[:-1] - mean.square()) * W[:, :-1].square().sum(0)
        gone = fluctuation[blocks].mean(1).argsort(stable=True)[:count]
        columns, W = blocks[gone].flatten(), W.clone()
        W[:, -1] += W[:, columns] @ mean[columns]
        return gone, W

    parts = [parts_of(model, number) for number in range(len(model.blocks))]
    for part in (part for both in parts for part in both.values()):
        reader = model.get_submodule(part.reader)
        reader.bias = nn.Parameter(reader.weight.new_zeros(reader.out_features))
    matrices = calibrate(model, loader, [part.reader for both in parts for part in both.values()])
    for both in parts:
        for kind, part in both.items():
            _cut(model, part, matrices[part.reader][0], counts[kind], choose)


def _cut(model: nn.Module, part: Part, P: Tensor, count: int, choose: Choice) -> None:
    """Remove units of a part from all its layers."""
    reader: Any = model.get_submodule(part.reader)
    W = reader.weight.double()
    blocks = torch.arange(W.shape[1]).view(part.units, -1)
    if reader.bias is not None:
        W = torch.cat([W, reader.bias.double()[:, None]], 1)
    gone, W = choose(P, W, blocks, count)
    kept = torch.ones(part.units, dtype=torch.bool).index_fill_(0, gone, False)
    reader.weight = nn.Parameter(W[:, blocks[kept].flatten()].float())
    reader.in_features = reader.weight.shape[1]
    if reader.bias is not None:
        reader.bias = nn.Parameter(W[:, -1].float())
    for name in part.makers:
        maker: Any = model.get_submodule(name)
        rows = maker.weight.unflatten(0, (part.units, -1))[kept].flatten(0, 1)
        maker.weight, maker.out_features = nn.Parameter(rows.clone()), len(rows)
    if part.attention is not None:
        part.attention.keys -= count
