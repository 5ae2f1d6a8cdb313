"""Calls the operators of every case and writes down what each launches; see `launches`.

    python benchmarks/static_gpu/calls.py LAUNCHES

It runs in the build of tests/cuda_on_cpu, where the launchers are the CUDA ones, every tensor
counts as one on a device and a launch is written to the file LAUNCHES instead of being executed. So
grids, blocks and shared memory are those of the host code, and none is written down a second time.
Prints JSON: for each case its calls, with the sizes of their tensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import shapes
from benchmarks.common.shapes import PatchCase, TrainingCase, UpdateCase
from benchmarks.operators import bench_patch_cuda
from rlscuda import HeldMatrix, RLSFilterBank, RLSOptimizer, functional, zoo
from rlscuda.optim.layers import Layer
from rlscuda.optim.steps import spectral

SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
HELD = (1024, 2048, 4096, 8192)
RANKED = (128, 512, 1024, 2048, 4096)
ROOTS = ((1, 64), (28, 64), (1_000, 64), (50, 16))  # blocks, m
FILTERS = ((10_000, 10), (1_000, 64))  # filters, n
FORMS: dict[str, dict[str, Any]] = {
    "spectral": {},
    "adaptive": {"form": "adaptive"},
    "paper, mean": {"form": "paper"},
    "paper, sketch": {"form": "paper", "summary": "sketch"},
}


class Recorder(TorchDispatchMode):
    """Collects calls of our operators, with the sizes of their tensors and their launches."""

    def __init__(self, launches: Path):
        super().__init__()
        self.calls: list[dict] = []
        self._file = launches.open()

    def begin(self) -> None:
        """Forgets all that was called and launched before."""
        self._file.read()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs any operator; notes ours."""
        result = func(*args, **(kwargs or {}))
        if func.namespace == "rlscuda":
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args)) | (kwargs or {})
            sizes = {name: _sizes(value) for name, value in given.items()}
            launched = self._file.read().splitlines()
            if launched:
                op = func._schema.name.removeprefix("rlscuda::")
                self.calls.append({"op": op, "sizes": sizes, "launches": launched})
        return result


