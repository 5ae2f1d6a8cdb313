"""Where forgetting winds up: `python -m benchmarks.streaming.filter_windup`, some minutes.

Inputs that leave directions of R = P⁻¹ unexcited, without noise, on the defaults of `RLSFilter`. A
run must stay finite, reset nothing, and keep the eigenvalues of P below what the ridge promises.
The same inputs go through `ridge=0`, the textbook's filter with resets, and padasip's, which has
none. Then the noise floor: the excess error of white inputs over the noise, beside `ridge=0` and
n (1 − λ) / (1 + λ), which theory says of that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import padasip
from numpy.typing import NDArray

from benchmarks.common import environment
from rlscuda import RLSFilter

RESULT = Path(__file__).resolve().parents[1] / "results" / "filter_windup.json"
KINDS = ("dead", "border", "narrow-band", "low-rank", "bursts")
FORGETTINGS, SIZES, PART = (0.9, 0.99, 0.999), (8, 32), 50_000


def inputs(kind: str, first: int, count: int, n: int) -> NDArray[np.float64]:
    """A part of a series: samples `first` to `first + count`, [count, n].

    Args:
        kind: "dead": none of the inputs fires after the first hundred samples; "border": every
            other input never fires; "narrow-band": a delay line of one sinusoid, so that the rank
            is 2; "low-rank": rank 2, in directions that are no coordinates; "bursts": silent in
            every other 5,000 samples; "white": all excited.
        first: Of its samples.
        count: Of its samples.
        n: Inputs.
    """
    time = first + np.arange(count)
    if kind == "narrow-band":
        return np.sin(0.3 * time[:, None] + 0.3 * np.arange(n))
    X = np.random.default_rng([4, first]).standard_normal((count, n))
    if kind == "dead":
        X[time >= 100] = 0
    elif kind == "border":
        X[:, ::2] = 0
    elif kind == "low-rank":
        X = X[:, :2] @ np.random.default_rng(5).standard_normal((2, n))
    elif kind == "bursts":
        X[(time // 5000) % 2 == 1] = 0
    return X


def run(
    kind: str, forgetting: float, n: int, dtype: str, samples: int, ridge: float | None = None
) -> dict[str, Any]:
    """What became of one filter.

    Returns:
        The settings; `nans`, predictions and weights that are not finite; `resets`; `largest` and
        `least` eigenvalue of P, and the `bound` of the largest; `error`, rms over the last part's
        loud samples and relative to the targets, None where nothing fires there.
    """
    f = RLSFilter(n, forgetting=forgetting, dtype=dtype, ridge=ridge)
    true = np.random.default_rng(6).standard_normal(n)
    nans, squares = 0, np.zeros(n)
    for first in range(0, samples, PART):
        X = inputs(kind, first, min(PART, samples - first), n).astype(dtype)
        y = (X @ true).astype(dtype)
        predictions = f.run(X, y)
        nans += int(np.count_nonzero(~np.isfinite(predictions)))
        squares += np.square(X.astype(np.float64)).sum(0)
    nans += int(np.count_nonzero(~np.isfinite(f.W)))
    values = np.linalg.eigvalsh(f.P.astype(np.float64))
    power = squares / samples
    least = max(power.min(), np.sqrt(np.finfo(dtype).eps) * power.mean())
    loud = X.any(1)
    wrong = np.square((predictions - y)[loud].astype(np.float64))
    return {
        "kind": kind, "forgetting": forgetting, "n": n, "dtype": dtype, "samples": samples,
        "nans": nans, "resets": f.resets, "largest": float(values[-1]), "least": float(values[0]),
        "bound": float(100 / least),
        "error": float(np.sqrt(wrong.mean() / np.square(y[loud]).mean())) if loud.any() else None,
    }  # fmt: skip


def first_nan(kind: str, forgetting: float, n: int, samples: int) -> int | None:
    """The first sample at which padasip's filter is not finite, or None."""
    X = inputs(kind, 0, samples, n)
    y = X @ np.random.default_rng(6).standard_normal(n)
    f = padasip.filters.FilterRLS(n, mu=forgetting, eps=1.0, w="zeros")
    with np.errstate(all="ignore"):
        broken = ~np.isfinite(f.run(y, X)[2]).all(1)
    return int(broken.argmax()) if broken.any() else None


def failed(row: dict[str, Any]) -> bool:
    """Whether a run was not finite, needed a reset, or has left its bound."""
    return bool(row["nans"] or row["resets"]) or not 0 < row["least"] < row["largest"] < (
        1.01 * row["bound"]
    )


def excess(n: int, forgetting: float, dtype: str, ridge: float | None, samples: int) -> float:
    """Mean square of the error over the noise's, of white inputs, once the filter has settled."""
    X = inputs("white", 0, samples, n)
    clean = X @ np.random.default_rng(6).standard_normal(n)
    y = clean + 0.1 * np.random.default_rng(7).standard_normal(samples)
    f = RLSFilter(n, forgetting=forgetting, dtype=dtype, ridge=ridge)
    wrong = f.run(X.astype(dtype), y.astype(dtype)) - clean
    return float(np.square(wrong[samples // 2 :]).mean() / 0.01)


def main() -> None:
    """Runs every case; ends with an error where a filter lost its footing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--results", type=Path, default=RESULT)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # resets are counted
    hashed = {"source_hash": environment.built_hash()}
    facts = environment.machine() | environment.versions() | hashed
    rows, textbook, floors = [], [], []
    for case in itertools.product(KINDS, FORGETTINGS, SIZES, ("float32", "float64")):
        rows.append(run(*case, arguments.samples))
        print(rows[-1], flush=True)
    short = min(arguments.samples, 100_000)
    for kind, forgetting in itertools.product(KINDS, FORGETTINGS):
        row = run(kind, forgetting, 8, "float64", short, 0.0)
        textbook.append(row | {"padasip_first_nan": first_nan(kind, forgetting, 8, short)})
        print(textbook[-1], flush=True)
    for n, forgetting in itertools.product((8, 32, 64), (0.99, 0.999)):
        row = {"n": n, "forgetting": forgetting, "samples": short}
        for name, dtype, ridge in (
            ("default", "float64", None), ("float32", "float32", None), ("ridge=0", "float64", 0.0)
        ):  # fmt: skip
            row[name] = excess(n, forgetting, dtype, ridge, short)
        row["theory"] = n * (1 - forgetting) / (1 + forgetting)
        floors.append(row)
        print(row, flush=True)
    result = {"windup": rows, "textbook": textbook, "noise_floor": floors}
    lines = [f'"{k}": [\n  ' + ",\n  ".join(map(json.dumps, v)) + "\n ]" for k, v in result.items()]
    text = ",\n ".join([f'"environment": {json.dumps(facts)}', *lines])
    arguments.results.write_text("{" + text + "}\n", encoding="utf-8")
    if any(map(failed, rows)):
        raise SystemExit(f"lost its footing: {list(filter(failed, rows))}")


if __name__ == "__main__":
    main()
