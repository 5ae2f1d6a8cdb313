"""`rls_update_` on a GPU against eager PyTorch and copy bandwidth; streaming updates in a graph.

Eager keeps h on the device, as ours does. `graph` is a CUDA graph of 16 updates, the way to stream
samples into a read-out without paying for launches; its time is that of one update. `held` and
`held graph` hold the updates back, 16 to a write of P.
"""

import pytest
import torch

from benchmarks.common import eager_rls, shapes
from benchmarks.operators.updates import GAIN, UPDATES, held_updates, ours

CASES = [
    *(shapes.UpdateCase(n) for n in (512, 1024, 2048, 4096, 8192)),
    *(shapes.UpdateCase(n, rank=16) for n in (512, 2048, 4096)),
    *(shapes.UpdateCase(n, rank=64) for n in (512, 2048)),
    shapes.UpdateCase(64, batch=256),
]
STREAMS = [shapes.UpdateCase(n) for n in (1000, 2000, 5000, 10000)]


def eager(P, s):
    if P.dim() == 3:
        u = torch.bmm(P, s.transpose(1, 2))
        h = 1.0 + GAIN * torch.bmm(s, u)
        P.baddbmm_(u, u.transpose(1, 2) * (GAIN / h), alpha=-1)
    else:
        eager_rls.rls_update(P, s.view(-1, s.shape[-1]), GAIN, 1.0, 1.0, 0.0)


def captured(run):
    """A CUDA graph of what `run` does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_rls_update(race, case):
    results = []
    for update in (ours, eager):
        P, s = case.tensors(device="cuda")
        for _ in range(2):
            update(P, s)
        results.append(P)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    lanes = {}
    for name, update in (("ours", ours), ("eager", eager)):
        P, s = case.tensors(device="cuda")
        lanes[name] = lambda update=update, P=P, s=s: update(P, s)
    large = case.n >= 4096 and case.rank == 1
    targets, ratios = {}, ["ours / eager", "ours / copy floor"]
    if large:
        lanes["held"] = held_updates(case, "cuda")
        targets = {"ours / copy floor": 1.2, "held / copy floor": 0.5}
    race(
        case.name,
        lanes,
        targets=targets,
        ratios=ratios,
        traffic=12 * case.n**2 * max(1, case.batch),
        rounds=12,
        work={"held": UPDATES} if large else None,
    )


@pytest.mark.parametrize("case", STREAMS, ids=lambda c: c.name)
def test_streaming(race, case):
    P, s = case.tensors(device="cuda")
    ours(P, s)

    def run():
        for _ in range(UPDATES):
            ours(P, s)

    graphs = {"graph": captured(run), "held graph": captured(held_updates(case, "cuda"))}
    race(
        f"{case.name}, streaming",
        {name: graph.replay for name, graph in graphs.items()},
        targets={"graph / copy floor": 1.25, "held graph / copy floor": 1.25},
        ratios=["held graph / graph"],
        traffic=12 * case.n**2,
        rounds=12,
        work=dict.fromkeys(graphs, UPDATES),
    )
