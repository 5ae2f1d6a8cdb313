"""The state of a streaming filter in memory, the kernel over it, and what recovers it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlscuda import _C
from rlscuda.functional.calls import as_user_error
from rlscuda.streaming.arrays import aligned, padded, read_only

FORMS = {
    "covariance": {
        "float32": _C.Filter_float32,
        "float64": _C.Filter_float64,
        "complex64": _C.Filter_complex64,
        "complex128": _C.Filter_complex128,
    },
    "square-root": {"float32": _C.RootFilter_float32, "float64": _C.RootFilter_float64},
}
_POWER = slice(6, 8)  # of the scalars: samples and energy
_ARRAYS = ("P", "W", "waiting", "squares", "scalars")  # as the kernels take them


class Core:
    """P, W and all that goes with them.

    Args:
        n: Inputs.
        n_out: Outputs.
        dtype: Of P and W.
        form: A key of `FORMS`: P itself is in memory, or a root of it.

    Attributes:
        W: [n_out, n], up to date between two calls.
        squares: Sums of κ |x_j|² [n].
        kernel: The compiled filter, whose `forgetting`, `gain` and `ridge` may be assigned.
        resets: What `recover` has counted.
    """

    def __init__(self, n: int, n_out: int, dtype: np.dtype[Any], form: str) -> None:
        self.form = form
        self.P = np.zeros((n, n), dtype)
        self.W = np.zeros((n_out, n), dtype)
        rows = FORMS[form][dtype.name].rows
        self.waiting = np.zeros((rows, padded(n, self.P.itemsize)), dtype)
        self.squares, self.scalars = np.zeros(n), np.zeros(_C.filter_slots)
        self.resets = 0
        self._forget_waiting()
        self._connect()

    def _connect(self) -> None:
        for name in _ARRAYS:
            setattr(self, name, aligned(getattr(self, name)))
        kernel = FORMS[self.form][self.P.dtype.name]
        self.kernel = kernel(*(getattr(self, name) for name in _ARRAYS))

    def restart(self, initial_scale: Any) -> None:
        """P₀ = δ I, or of a δ for each input; the running power stays."""
        self._forget_waiting()
        self.P[...] = 0
        root = self.form == "square-root"
        np.fill_diagonal(self.P, np.sqrt(initial_scale) if root else initial_scale)

    def matrix(self) -> NDArray[Any]:
        """P [n, n], read-only and up to date: the memory itself where the form is P."""
        self.kernel.flush()
        if self.form == "square-root":
            return read_only(self.P @ self.P.conj().T)
        return read_only(self.P)

    def enter(self, P: NDArray[Any]) -> None:
        """Puts another P in place of the present one; it must be positive definite."""
        self._forget_waiting()
        if self.form == "square-root":
            P = root(P)
        self.P[...] = P

    def take(self, smaller: Core, initial_scale: Any) -> None:
        """Takes over a core of the same form with fewer inputs; the further ones start anew."""
        n = len(smaller.P)
        smaller.kernel.flush()
        self.restart(np.concatenate([np.ones(n), initial_scale]))
        self.P[:n, :n] = smaller.P
        self.W[...] = 0
        self.W[:, :n] = smaller.W
        self.squares[:n] = smaller.squares
        self.scalars[...] = smaller.scalars
        self.resets = smaller.resets

    def add_power(self, other: Core, sign: int) -> None:
        """Adds the running power of another core, or takes it off."""
        self.squares += sign * other.squares
        self.scalars[_POWER] += sign * other.scalars[_POWER]

    def learn_anew(self, X: NDArray[Any], Y: NDArray[Any], gains: Any, initial_scale: Any) -> None:
        """Knows nothing but these samples [T, n], each by its gain; the running power stays."""
        power = self.squares.copy(), self.scalars[2:].copy()
        self.restart(initial_scale)
        self.W[...] = 0
        self.run(X, Y, gains, np.ones(len(X)), None, initial_scale)
        self.squares[...], self.scalars[2:8] = power[0], power[1][:6]

    def _forget_waiting(self) -> None:
        self.scalars[:2] = 1.0, 0.0  # scale and rows

    def run(
        self,
        X: NDArray[Any],
        Y: NDArray[Any],
        gains: NDArray[np.float64] | None,
        forgettings: NDArray[np.float64] | None,
        history: NDArray[Any] | None,
        initial_scale: Any,
    ) -> tuple[NDArray[Any], list[int]]:
        """Learns a series; returns the predictions [T, n_out] and the samples left out."""
        predictions = np.empty((len(X), self.W.shape[0]), self.W.dtype)
        left_out: list[int] = []
        start, tries = 0, 0
        while True:
            rest = [None if a is None else a[start:] for a in (gains, forgettings, history)]
            try:
                learnt = self.kernel.run(X[start:], Y[start:], predictions[start:], *rest)
            except RuntimeError as error:
                raise as_user_error(error) from None
            start, tries = start + learnt, 0 if learnt else tries
            if start >= len(X):
                return predictions, left_out
            gain = self.kernel.gain if gains is None else gains[start]
            if self._recover(X[start], Y[start], gain, tries, initial_scale):
                tries += 1
                continue
            left_out.append(start)
            if history is not None:
                history[start] = self.W
            start, tries = start + 1, 0

    def _recover(
        self, x: NDArray[Any], y: NDArray[Any], gain: float, tries: int, initial_scale: Any
    ) -> bool:
        """Whether the sample that could not be learnt is worth another try."""
        P = self.matrix()
        if tries > 1 or (np.isfinite(P).all() and overflows(P, self.W, x, y, gain)):
            self._announce("a sample is too large and was left out")
            return False
        better = repaired(P) if tries == 0 else None
        if better is None:
            self._announce("P has overflowed and starts anew")
            self.restart(initial_scale)
        else:
            self._announce("rounding has made P indefinite, which was repaired")
            self.enter(better)
        return True

    def _announce(self, what: str) -> None:
        self.resets += 1
        if self.resets == 1:
            warnings.warn(
                f"RLSFilter: {what}; see its resets for how often. form='square-root', float64, "
                "or inputs that are centred and of one scale avoid it",
                RuntimeWarning,
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        kernel = self.kernel
        return {**self.__dict__, "kernel": (kernel.forgetting, kernel.gain, kernel.ridge)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()
        self.kernel.forgetting, self.kernel.gain, self.kernel.ridge = state["kernel"]


def root(P: NDArray[Any]) -> NDArray[Any]:
    """L [n, n] with L Lᴴ = P, float64 or wider; what rounding has made indefinite is repaired."""
    wide = P.astype(np.result_type(P.dtype, np.float64))
    try:
        return np.linalg.cholesky(wide)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(wide)
        return vectors * np.sqrt(np.maximum(values, np.finfo(P.dtype).eps * values[-1]))


def repaired(P: NDArray[Any]) -> NDArray[Any] | None:
    """The nearest matrix to P [n, n] that is positive definite; None where nothing is left of it.

    Rounding has moved the eigenvalues by as much as the most negative one shows, or by epsilon of
    the largest: what is below that is unknown, and is raised to it. All else that P knows stays.
    """
    if not np.isfinite(P).all():
        return None
    wide = P.astype(np.result_type(P.dtype, np.float64))
    values, vectors = np.linalg.eigh(wide / 2 + wide.conj().T / 2)
    if not values[-1] > 0:
        return None
    values = np.maximum(values, max(np.finfo(P.dtype).eps * values[-1], -values[0]))
    with np.errstate(over="ignore", invalid="ignore"):  # of a P that was about to overflow
        better = ((vectors * values) @ vectors.conj().T).astype(P.dtype)
    return better if np.isfinite(better).all() else None


def overflows(
    P: NDArray[Any], W: NDArray[Any], x: NDArray[Any], y: NDArray[Any], gain: float
) -> bool:
    """Whether the sample, not the matrix, is why h or the error is no finite number."""
    largest = np.finfo(P.dtype).max
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.result_type(P.dtype, np.float64)
        x, y = x.astype(wide), y.astype(wide)
        u = P.astype(wide) @ x
        sizes = np.concatenate([np.abs(gain * np.vdot(x, u))[None], np.abs(y - W.astype(wide) @ x)])
    return not (sizes <= largest).all()