def _sizes(value: Any) -> Any:
    """Shape, strides and bytes of an element in place of a tensor."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "stride": list(value.stride()), "item": value.itemsize}
    if isinstance(value, (list, tuple)):
        return [_sizes(v) for v in value]
    return value


def _updates() -> Iterator[tuple[str, Callable[[], object]]]:
    cases = [*shapes.UPDATES, *(UpdateCase(n) for n in SIZES), UpdateCase(1001)]
    cases += [UpdateCase(n, rank=rank) for rank in (16, 64) for n in RANKED]
    cases += [UpdateCase(1024, rank=4), UpdateCase(64, batch=256)]
    for case in dict.fromkeys(cases):
        lead = (case.batch,) if case.batch else ()
        P = torch.empty(*lead, case.n, case.n)
        s = torch.empty(*lead, case.rank, case.n)
        yield f"update {case.name}", lambda P=P, s=s: functional.rls_update_(P, s)
    for n in HELD:
        matrix, s = HeldMatrix(torch.empty(n, n), hold=16, ridge=0), torch.empty(n)
        yield f"held n = {n}", lambda matrix=matrix, s=s: matrix.update(s)


def _patches() -> Iterator[tuple[str, Callable[[], object]]]:
    cases: list[PatchCase] = [*bench_patch_cuda.CASES, *shapes.PATCHES]
    for case in cases:
        x = torch.empty((*case.shape, 1, 1)[:4], dtype=case.dtype)
        x = x.to(memory_format=torch.channels_last) if case.channels_last else x
        args = {"kernel_size": case.kernel, "padding": case.padding}
        one, many = {"rank": 1, "seed": 1}, {"rank": 16, "seed": 1}
        yield f"mean {case.name}", lambda x=x, a=args: functional.patch_mean(x, **a)
        yield f"sketch {case.name}", lambda x=x, a=args | one: functional.patch_sketch(x, **a)
        yield (
            f"sketch {case.name}, r = 16",
            lambda x=x, a=args | many: functional.patch_sketch(x, **a),
        )
        yield (
            f"sample {case.name}, r = 16",
            lambda x=x, a=args | many: functional.patch_sample(x, **a),
        )


def _weights() -> Iterator[tuple[str, Callable[[], object]]]:
    step, adaptive = torch.ops.rlscuda.weight_step_, torch.ops.rlscuda.adaptive_weight_step_
    ahead = torch.ops.rlscuda.foreach_nesterov_
    complete = torch.ops.rlscuda.foreach_complete_products_
    for case in shapes.WEIGHTS:
        c, n = case.outputs, case.inputs
        W, b, D, G, M = (torch.ones(s) for s in ((c, n), c, (c, n + 1), (c, n), (c, n + 1)))
        row, g, v, h = torch.ones(n + 1), torch.ones(c), torch.ones(c), torch.tensor(1.5)
        common = (W, b, D)
        yield (
            f"weight {case.name}",
            lambda x=(*common, row, g, h, M): step(*x, 1e-3, 0.9, 0.01, True),
        )
        yield (
            f"weight {case.name}, adaptive",
            lambda x=(*common, G, row, g, h, M, v): adaptive(*x, 1e-3, 0.9, 0.99, 0.01, 1e-8, 5),
        )
        yield (
            f"complete {case.name}",
            lambda x=([D], [W], [b], [row], [g], [1]): complete(*x),
        )
        yield (
            f"momentum {case.name}",
            lambda x=([G], [g], [M], h, [0], [1], [c], 0.9): ahead(*x),
        )
        yield f"nonfinite {case.name}", lambda G=G: torch.ops.rlscuda.nonfinite([G])


def _roots() -> Iterator[tuple[str, Callable[[], object]]]:
    roots = torch.ops.rlscuda.foreach_spectral_root_
    numbers = [x for abc in spectral.COEFFICIENTS for x in abc]
    for blocks, m in ROOTS:
        gram, one = torch.ones(blocks, m, m), torch.ones(blocks)
        shape = [m], [m], [m], numbers, 1e-8
        yield (
            f"roots of {blocks}, {m} × {m}",
            lambda x=([gram], [one], [one], [one], *shape): roots(*x),
        )


def _banks() -> Iterator[tuple[str, Callable[[], object]]]:
    for filters, n in FILTERS:
        bank = RLSFilterBank(filters, n, 1, 0.99, ridge=0, dtype=torch.float32)
        x, y = torch.ones(filters, n), torch.ones(filters)
        yield f"bank of {filters:,}, n = {n}", lambda bank=bank, x=x, y=y: bank.update(x, y)


def _training_steps(
    case: TrainingCase, form: str, options: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """One with an update of `P`, one without, and one whose update stands for an interval."""
    torch.manual_seed(0)
    model = zoo.NETWORKS[case.model](case.shape, 10)
    optimizer = RLSOptimizer(model, lr=1e-3, **options)
    x, y = torch.randn(case.batch, *case.shape), torch.randint(10, (case.batch,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    name, (group,) = f"step {case.name}: {form}", optimizer.param_groups
    step()  # the first one makes the state
    yield name, step
    if group["interval"] > 1:
        group["gain"] = 1.0  # as low as it gets, from now on
        for _ in range(group["interval"] - 4):
            step()
        yield f"{name}, at rest", step
        yield f"{name}, of {group['interval']} steps", step


def main(launches: Path) -> None:
    """Prints the calls of every case."""
    launches.touch()
    Layer.factors_pay = lambda self, x, dtype: False  # as for tensors on a device
    spectral.ONE_CALL.clear()  # likewise
    recorder = Recorder(launches)
    cases = []

    def record(name: str, run: Callable[[], object]) -> None:
        recorder.begin()
        with recorder:
            run()
        cases.append({"case": name, "calls": recorder.calls})

    for make in (_updates, _patches, _weights, _roots, _banks):
        for name, run in make():
            record(name, run)
    for case in shapes.TRAININGS:
        for form, options in FORMS.items():
            for name, run in _training_steps(case, form, options):
                record(name, run)
    print(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
