from typing import Any

from numpy.typing import NDArray

source_hash: str
simd: str
cpu_vendor: str
cuda_runtime: int | None
cuda_archs: str
health_slots: tuple[str, ...]

filter_slots: int

class Filter:
    rows: int
    forgetting: float
    gain: float
    ridge: float

    def __init__(
        self,
        P: NDArray[Any],
        W: NDArray[Any],
        V: NDArray[Any],
        squares: NDArray[Any],
        state: NDArray[Any],
    ) -> None: ...
    def update(self, x: Any, y: Any) -> NDArray[Any] | None: ...
    def run(
        self,
        X: NDArray[Any],
        Y: NDArray[Any],
        predictions: NDArray[Any],
        gains: NDArray[Any] | None = None,
        forgettings: NDArray[Any] | None = None,
        history: NDArray[Any] | None = None,
    ) -> int: ...
    def variance(self, X: NDArray[Any]) -> NDArray[Any]: ...
    def flush(self) -> None: ...

class Filter_float32(Filter): ...
class Filter_float64(Filter): ...
class RootFilter_float32(Filter): ...
class RootFilter_float64(Filter): ...
class Filter_complex64(Filter): ...
class Filter_complex128(Filter): ...
