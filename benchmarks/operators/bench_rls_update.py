"""`rls_update_` against eager PyTorch, `torch.compile` of it, and copy bandwidth.

Eager, rank 1, is the best formulation there is: u = P s by `mv`, h = λ + κ s·u as a Python number
(`addr_` takes no tensor), one in-place `addr_`. `eager without h` leaves h out and so computes
something else; it shows what the two passes over P alone cost. `held` holds the updates back, 16 to
a write of P; its time is that of one.
"""

import pytest
import torch

from benchmarks.common import eager_rls, shapes
from benchmarks.operators.updates import GAIN, UPDATES, held_updates, ours
from rlscuda import reference

COMPILED = (128, 512, 1024)  # each shape costs seconds to compile
LARGE = 4096  # from here on P is far larger than any cache


def eager(P, s):
    u = torch.mv(P, s)
    h = 1.0 + GAIN * torch.dot(s, u).item()
    P.addr_(u, u, alpha=-GAIN / h)


def eager_batched(P, s):
    u = torch.bmm(P, s.transpose(1, 2))
    h = 1.0 + GAIN * torch.bmm(s, u)
    P.baddbmm_(u, u.transpose(1, 2) * (GAIN / h), alpha=-1)


def eager_without_h(P, s):
    u = torch.mv(P, s)
    P.addr_(u, u, alpha=-1e-6)


def compilable(P, s):
    u = torch.mv(P, s)
    h = 1.0 + GAIN * torch.dot(s, u)
    P.sub_((GAIN / h) * (u[:, None] * u[None, :]))


def assert_right(case):
    """Ours and the eager form against the float64 specification, after two updates."""
    P, s = case.tensors()
    expected = P.double().reshape(-1, case.n, case.n)
    rows = s.double().reshape(len(expected), case.rank, case.n)
    for _ in range(2):
        expected = torch.stack(
            [reference.rls_update(p, r, gain=GAIN)[0] for p, r in zip(expected, rows)]
        )
    for update in (ours, baseline(case)):
        result = P.clone()
        for _ in range(2):
            update(result, s)
        torch.testing.assert_close(result.double(), expected.view_as(P), rtol=1e-4, atol=1e-5)


def baseline(case):
    if case.batch:
        return eager_batched
    if case.rank > 1:
        return lambda P, s: eager_rls.rls_update(P, s, GAIN, 1.0, 1.0, 0.0)
    return eager


@pytest.mark.parametrize("case", shapes.UPDATES, ids=lambda c: c.name)
def test_rls_update(race, case):
    if case.n <= 1024:
        assert_right(case)

    def lane(update):
        P, s = case.tensors()
        return lambda: update(P, s)

    lanes = {"ours": lane(ours), "eager": lane(baseline(case))}
    targets, work = {}, {}
    traffic = None
    if case.rank == 1 and not case.batch:
        lanes["eager without h"] = lane(eager_without_h)
        if 128 <= case.n <= 1024:
            targets["ours / eager"] = 0.6
        if case.n in COMPILED:
            lanes["compiled"] = lane(torch.compile(compilable, dynamic=False))
    if case.n >= LARGE:
        traffic = 12 * case.n**2
        targets["ours / copy floor"] = 1.25
    if case.rank == 1 and case.n >= 512:
        lanes["held"] = held_updates(case)
        work["held"] = UPDATES
    if "held" in lanes and case.n >= LARGE:
        targets["held / copy floor"] = 0.5
    race(
        case.name,
        lanes,
        targets=targets,
        traffic=traffic,
        facts={"n": case.n, "rank": case.rank, "batch": case.batch},
        work=work,
        rounds=6 if case.n >= LARGE else 20,
    )
