"""The streaming filters on random series."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import torch
from recording import scenario, write

from rlscuda import HeldMatrix, RLSFilter, RLSRegressor

WIDE = 600  # of a matrix that holds its updates back


def _series(samples: int, n: int, outputs: int, dtype: type = np.float64):
    rng = np.random.default_rng(n)
    X = rng.standard_normal((samples, n)).astype(dtype)
    noise = 0.1 * rng.standard_normal((samples, outputs))
    return X, (X @ rng.standard_normal((n, outputs)) + noise).astype(dtype)


@scenario()
def streams_filter() -> None:
    cases = {
        "plain": (5, 1, {}),
        "forgetting": (7, 2, {"forgetting": 0.98, "gain": 0.5, "initial_scale": 10.0}),
        "ridge": (7, 3, {"forgetting": 0.98, "ridge": 0.0, "dtype": np.float32}),
        "wide": (WIDE, 2, {"forgetting": 0.999, "dtype": np.float32}),
    }
    for name, (n, outputs, options) in cases.items():
        X, Y = _series(60, n, outputs, options.get("dtype", np.float64))
        one = RLSFilter(n, outputs, **options)
        one.W = np.full((outputs, n), 0.1, one.dtype)
        seen = [one.run(X[:40], Y[:40]), *(one.update(x, y) for x, y in zip(X[40:50], Y[40:50]))]
        other = pickle.loads(pickle.dumps(copy.deepcopy(one)))
        for each in (one, other):
            seen += [each.run(X[50:], Y[50:]), each.predict(X[:3]), each.P.copy(), each.W.copy()]
        write(f"{name}.pt", [torch.from_numpy(np.array(part)) for part in seen])
        write(f"{name}.txt", f"{one}\n{one.updates} {one.resets}")


@scenario()
def streams_regressor() -> None:
    for name, outputs, options in (
        ("plain", 1, {}), ("drifting", 3, {"forgetting": 0.97, "fit_intercept": False})
    ):  # fmt: skip
        X, Y = _series(50, 6, outputs)
        model = RLSRegressor(**options).fit(X[:30], Y[:30, 0] if outputs == 1 else Y[:30])
        model.partial_fit(X[30:], Y[30:, 0] if outputs == 1 else Y[30:])
        seen = [model.predict(X), model.coef_, model.intercept_, model.P_]
        write(f"{name}.pt", [torch.from_numpy(np.array(part)) for part in seen])
        write(f"{name}.json", [repr(model), model.score(X, Y if outputs > 1 else Y[:, 0])])


CASES = {"one": ((9, 9), 1, 4), "batch": ((3, 8, 8), 2, 5), "whole": ((6, 6), 2, 0),
         "wide": ((WIDE, WIDE), 1, None)}  # fmt: skip


def _rows(name: str, seed: int) -> torch.Tensor:
    (*batch, n, _), rank, _ = CASES[name]
    return torch.randn(*batch, rank, n, generator=torch.Generator().manual_seed(seed))


@scenario()
def streams_held() -> None:
    for name, (shape, rank, hold) in CASES.items():
        matrix = HeldMatrix(torch.eye(shape[-1]).expand(shape).clone(), rank, hold)
        seen = [matrix.update(_rows(name, step), 0.99, 0.5) for step in range(7)]
        write(f"{name}.pt", {"matrix": matrix.state_dict(), "seen": seen, "text": repr(matrix)})


@scenario("streams_held")
def streams_held_resumed(begun: Path) -> None:
    for name, (shape, rank, hold) in CASES.items():
        matrix = HeldMatrix(torch.eye(shape[-1]).expand(shape).clone(), rank, hold)
        matrix.load_state_dict(torch.load(begun / f"{name}.pt", weights_only=True)["matrix"])
        seen = [matrix.update(_rows(name, step), decay=0.9, diffusion=0.1) for step in range(9)]
        write(f"{name}.pt", {"P": matrix.P, "seen": seen})
