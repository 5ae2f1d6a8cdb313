"""Products of matrices by the faster of the two libraries that torch has for them on a CPU.

`torch.mm` is that of MKL, which on processors of AMD leaves the upper half of AVX-512 unused.
oneDNN, which torch brings for convolutions, does not: there it takes 40 to 60 % of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlscuda import _C
from rlscuda._torch import onednn_linear

ONEDNN_IS_FASTER = (
    (_C.cpu_vendor, _C.simd) == ("amd", "x86-64-v4")
    and onednn_linear is not None
    and torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
)
_WORTH = 1_500_000  # multiplications: fewer do not pay for its longer call
# oneDNN makes code for every shape, in a millisecond and .8 MB: a size that may change from step to
# step must be a multiple of this
_REGULAR = 16
_AT_ONCE = 2048  # rows of its result, which it cannot write where it is wanted


def multiply(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, varying: int = 0
) -> None:
    """Writes a b + bias.

    Args:
        a: [m, k].
        b: [k, n].
        out: [m, n], none of the others.
        bias: [n], contiguous, or None.
        varying: The one of m, k and n that is that of a minibatch.
    """
    if ONEDNN_IS_FASTER and varying % _REGULAR == 0 and _suits_onednn(a, b):
        for some, result in zip(a.split(_AT_ONCE), out.split(_AT_ONCE)):
            result.copy_(onednn_linear(some, b.t(), bias, "none", [], ""))
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    if len(a) * b.numel() < _WORTH or a.dtype != torch.float32 or a.device.type != "cpu":
        return False
    # with other strides it falls back to loops
    dense = all(x.is_contiguous() or x.t().is_contiguous() for x in (a, b))
    return dense and bool(torch.backends.mkldnn.enabled)
