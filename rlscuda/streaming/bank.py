"""Many recursive-least-squares filters in one call, each with weights and a matrix of its own."""

from __future__ import annotations

import copy
import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rlscuda.functional import rls_filter_bank_
from rlscuda.streaming.states import copy_in

Values = ArrayLike | Tensor
_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
_FORGETTING, _GAIN, _RIDGE, _SCALE = range(4)  # columns of the rule
_UPDATES, _RESETS, _REFUSED = -3, -2, -1  # columns of the state
_BY_INPUT = -1.0  # in place of a ridge: it follows the input


class RLSFilterBank:
    r"""b independent recursive-least-squares filters: yₖ ≈ Wₖ xₖ, a sample for each in one call.

    A sample (x, y) updates the weights ``W`` and the inverse autocorrelation matrix ``P`` of its
    filter by::

        u = P x,   h = λ + κ x·u,   e = y − W x
        W ← W + (κ/h) e uᵀ
        P ← (P − (κ/h) u uᵀ) / λ

    which is exponentially weighted least squares. Forgetting alone would lose what is known of
    directions that the input no longer excites, until P overflows; so where λ < 1, each time that
    it has halved the information P⁻¹, every coordinate of that has once gained a ridge. W is not
    drawn to 0 by it. A sample for which h or e is not finite, or h not positive, is skipped, and
    the P of its filter starts anew; the others go on.

    NumPy arrays give NumPy arrays, tensors give tensors on their device. Lists and numbers are
    converted to the dtype of the bank, arrays and tensors of another one are refused.

    Args:
        b: Filters.
        n: Inputs of each.
        n_out: Outputs of each.
        forgetting: λ in (0, 1], one for all or [b].
        gain: κ > 0, the weight of a sample, one for all or [b].
        initial_scale: δ > 0 of P₀ = δ I, one for all or [b].
        ridge: What a coordinate of P⁻¹ gains; None: a hundredth of the mean of xⱼ² over all samples
            so far, so that units do not matter; 0: none, plain forgetting.
        dtype: float32 or float64. Where it is one of torch, or `device` is given, attributes are
            tensors; otherwise they are NumPy arrays.
        device: Of the state.

    Any of these but the sizes, dtype and device may be changed between two calls, as an attribute.
    Copies, pickles and `state_dict` carry everything, and go on to the same bits.

    Example:
        A linear bandit (LinUCB) with 3 arms: one round costs a look at every arm's P, and an update
        of one.

        >>> import numpy as np
        >>> from rlscuda import RLSFilterBank
        >>> arms, context = RLSFilterBank(3, 2), np.array([1.0, 0.5])
        >>> bound = arms.predict(context)[:, 0] + 2 * np.sqrt(arms.variance(context))
        >>> best = int(bound.argmax())
        >>> arms.update(context, [1.0], index=[best])
        array([0.])
        >>> arms.updates
        array([1, 0, 0])

    Raises:
        TypeError: An argument is of another type or dtype than documented.
        ValueError: An argument is out of its range, or of a wrong shape, or has a NaN or an
            infinity in it. The bank is then as it was before. On CUDA, where nothing waits for the
            device, values of samples are not looked at: a row that is not finite is refused for its
            filter alone and counted in `refused`.
    """

    def __init__(
        self,
        b: int,
        n: int,
        n_out: int = 1,
        forgetting: float | Values = 1.0,
        gain: float | Values = 1.0,
        initial_scale: float | Values = 1.0,
        ridge: float | None = None,
        dtype: Any = np.float64,
        device: torch.device | str | None = None,
    ) -> None:
        self.b, self.n, self.n_out = (operator.index(size) for size in (b, n, n_out))
        if min(self.b, self.n, self.n_out) < 1:
            raise ValueError(f"b, n and n_out must be at least 1, got {b}, {n} and {n_out}")
        self._arrays = not isinstance(dtype, torch.dtype) and device is None
        kind = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(np.dtype(dtype))
        if kind not in _DTYPES.values():
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        device = torch.device("cpu") if device is None and self._arrays else device
        options: dict[str, Any] = {"device": device, "dtype": torch.float64}
        self._rule = torch.ones(self.b, 4, **options)
        self._state = torch.zeros(self.b, 7, **options)
        self._squares = torch.zeros(self.b, self.n, **options)
        options["dtype"] = kind
        self._P = torch.zeros(self.b, self.n, self.n, **options)
        self._W = torch.zeros(self.b, self.n_out, self.n, **options)
        self.forgetting, self.gain, self.initial_scale = forgetting, gain, initial_scale
        self.ridge = ridge
        self.reset()

    @property
    def forgetting(self) -> Any:
        """λ of each filter, float64 [b], a copy."""
        return self._shown(self._rule[:, _FORGETTING].clone())

    @forgetting.setter
    def forgetting(self, values: float | Values) -> None:
        values = self._constants("forgetting", values)
        if not ((values > 0) & (values <= 1)).all():
            raise ValueError(f"forgetting must be in (0, 1], got {values.min()} to {values.max()}")
        self._set(_FORGETTING, values)

    @property
    def gain(self) -> Any:
        """κ of each filter, float64 [b], a copy."""
        return self._shown(self._rule[:, _GAIN].clone())

    @gain.setter
    def gain(self, values: float | Values) -> None:
        self._set(_GAIN, self._positive("gain", values))

    @property
    def initial_scale(self) -> Any:
        """δ of each filter, float64 [b], a copy."""
        return self._shown(self._rule[:, _SCALE].clone())

    @initial_scale.setter
    def initial_scale(self, values: float | Values) -> None:
        self._set(_SCALE, self._positive("initial_scale", values))

    @property
    def ridge(self) -> float | None:
        """The ridge of all filters, or None where it follows the input."""
        value = float(self._rule[0, _RIDGE])
        return None if value == _BY_INPUT else value

    @ridge.setter
    def ridge(self, value: float | None) -> None:
        if value is not None and not 0 <= value <= torch.finfo(self._P.dtype).max:
            raise ValueError(f"ridge must be >= 0 and finite, or None, got {value}")
        self._rule[:, _RIDGE] = _BY_INPUT if value is None else float(value)

    @property
    def P(self) -> Any:
        """The inverse autocorrelation matrices [b, n, n], the live state; assigning copies in.

        What is assigned must be symmetric to rounding, and positive definite.
        """
        return self._shown(self._P)

    @P.setter
    def P(self, values: Values) -> None:
        given = self._whole("P", values, self._P)
        scale = given.abs().amax((1, 2), keepdim=True)
        rounding = torch.finfo(given.dtype).eps ** 0.5
        if not ((given - given.mT).abs() <= rounding * scale).all():
            raise ValueError("P must be symmetric")
        symmetric = (given + given.mT) / 2
        if torch.linalg.cholesky_ex(symmetric).info.any():
            raise ValueError("P must be positive definite")
        self._P.copy_(symmetric)

    @property
    def W(self) -> Any:
        """The weights [b, n_out, n], the live state; assigning copies in."""
        return self._shown(self._W)

    @W.setter
    def W(self, values: Values) -> None:
        self._W.copy_(self._whole("W", values, self._W))

    @property
    def updates(self) -> Any:
        """Samples that entered each filter, int64 [b]."""
        return self._shown(self._state[:, _UPDATES].long())

    @property
    def resets(self) -> Any:
        """Samples of each filter that would have broken its P, int64 [b]."""
        return self._shown(self._state[:, _RESETS].long())

    @property
    def refused(self) -> Any:
        """Samples of each filter that were not finite, on CUDA, int64 [b]."""
        return self._shown(self._state[:, _REFUSED].long())

    def update(
        self,
        x: Values,
        y: Values,
        mask: Values | None = None,
        weights: Values | None = None,
        index: Values | None = None,
    ) -> Any:
        """Learns a sample for each filter, or for those of `index`.

        Args:
            x: Inputs [b, n], or [n] for one that all filters share; with `index` [k, n] or [n].
            y: Targets [b, n_out], or [b] where n_out = 1; with `index` k rows of them.
            mask: bool [b] or [k]: false where a filter is to stay as it is; its sample is not
                looked at and may be NaN.
            weights: [b] or [k], >= 0: a sample counts as κ times its weight; at 0 its filter stays
                as it is.
            index: Whole numbers [k]: the filter of each row, none of them twice. The call costs as
                much as k filters, however many there are.

        Returns:
            The a-priori predictions W x, made before the update, in the shape of `y`.
        """
        inputs, targets = self._values("x", x), self._values("y", y)
        columns = targets[:, None] if targets.dim() == 1 and self.n_out == 1 else targets
        predictions = rls_filter_bank_(
            self._P, self._W, self._state, self._squares, self._rule, inputs, columns,
            weights=None if weights is None else self._values("weights", weights),
            mask=None if mask is None else self._mask(mask),
            index=None if index is None else self._index(index),
        )  # fmt: skip
        return _like(predictions.view(targets.shape), x)

    def predict(self, x: Values, index: Values | None = None) -> Any:
        """The outputs W x, without learning.

        Args:
            x: Inputs [b, n], or [n] for one that all filters share; with `index` [k, n] or [n].
            index: Whole numbers [k]: the filter of each row; None means all.

        Returns:
            [b, n_out] or [k, n_out].
        """
        return _like(self._product(self._W, x, index)[0], x)

    def variance(self, x: Values, index: Values | None = None) -> Any:
        """xᵀ P x, by which the bonus of LinUCB and the error of a prediction are scaled.

        Args:
            x: Inputs, as `predict` takes them.
            index: As there.

        Returns:
            [b] or [k], never below 0.
        """
        product, inputs = self._product(self._P, x, index)
        return _like((product * inputs).sum(-1).clamp_(min=0), x)

    def reset(self, index: Values | None = None, keep_weights: bool = False) -> None:
        """Starts anew: P = P₀, counters 0, and W = 0.

        Args:
            index: Whole numbers [k]: which filters; None means all.
            keep_weights: Leaves W as it is.
        """
        chosen: Any = slice(None) if index is None else self._checked_index(index)
        scale = self._rule[chosen, _SCALE].to(self._P.dtype)
        self._P[chosen] = torch.diag_embed(scale[:, None].expand(-1, self.n))
        self._state[chosen] = 0
        self._squares[chosen] = 0
        if not keep_weights:
            self._W[chosen] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """All that the filters are: the live tensors."""
        return {
            "P": self._P, "W": self._W, "state": self._state, "squares": self._squares,
            "rule": self._rule,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Copies in what `state_dict` gave for a bank of the same sizes and dtype.

        Raises:
            ValueError: A tensor is missing, or of another shape or dtype.
        """
        copy_in(self.state_dict(), state_dict)

    def _product(self, matrices: Tensor, x: Values, index: Values | None) -> tuple[Tensor, Tensor]:
        """The products of matrices [b, r, n], or of those of an index, and x; and x as a tensor."""
        inputs = self._values("x", x).detach()
        chosen = matrices if index is None else matrices[self._checked_index(index)]
        if inputs.shape not in ((self.n,), (len(chosen), self.n)):
            rows = f"[{self.n}] or [{len(chosen)}, {self.n}]"
            raise ValueError(f"x must be {rows}, got {list(inputs.shape)}")
        if not inputs.is_cuda and not inputs.isfinite().all():
            raise ValueError("x must be finite, got NaN or inf")
        if inputs.dim() == 1:
            return chosen @ inputs, inputs
        return (chosen @ inputs[..., None]).squeeze(-1), inputs

    def _values(self, name: str, values: Values) -> Tensor:
        """A tensor of the bank's dtype; numbers and lists are converted, arrays never."""
        if np.ma.is_masked(values):
            raise ValueError(f"{name} must have no masked elements: mask= leaves filters out")
        if not isinstance(values, (Tensor, np.ndarray)):
            values = np.asarray(values, _numpy(self._P.dtype))
        given = self._tensor(values)
        if given.dtype != self._P.dtype:
            raise TypeError(f"{name} must be {_numpy(self._P.dtype)}, got {values.dtype}")
        return given

    def _mask(self, values: Values) -> Tensor:
        given = self._tensor(values if isinstance(values, Tensor) else np.asarray(values))
        if given.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {given.dtype}")
        return given

    def _index(self, values: Values) -> Tensor:
        if not isinstance(values, Tensor):
            values = np.asarray(values)
            if values.dtype.kind not in "iu" and values.size:
                raise TypeError(f"index must be whole numbers, got {values.dtype}")
            values = values.astype(np.int64, copy=False)
        elif values.dtype == torch.bool or values.dtype.is_floating_point:
            raise TypeError(f"index must be whole numbers, got {values.dtype}")
        return self._tensor(values).long()

    def _checked_index(self, values: Values) -> Tensor:
        """An index by which torch may choose: it would count negative ones from the end."""
        index = self._index(values)
        if index.dim() != 1 or not ((index >= 0) & (index < self.b)).all():
            raise ValueError(f"index must be [k] numbers in [0, {self.b}), got {index.tolist()}")
        return index

    def _tensor(self, values: Tensor | NDArray[Any]) -> Tensor:
        """A tensor as it is; an array where the bank is."""
        if isinstance(values, Tensor):
            return values
        if not values.flags.writeable or min(values.strides, default=0) < 0:
            values = values.copy()
        return torch.from_numpy(values).to(self._P.device)

    def _whole(self, name: str, values: Values, own: Tensor) -> Tensor:
        given = self._values(name, values).detach().to(own.device)
        if given.shape != own.shape:
            raise ValueError(f"{name} must be {list(own.shape)}, got {list(given.shape)}")
        if not given.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or inf")
        return given

    def _constants(self, name: str, values: float | Values) -> NDArray[Any]:
        """Numbers, one for all filters or one for each, in float64."""
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        given = np.asarray(values, np.float64)
        if given.shape not in ((), (self.b,)):
            raise ValueError(f"{name} must be a number or [{self.b}], got {list(given.shape)}")
        return given

    def _positive(self, name: str, values: float | Values) -> NDArray[Any]:
        given, limits = self._constants(name, values), torch.finfo(self._P.dtype)
        if not ((given >= limits.tiny) & (given <= limits.max)).all():
            raise ValueError(f"{name} must be > 0 and finite, got {given.min()} to {given.max()}")
        return given

    def _set(self, column: int, values: NDArray[Any]) -> None:
        self._rule[:, column] = torch.tensor(values, device=self._rule.device)

    def _shown(self, tensor: Tensor) -> Any:
        if not self._arrays:
            return tensor
        view = tensor.numpy()
        view.flags.writeable = False
        return view

    def __copy__(self) -> RLSFilterBank:
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        return (
            f"RLSFilterBank(b={self.b}, n={self.n}, n_out={self.n_out}, ridge={self.ridge}, "
            f"{self._P.dtype}, {self._P.device})"
        )


def _numpy(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(np.float32 if dtype == torch.float32 else np.float64)


def _like(result: Tensor, given: Values) -> Any:
    """A tensor for who gave a tensor, an array for others."""
    return result if isinstance(given, Tensor) else result.cpu().numpy()
