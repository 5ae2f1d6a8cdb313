"""What each launch has to do, by its algorithm: bytes moved and loaded, products, dependent waits.

Bytes are those of the large operands; what a launch leaves for the next one is counted where it is
not small beside them. `chain` counts round trips to the L2 cache that wait for one another outside
of the loops over data: a sum over a block, what another launch has left, a pivot of an elimination
(a third of one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from benchmarks.static_gpu.launches import Call, Launch
from benchmarks.static_gpu.machine_code.streams import constant

FLOAT = 4  # bytes of an element of P
RANKS = 64 // FLOAT  # rows that one pass of `project` takes, kRanks<float> of rls_project.h


@dataclass(frozen=True)
class Work:
    """The work of one launch.

    Attributes:
        loaded: Bytes, or multiply-adds, that all threads together take through each stream; that of
            the first decides which loop is shown.
        moved: Bytes between memory and the chip.
        chain: Dependent round trips to the L2 cache, of one block.
        cached: Whether what it loads is what the launch before has left in the L2 cache.
    """

    loaded: dict[str, float]
    moved: float
    chain: float = 0
    cached: bool = False


@dataclass(frozen=True)
class _Matrices:
    """P [batch, n, n] of one layer, and the rows of its update."""

    batch: int
    n: int
    rank: int

    @property
    def elements(self) -> int:
        return self.batch * self.n**2

    @property
    def whole(self) -> bool:
        """Whether one block does all of it."""
        most = (constant("rls_layers.h", name) for name in ("kWholeColumns", "kWholeRank"))
        columns, rank = most
        return self.n <= columns and self.rank <= rank

    @property
    def tiles(self) -> int:
        side = ceil(self.n / constant("rls_layers.h", "kTile"))
        return self.batch * side * (side + 1) // 2

    @property
    def suffix(self) -> str:
        """Of the streams that rows of this length go through."""
        return "" if self.n % 4 == 0 else ", unaligned"

    @property
    def rows(self) -> str:
        few = "1 row" if self.rank == 1 else "2 to 4 rows"
        return few if self.rank <= 4 else f"{RANKS} rows"

    @property
    def passes(self) -> int:
        return ceil(self.rank / RANKS)


def _matrices(sizes: dict[str, Any]) -> list[_Matrices]:
    pairs = zip(*(v if isinstance(v, list) else [v] for v in (sizes["P"], sizes["s"])))
    found = []
    for P, s in pairs:
        n, batch = P["shape"][-1], prod(P["shape"][:-2])
        found.append(_Matrices(batch, n, prod(s["shape"]) // max(1, batch * n)))
    return [m for m in found if m.rank > 0 and m.n > 0]


def _add(loaded: dict[str, float], stream: str, amount: float) -> None:
    loaded[stream] = loaded.get(stream, 0) + amount


def _largest_first(loaded: dict[str, float]) -> dict[str, float]:
    return dict(sorted(loaded.items(), key=lambda item: -item[1]))


def _project(call: Call, launch: Launch, prefix: str = "") -> Work:
    loaded: dict[str, float] = {}
    moved = chain = 0.0
    for m in _matrices(call.sizes):
        whole = m.whole and not prefix
        name = f"{prefix}project, {m.rows}{m.suffix}"
        _add(loaded, name, FLOAT * m.elements * m.passes)
        moved += FLOAT * m.elements * (2 if whole else 1) + FLOAT * m.batch * m.rank * m.n
        tiles = m.tiles / m.batch
        # S and the sums of the warps; where all is done at once, H, V and each tile and its image
        chain = max(chain, 4 + (8 + m.rank / 3 + 3 * tiles if whole else 0))
    loaded = _largest_first(loaded)
    moved += FLOAT * _partials(call, launch)
    if prefix:
        moved += FLOAT * call.sizes["held"]["shape"][-2] / 2 * call.sizes["P"]["shape"][-1]
    return Work(loaded, moved, chain)


def _partials(call: Call, launch: Launch) -> float:
    """Elements of the parts of U: a strip of each row from each block of `project`."""
    strip = constant("rls_layers.h", "kStrip")
    streamed = [m for m in _matrices(call.sizes) if not m.whole or launch.kernel.count("held")]
    if not streamed:
        return 0
    width = min(strip, max(m.n for m in streamed))
    return launch.blocks * width * max(m.rank for m in streamed)


def _of(call: Call, kernel: str) -> Launch:
    return next(launch for launch in call.launches if kernel in launch.kernel)


def _solve(call: Call, launch: Launch) -> Work:
    parts = FLOAT * _partials(call, _of(call, "project"))
    rank = max(m.rank for m in _matrices(call.sizes))
    return Work({"solve": parts}, parts, 5 + rank / 3, cached=True)


def _update(call: Call, launch: Launch) -> Work:
    loaded: dict[str, float] = {}
    moved = 0.0
    for m in _matrices(call.sizes):
        if not m.whole:
            moved += _apply(m, m.rank, "update", loaded)
    return Work(loaded, moved, 3)


def _apply(m: _Matrices, rows: int, name: str, loaded: dict[str, float]) -> float:
    elements = m.tiles * constant("rls_layers.h", "kTile") ** 2
    _add(loaded, name + m.suffix, FLOAT * elements)
    _add(loaded, f"{name} products{m.suffix}", elements * rows)
    return 1.5 * FLOAT * m.elements


def _held_solve(call: Call, launch: Launch) -> Work:
    rows, n = call.sizes["held"]["shape"][-2:]
    parts = FLOAT * _partials(call, _of(call, "project"))
    rank = max(m.rank for m in _matrices(call.sizes))
    return Work({"held_solve": FLOAT * rows * rank * n}, FLOAT * rows * n + parts, 8 + rank / 3)


def _held_apply(call: Call, launch: Launch) -> Work:
    loaded: dict[str, float] = {}
    (m,) = _matrices(call.sizes)
    moved = _apply(m, call.sizes["held"]["shape"][-2], "held_apply", loaded)
    return Work(loaded, moved, 3)


def _outputs(sizes: dict[str, Any]) -> tuple[int, int]:
    """Elements of a row of the result over all groups, and rows of output positions."""
    shape, kernel = sizes["x"]["shape"], sizes["kernel_size"]
    top, bottom = sizes["padding"][2:]
    reach = sizes["dilation"][0] * (kernel[0] - 1) + 1
    high = (shape[2] + top + bottom - reach) // sizes["stride"][0] + 1
    return shape[1] * prod(kernel) + sizes["groups"] * bool(sizes["ones"]), high


def _x_bytes(sizes: dict[str, Any]) -> int:
    return prod(sizes["x"]["shape"]) * sizes["x"]["item"]


def _mean_sums(call: Call, launch: Launch) -> Work:
    return Work({"patch_mean sums": _x_bytes(call.sizes)}, _x_bytes(call.sizes), 2)


def _mean_rows(call: Call, launch: Launch) -> Work:
    (parts,), (row, high) = launch.integers, _outputs(call.sizes)
    shape, kernel = call.sizes["x"]["shape"], call.sizes["kernel_size"]
    t = FLOAT * parts * kernel[1] * shape[1] * shape[2]
    return Work({"patch_mean rows": FLOAT * row * parts * high}, t, 1, cached=True)


def _sketch_sums(call: Call, launch: Launch) -> Work:
    x, taps = call.sizes["x"], prod(call.sizes["kernel_size"])
    at_once = int(launch.kernel.rpartition(",")[2].strip(" >"))
    shape, each = x["shape"], constant("patch_sketch.cu", "kChannels")
    channels = ceil(shape[1] / each) * each
    passes = call.sizes["rank"] * ceil(taps / at_once)
    loaded = passes * shape[0] * channels * prod(shape[2:]) * x["item"]
    stream = "patch_sketch channels" if _whole_vectors(x) else "patch_sketch planes"
    return Work({stream: loaded}, _x_bytes(call.sizes), 3 + min(taps, at_once) / 3)


def _whole_vectors(x: dict[str, Any]) -> bool:
    """Whether the channels are dense and every one of them begins a vector of 16 bytes."""
    dense = x["stride"][1] == 1 and x["shape"][1] > 1
    sides = [(x["shape"][d], x["stride"][d] * x["item"]) for d in (0, 2, 3)]
    return dense and all(size == 1 or step % 16 == 0 for size, step in sides)


def _sketch_rows(call: Call, launch: Launch) -> Work:
    rank, parts, _ = launch.integers
    partial = FLOAT * rank * parts * call.sizes["x"]["shape"][1] * prod(call.sizes["kernel_size"])
    return Work({"patch_sketch rows": partial}, partial, 2, cached=True)


def _sample(call: Call, launch: Launch) -> Work:
    row, _ = _outputs(call.sizes)
    elements = call.sizes["rank"] * row
    item = call.sizes["x"]["item"]
    return Work({"patch_sample": elements * item}, elements * (item + FLOAT), 2)


def _weight_step(call: Call, launch: Launch) -> Work:
    sizes = call.sizes
    listed = isinstance(sizes["weight"], list)
    moments = sizes.get("first_moment", sizes.get("momentum_buffer"))
    has_moment, adaptive = bool(moments), bool(sizes.get("second_moment"))
    has_row = bool(sizes["bias_row"])
    loaded: dict[str, float] = {}
    moved = 0.0
    for product in sizes["product"] if listed else [sizes["product"]]:
        rows, columns = prod(product["shape"][:-1]), product["shape"][-1]
        elements = rows * columns
        way = "narrow" if columns <= constant("rows.h", "kNarrow") else "wide"
        _add(loaded, f"weight_step {way}", FLOAT * elements * (2 + has_moment + has_row))
        if adaptive:
            _add(loaded, f"weight_step {way}, norm", FLOAT * elements * (2 + has_row))
        moved += FLOAT * elements * (3 + 2 * has_moment + adaptive)
    return Work(_largest_first(loaded), moved, 4 if adaptive else 3)


def _complete(call: Call, launch: Launch) -> Work:
    loaded: dict[str, float] = {}
    moved = 0.0
    for product in call.sizes["product"]:
        rows, columns = prod(product["shape"][:-1]), product["shape"][-1]
        way = "narrow" if columns <= constant("rows.h", "kNarrow") else "wide"
        _add(loaded, f"complete {way}", 3 * FLOAT * rows * columns)
        moved += FLOAT * (3 * rows * columns + 2 * rows)
    return Work(_largest_first(loaded), moved, 4)


def _norms(call: Call, launch: Launch) -> Work:
    rows = sum(product["shape"][0] for product in call.sizes["product"])
    return Work({"product norms": 2 * FLOAT * rows}, 2 * FLOAT * rows, 2)


def _ahead(call: Call, name: str, each: float) -> dict[str, float]:
    """Bytes that a stream of rows and another of long ones load, `each` bytes an element."""
    loaded: dict[str, float] = {}
    sizes = call.sizes
    for average, groups, rows in zip(sizes["average"], sizes["groups"], sizes["rows"]):
        columns = average["shape"][1]
        way = "narrow" if columns <= constant("rows.h", "kNarrow") else "wide"
        _add(loaded, f"{name} {way}", each * groups * rows * columns)
    return loaded


def _nesterov(call: Call, launch: Launch) -> Work:
    loaded = _ahead(call, "nesterov", 2 * FLOAT)
    return Work(_largest_first(loaded), 2 * sum(loaded.values()), 3)


def _nesterov_divide(call: Call, launch: Launch) -> Work:
    loaded = _ahead(call, "nesterov_divide", FLOAT)
    return Work(_largest_first(loaded), 2 * sum(loaded.values()), 4, cached=True)


def _nesterov_length(call: Call, launch: Launch) -> Work:
    read = FLOAT * sum(g * r for g, r in zip(call.sizes["groups"], call.sizes["rows"]))
    return Work({"nesterov_length": read}, read, 2, cached=True)


def _spectral_root(call: Call, launch: Launch) -> Work:
    grams = [gram["shape"] for gram in call.sizes["gram"]]
    products = 4 * len(call.sizes["coefficients"]) // 3 - 3
    tile = constant("spectral_root.cu", "kTile")
    work = 0.0
    for (blocks, m, _), rows, columns in zip(grams, call.sizes["block"], call.sizes["columns"]):
        side = ceil(m / tile)
        tiles = side * (side + 1) // 2 if rows <= columns else side**2
        work += products * blocks * tiles * tile**2 * m
    moved = FLOAT * sum(map(prod, grams)) * 2
    return Work({"spectral_root products": work}, moved, 6)


def _nonfinite(call: Call, launch: Launch) -> Work:
    read = sum(prod(t["shape"]) * t["item"] for t in call.sizes["tensors"])
    return Work({"nonfinite": read}, read)


def _bank(call: Call, launch: Launch) -> Work:
    P, W, x = (call.sizes[name] for name in ("P", "W", "x"))
    filters, n = x["shape"][0], P["shape"][-1]
    matrix = filters * n * n * P["item"]
    each = (2 * W["shape"][-2] * n + 2 * n + n) * P["item"] + 16 * n  # W, x, v; the sums of squares
    # n_out predictions, faults, two sums, u, the state
    return Work({"bank product": matrix, "bank update": matrix}, 2 * matrix + filters * each, 8)


_KERNELS: dict[str, Callable[[Call, Launch], Work]] = {
    "rls::rls_project_kernel": _project,
    "rls::rls_solve_kernel": _solve,
    "rls::rls_update_kernel": _update,
    "rls::held_project_kernel": lambda call, launch: _project(call, launch, "held_"),
    "rls::held_solve_kernel": _held_solve,
    "rls::held_apply_kernel": _held_apply,
    "patch_mean_sums_kernel": _mean_sums,
    "patch_mean_rows_kernel": _mean_rows,
    "patch_sketch_sums_kernel": _sketch_sums,
    "patch_sketch_rows_kernel": _sketch_rows,
    "patch_sample_kernel": _sample,
    "weight_step_kernel": _weight_step,
    "complete_products_kernel": _complete,
    "product_norms_kernel": _norms,
    "nesterov_kernel": _nesterov,
    "nesterov_divide_kernel": _nesterov_divide,
    "nesterov_length_kernel": _nesterov_length,
    "spectral_root_kernel": _spectral_root,
    "nonfinite_kernel": _nonfinite,
    "rls_bank_kernel": _bank,
}


def work_of(call: Call, launch: Launch) -> Work:
    """The work of one launch.

    Raises:
        ValueError: The kernel is not known here.
    """
    kernel = launch.kernel.partition("<")[0]
    if kernel not in _KERNELS:
        raise ValueError(f"{kernel} has no entry in {__name__}, by which its bytes are counted")
    return _KERNELS[kernel](call, launch)
