"""What the benchmarks of the patch operators share."""

from __future__ import annotations

from torch import Tensor

from benchmarks.common import harness


def memory(run: harness.Lane, result: Tensor | tuple[Tensor, ...], x: Tensor) -> dict[str, int]:
    """Asserts that one call allocates no tensor beyond its result, and says what memory it took.

    Args:
        run: The call.
        result: What it returns.
        x: Its input, whose bytes the scratch memory is compared with.
    """
    tensors = result if isinstance(result, tuple) else (result,)
    expected = sum(-(-t.nbytes // 64) * 64 for t in tensors)  # the allocator may round up
    allocated = harness.tensor_bytes(run)
    assert allocated <= expected, f"{expected} bytes of results, but {allocated} were allocated"
    facts = {"result_bytes": sum(t.nbytes for t in tensors), "allocated_bytes": allocated}
    peak = harness.peak_bytes(run)
    if peak is not None:
        limit = max(1 << 20, x.nbytes // 8)
        assert peak <= limit, f"the peak of resident memory grew by {peak} bytes"
        facts["peak_growth_bytes"] = peak
    return facts
