"""Badly conditioned series: `python -m benchmarks.streaming.filter_numerics`, seconds.

How far a filter's predictions end from those of exact ridge regression, as rms over the series and
in units of the noise; the median of ten series. Each form of `RLSFilter` is beside five lines of
NumPy in the same dtype. λ is 1, so that both compute the same thing but for rounding.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import environment
from rlscuda import RLSFilter
from rlscuda.streaming.core import FORMS

RESULT = Path(__file__).resolve().parents[1] / "results" / "filter_numerics.json"
NOISE, SAMPLES, SEEDS = 0.1, 500, 10


def offset(rng: np.random.Generator) -> NDArray[np.float64]:
    """Four inputs of mean 1000 and deviation 1, and a constant [T, 5]."""
    return np.column_stack([1000 + rng.standard_normal((SAMPLES, 4)), np.ones(SAMPLES)])


def polynomial(rng: np.random.Generator) -> NDArray[np.float64]:
    """Powers 0 to 5 of a number between 0 and 10 [T, 6]."""
    return rng.uniform(0, 10, SAMPLES)[:, None] ** np.arange(6)


def centred(rng: np.random.Generator) -> NDArray[np.float64]:
    """Five white inputs [T, 5]."""
    return rng.standard_normal((SAMPLES, 5))


CASES = {
    "centred": (centred, "float32", 1e6),
    "mean 1000": (offset, "float32", 1e3),
    "mean 1000, large δ": (offset, "float32", 1e6),
    "mean 1000, float64": (offset, "float64", 1e6),
    "powers 0 to 5": (polynomial, "float64", 1e6),
}


def five_lines(X: NDArray[Any], y: NDArray[Any], scale: float) -> NDArray[Any]:
    """The weights [n] of recursive least squares as it is found in textbooks."""
    P, w = np.eye(X.shape[1], dtype=X.dtype) * X.dtype.type(scale), np.zeros(X.shape[1], X.dtype)
    for x, target in zip(X, y, strict=True):
        u = P @ x
        w = w + u * ((target - w @ x) / (1 + x @ u))
        P = P - np.outer(u, u / (1 + x @ u))
    return w


def run(name: str, seed: int) -> dict[str, Any]:
    """Errors of each form and of the five lines on one series, and the repairs of the former."""
    kind, dtype, scale = CASES[name]
    rng = np.random.default_rng(seed)
    X = kind(rng)
    n = X.shape[1]
    y = X @ (rng.standard_normal(n) / X.std(0).clip(1)) + NOISE * rng.standard_normal(SAMPLES)
    rows = np.vstack([X, np.eye(n) / np.sqrt(scale)])
    exact = np.linalg.lstsq(rows, np.append(y, np.zeros(n)), rcond=None)[0]
    inputs, targets = X.astype(dtype), y.astype(dtype)
    found: dict[str, Any] = {}
    for form in FORMS:
        f = RLSFilter(n, initial_scale=scale, dtype=dtype, form=form)
        f.run(inputs, targets)
        found[form] = f.W[0]
        found[f"{form}, repairs"] = f.resets
    found["five lines of NumPy"] = five_lines(inputs, targets, scale)
    return {
        key: value if key.endswith("repairs")
        else float(np.sqrt(np.square(X @ (value - exact)).mean()) / NOISE)
        for key, value in found.items()
    }  # fmt: skip


def medians(name: str) -> dict[str, float]:
    """What `run` gives, over all series of a case."""
    series = [run(name, seed) for seed in range(SEEDS)]
    return {key: float(np.median([one[key] for one in series])) for key in series[0]}


def main() -> None:
    """Runs every case."""
    warnings.simplefilter("ignore", RuntimeWarning)  # repairs are counted
    rows = []
    for name, (_, dtype, scale) in CASES.items():
        rows.append({"case": name, "dtype": dtype, "initial_scale": scale} | medians(name))
        print(rows[-1], flush=True)
    facts = environment.machine() | environment.versions()
    facts |= {"source_hash": environment.built_hash()}
    lines = ",\n  ".join(map(json.dumps, rows))
    text = f'{{"environment": {json.dumps(facts)},\n "rows": [\n  {lines}\n ]}}\n'
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
