from typing import Any

from numpy.typing import NDArray

source_hash: str
simd: str
cuda_runtime: int | None
cuda_archs: str
health_slots: tuple[str, ...]

def rls_filter_run(
    P: NDArray[Any],
    W: NDArray[Any],
    X: NDArray[Any],
    Y: NDArray[Any],
    forgetting: float,
    gain: float,
    decay: float,
    diffusion: float,
    initial_scale: float,
    held: NDArray[Any],
    state: NDArray[Any],
) -> tuple[NDArray[Any], int]: ...
def rls_filter_flush(P: NDArray[Any], held: NDArray[Any], state: NDArray[Any]) -> None: ...
