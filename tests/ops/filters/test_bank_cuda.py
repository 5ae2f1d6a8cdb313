"""RLSFilterBank on a GPU against the CPU, and in a CUDA graph. RLSCUDA_TEST_DEVICE=cpu tries it."""

import os

import pytest
import torch
from support.compare import assert_close

from rlscuda import RLSFilterBank

DEVICE = torch.device(os.environ.get("RLSCUDA_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"
)


def banks(b, n, n_out=1, dtype=torch.float64):
    forgetting = torch.linspace(0.9, 1, b, device="cpu")
    return (RLSFilterBank(b, n, n_out, forgetting, dtype=dtype, device=d) for d in (DEVICE, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "b, n, n_out", [(1, 1, 1), (500, 10, 1), (7, 32, 3), (5, 64, 2), (2, 300, 1)]
)
def test_is_that_of_the_cpu(b, n, n_out, dtype):
    ours, cpu = banks(b, n, n_out, dtype)
    for step in range(20):
        x = torch.randn(b, n, dtype=dtype, device="cpu")
        y = torch.randn(b, n_out, dtype=dtype, device="cpu")
        index = torch.randperm(b, device="cpu")[: b // 2 + 1] if step % 2 else None
        rows = slice(None) if index is None else index
        wanted = cpu.update(x[rows], y[rows], index=index)
        given = None if index is None else index.to(DEVICE)
        got = ours.update(x[rows].to(DEVICE), y[rows].to(DEVICE), index=given)
        assert_close(got.cpu(), wanted, 200)
    assert torch.equal(ours.P, ours.P.mT)
    assert_close(ours.P.cpu(), cpu.P, 200)
    assert_close(ours.W.cpu(), cpu.W, 200)
    assert_close(ours.variance(x.to(DEVICE)).cpu(), cpu.variance(x), 200)
    assert torch.equal(ours.updates.cpu(), cpu.updates)


@pytest.mark.skipif(not ON_GPU, reason="is about a GPU's own machinery")
def test_a_captured_update_goes_on_counting_and_waits_for_nothing():
    ours, twin = (next(banks(50, 10)) for _ in range(2))
    x, y = torch.randn(50, 10, device=DEVICE).double(), torch.randn(50, 1, device=DEVICE).double()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours.update(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        predictions = ours.update(x, y)
    for _ in range(19):
        graph.replay()
    for _ in range(20):
        wanted = twin.update(x, y)
    assert torch.equal(predictions, wanted) and torch.equal(ours.P, twin.P)
    assert (ours.updates == 20).all()
    x[3, 0] = torch.nan
    graph.replay()
    assert ours.refused[3] == 1 and ours.updates.sum() == 50 * 21 - 1
