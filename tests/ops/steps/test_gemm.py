"""The products of the steps, by whichever library takes them."""

import re
from pathlib import Path

import pytest
import torch
from support.compare import assert_close

from rlscuda import _C
from rlscuda._torch import onednn_linear
from rlscuda.functional import gemm

CPUINFO = Path("/proc/cpuinfo")
has_onednn = pytest.mark.skipif(
    onednn_linear is None or not torch.backends.mkldnn.is_available(), reason="needs oneDNN"
)
LAYOUTS = {  # name: (left, right)
    "dense": lambda m, k, n: (torch.randn(m, k), torch.randn(k, n)),
    "transposed left": lambda m, k, n: (torch.randn(k, m).t(), torch.randn(k, n)),
    "transposed right": lambda m, k, n: (torch.randn(m, k), torch.randn(n, k).t()),
    "some rows": lambda m, k, n: (torch.randn(m, k), torch.randn(k + 3, n)[1 : k + 1]),
    "strided left": lambda m, k, n: (torch.randn(m, 2 * k)[:, ::2], torch.randn(k, n)),
    "some columns": lambda m, k, n: (torch.randn(m, k), torch.randn(k, n + 1)[:, :n]),
}
DENSE = {"dense", "transposed left", "transposed right", "some rows"}


@pytest.fixture
def calls(monkeypatch):
    """Lets oneDNN be the faster one, and lists what it was asked for."""
    seen = []

    def linear(*arguments):
        seen.append(arguments)
        return onednn_linear(*arguments)

    monkeypatch.setattr(gemm, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(gemm, "onednn_linear", linear)
    return seen


@has_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "m, k, n", [(64, 160, 161), (300, 784, 785), (1, 1300, 1300), (2100, 40, 65)]
)
def test_equals_the_product(m, k, n, layout, bias, calls):
    a, b = LAYOUTS[layout](m, k, n)
    row = torch.randn(n) if bias else None
    out = torch.full((m, n), torch.nan)
    gemm.multiply(a, b, out, row)
    expected = a.double() @ b.double() + (0 if row is None else row.double())
    assert_close(out / k**0.5, expected / k**0.5, 5)
    assert len(calls) == (layout in DENSE) * (1 + (m > 2048))


@has_onednn
@pytest.mark.parametrize("case", ["float64", "small", "switched off", "of any minibatch"])
def test_what_gains_nothing_is_left_to_torch(case, calls):
    size, dtype = (40 if case == "small" else 200), torch.float32
    a = torch.randn(size, size, dtype=torch.float64 if case == "float64" else dtype)
    out = torch.empty_like(a)
    with torch.backends.mkldnn.flags(enabled=case != "switched off"):
        gemm.multiply(a, a, out, varying=37 if case == "of any minibatch" else 0)
    assert not calls and torch.equal(out, a @ a)


@has_onednn
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_rows(bad, calls):
    a, b = torch.randn(128, 128), torch.randn(128, 128)
    a[3, 5] = bad
    out = torch.empty(128, 128)
    gemm.multiply(a, b, out)
    assert calls and not out[3].isfinite().any()
    assert out[:3].isfinite().all() and out[4:].isfinite().all()


@pytest.mark.skipif(not CPUINFO.is_file(), reason="has no list of its processors to compare with")
def test_the_vendor_is_that_of_the_processor():
    ids = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
    named = re.search(r"^vendor_id\s*:\s*(\w+)", CPUINFO.read_text(), re.M)
    assert _C.cpu_vendor == ids.get(named[1] if named else "", "other")
