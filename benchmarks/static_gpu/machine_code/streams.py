"""The loads by which each kernel streams its data, found in the code by their source lines.

A kernel is compiled for many shapes at once (vectors or not, one row or sixteen), each with a loop
of its own. So a stream names the source line of its loads and, where that is inlined several times,
the line of the call; each must be in the source once.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from benchmarks.common.environment import ROOT
from benchmarks.static_gpu.machine_code.loops import Main, main_loop
from benchmarks.static_gpu.machine_code.sass import Instruction, Line
from benchmarks.static_gpu.machine_code.tools import Kernel


@dataclass(frozen=True)
class Stream:
    """What one loop of a kernel goes through.

    Attributes:
        kernel: The kernel, without its template arguments.
        file: The source file of the lines.
        lines: Texts of the lines whose loads (or products) belong to the stream, with their file
            where it is another.
        through: (file, text) of a line that they are inlined by, if that tells them from others.
        products: Whether the stream is of multiply-adds on shared memory, not of loads.
        narrow: Whether it is the one of single elements, of two that are alike but for that.
    """

    kernel: str
    file: str
    lines: tuple[str | tuple[str, str], ...]
    through: tuple[str, str] | None = None
    products: bool = False
    narrow: bool = False

    @property
    def places(self) -> list[tuple[str, str]]:
        """File and text of each of the lines."""
        return [(self.file, line) if isinstance(line, str) else line for line in self.lines]


_ROW = ("if (c < left) v = *reinterpret_cast<const Packed<T, VEC>*>(row + c);",)
_TILE = ("if (i < n && j < n) v = *reinterpret_cast<const Packed<T, VEC>*>(P + i * n + j);",)
_FMA = ("acc[r][q] -= rows[r] * columns[q];",)
_BIAS = ("weight_layers.h", "product[u] += grad_bias * bias_row[min(")
_STEP = (
    "direction[u] = product[j];", "if (moment) old[u] = moment[j];", "before[u] = *w[u];", _BIAS,
)  # fmt: skip
_NORM = (" d[u] = product[j];", "g[u] = j < a.n ? grad[j] : grad_bias;", _BIAS)
_AHEAD = ("seen[u] = j < a.columns ? grad[j] : bias;", "before[u] = average[j];")
_COMPLETE = (
    " d[u] = product[j];", "w[u] = j < a.n ? weight[offset(a, j)]", _BIAS,
)  # fmt: skip
_AHEAD_PEAK = ("seen[u] = out[min(j0 + u * ROW_THREADS, a.n - 1)];",)
_PROJECT, _TILES, _WEIGHT = "rls_project.h", "rls_tiles.h", "weight_step.cu"
_PRODUCTS = "complete_products.cu"
_RANKS = {
    "1 row": "project_ranks<1, VEC>(",
    "2 to 4 rows": "project_ranks<4, VEC>(",
    "16 rows": "project_ranks<kRanks<T>, VEC>(",
}
_ALIGNED = (_TILES, "update_tile<kLane>(P, V, n, rank, i0, j0,")
_UNALIGNED = (_TILES, "update_tile<1>(P, V, n, rank, i0, j0,")
_WIDE, _NARROW = "move_row<kThreads, T, W>(", "move_row<32, T, W>("

STREAMS: dict[str, Stream] = {
    "nonfinite": Stream(
        "nonfinite_kernel", "nonfinite.cu", ("load_lanes<kLanes>(x + head + v * kLanes);",),
        ("nonfinite.cu", "scan(t.data, t.count, uint32_t(t.exponent_mask), span)"),
    ),
    "nesterov wide": Stream(
        "nesterov_kernel", "nesterov.cu", _AHEAD,
        ("nesterov.cu", "take_row<kThreads, T, W>(call, own.layer, q,"),
    ),
    "nesterov narrow": Stream(
        "nesterov_kernel", "nesterov.cu", _AHEAD,
        ("nesterov.cu", "take_row<32, T, W>(call, own.layer, q,"),
    ),
    "nesterov_divide wide": Stream(
        "nesterov_divide_kernel", "nesterov.cu", _AHEAD_PEAK,
        ("nesterov.cu", "divide_rows<kThreads>(call, own.layer,"),
    ),
    "nesterov_divide narrow": Stream(
        "nesterov_divide_kernel", "nesterov.cu", _AHEAD_PEAK,
        ("nesterov.cu", "divide_rows<32>(call, own.layer,"),
    ),
    "nesterov_length": Stream("nesterov_length_kernel", "nesterov.cu", ("sum += squares[i];",)),
    "spectral_root products": Stream(
        "spectral_root_kernel", "spectral_root.cu",
        ("sums[r][q] += column.lane[r] * row.lane[q];",),
        ("spectral_root.cu", "add_outer(sums, A.load(k, tile.i), B.load(k, tile.j));"),
        products=True,
    ),
    "patch_mean sums": Stream(
        "patch_mean_sums_kernel", "patch_mean.cu",
        ("image[u] = load_lanes<LANES>(from + (b + u * step) * g.stride_n);",),
    ),
    "patch_mean rows": Stream(
        "patch_mean_rows_kernel", "patch_mean.cu", ("sum[u] = t[max(at[u], int64_t(0))];",)
    ),
    "patch_sketch planes": Stream(
        "patch_sketch_sums_kernel", "patch_sketch.cu", ("to[c] = to_compute<A>(*at);",)
    ),
    "patch_sketch channels": Stream(
        "patch_sketch_sums_kernel", "patch_sketch.cu", ("lanes = load_lanes<kLanes>(at + c);",)
    ),
    "patch_sketch rows": Stream(
        "patch_sketch_rows_kernel", "patch_sketch.cu", ("sum += from[p * stride];",)
    ),
    "patch_sample": Stream(
        "patch_sample_kernel", "patch_sample.cu", ("x[(group * per_group + c) * g.stride_c +",)
    ),
    "solve": Stream(
        "rls::rls_solve_kernel", "rls_solve.h", ("sum += U[s * split + k * n + column];",)
    ),
    "held_solve": Stream(
        "rls::held_solve_kernel", "rls_held.cu", ("taken += T(C[k * width + t]) * V[t * n];",)
    ),
    "bank product": Stream("rls_bank_kernel", "rls_bank.cu", ("sum += P[j * n + c] * x[j];",)),
    "bank update": Stream(
        "rls_bank_kernel", "rls_bank.cu", ("P[i * n + j] = scale * (P[i * n + j] -",),
        ("rls_bank.cu", "subtract<THREADS>(P, v, T(1 / rule.forgetting), n);"),
    ),
    "complete wide": Stream(
        "complete_products_kernel", _PRODUCTS, _COMPLETE,
        (_PRODUCTS, "complete_row<kThreads, T, W>("),
    ),
    "complete narrow": Stream(
        "complete_products_kernel", _PRODUCTS, _COMPLETE, (_PRODUCTS, "complete_row<32, T, W>(")
    ),
    "product norms": Stream(
        "product_norms_kernel", _PRODUCTS, ("total += double(squares[i]);",)
    ),
    "weight_step wide": Stream("weight_step_kernel", _WEIGHT, _STEP, (_WEIGHT, _WIDE)),
    "weight_step narrow": Stream("weight_step_kernel", _WEIGHT, _STEP, (_WEIGHT, _NARROW)),
    "weight_step wide, norm": Stream("weight_step_kernel", _WEIGHT, _NORM, (_WEIGHT, _WIDE)),
    "weight_step narrow, norm": Stream("weight_step_kernel", _WEIGHT, _NORM, (_WEIGHT, _NARROW)),
}  # fmt: skip
for _prefix, _project, _apply in (
    ("", "rls::rls_project_kernel", "rls::rls_update_kernel"),
    ("held_", "rls::held_project_kernel", "rls::held_apply_kernel"),
):
    for _rows, _call in _RANKS.items():
        for _suffix, _narrow in (("", False), (", unaligned", True)):
            STREAMS[f"{_prefix}project, {_rows}{_suffix}"] = Stream(
                _project, _PROJECT, _ROW, (_PROJECT, _call), narrow=_narrow
            )
    _name = "held_apply" if _prefix else "update"
    for _suffix, _through in (("", _ALIGNED), (", unaligned", _UNALIGNED)):
        STREAMS[_name + _suffix] = Stream(_apply, _TILES, _TILE, _through)
        STREAMS[f"{_name} products{_suffix}"] = Stream(_apply, _TILES, _FMA, _through, True)


@functools.cache
def line_of(file: str, text: str) -> Line:
    """The line of a source file that has a text.

    Raises:
        ValueError: Not one line has it.
    """
    (path,) = (p for p in (ROOT / "csrc").rglob(file))
    numbers = [i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    if len(numbers) != 1:
        raise ValueError(f"{file} must have one line with {text!r}, got lines {numbers}")
    return file, numbers[0]


@functools.cache
def constant(file: str, name: str) -> int:
    """The value of a constant of the kernels, from their source."""
    (path,) = (p for p in (ROOT / "csrc").rglob(file))
    found = re.search(rf"\b{name} = (\d+)", path.read_text())
    if found is None:
        raise ValueError(f"{file} has no constant {name}")
    return int(found[1])


def main_of(stream: Stream, kernel: Kernel) -> Main:
    """The loop of a kernel that a stream goes through.

    Raises:
        LookupError: The kernel has no such loads.
    """
    lines = {line_of(*place) for place in stream.places}
    through = line_of(*stream.through) if stream.through else None

    def near(i: Instruction) -> bool | None:
        if through is None or through in i.source:
            return True
        return False if i.source and i.source[-1][0] == kernel.source.name else None

    def belongs(i: Instruction) -> bool:
        return bool(lines.intersection(i.source))

    try:
        return main_loop(kernel.function, belongs, near, stream.products, stream.narrow)
    except LookupError as error:
        raise LookupError(f"{kernel.name}, {stream.lines[0]!r}: {error}") from None
