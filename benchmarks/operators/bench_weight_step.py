"""The fused weight steps against their eager formulation, with and without the product G·P.

`step` is all that follows the product: the bias' part, 1/h, momentum, decay and the store. `step
and product` adds the GEMM: of the eager form that of torch.mm, at the rate shown in the facts, of
ours the faster of torch's two, as in a step (`rlscuda/functional/gemm.py`). Of the spectral form it
is what precedes the product: the average of the gradients, looked ahead.
"""

import pytest
import torch

from benchmarks.common import shapes
from rlscuda import reference
from rlscuda.functional.gemm import multiply

_ops = torch.ops.rlscuda

LR, MOMENTUM, BETA2, DECAY, EPS, STEP = 1e-3, 0.9, 0.99, 0.01, 1e-8, 5


class Problem:
    """One layer's tensors; every lane has its own."""

    def __init__(self, case):
        generator = torch.Generator().manual_seed(0)
        c, n = case.outputs, case.inputs

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.weight, self.bias, self.grad, self.grad_bias = draw(c, n), draw(c), draw(c, n), draw(c)
        self.P = torch.eye(n + 1) + 1e-3 * torch.ones(n + 1, n + 1)
        self.h, self.moment, self.second = torch.tensor(1.5), draw(c, n + 1), draw(c).square()
        self.product = torch.empty(c, n + 1)
        self.gradient = torch.cat((self.grad, self.grad_bias[:, None]), 1)
        self.multiply()
        self.whole = self.gradient @ self.P

    def multiply(self):
        multiply(self.grad, self.P[: len(self.P) - 1], self.product)

    def parameters(self):
        """W with its bias as last column."""
        return torch.cat((self.weight, self.bias[:, None]), 1)


def fused_paper(p):
    _ops.weight_step_(
        p.weight, p.bias, p.product, p.P[-1], p.grad_bias, p.h, p.moment, LR, MOMENTUM, DECAY, True
    )  # fmt: skip


def fused_adaptive(p):
    _ops.adaptive_weight_step_(
        p.weight, p.bias, p.product, p.grad, p.P[-1], p.grad_bias, p.h, p.moment, p.second, LR,
        MOMENTUM, BETA2, DECAY, EPS, STEP,
    )  # fmt: skip


def move(p, direction, alpha):
    n = p.weight.shape[1]
    keep = 1 - LR * DECAY
    p.weight.mul_(keep).add_(direction[:, :n], alpha=alpha)
    p.bias.mul_(keep).add_(direction[:, n], alpha=alpha)


def eager_paper(p, product):
    p.moment.mul_(MOMENTUM).add_(product, alpha=1 / p.h.item())
    move(p, p.moment, -LR)


def eager_adaptive(p, product):
    p.second.mul_(BETA2).add_((product * p.gradient).sum(1), alpha=1 - BETA2)
    p.moment.lerp_(product, 1 - MOMENTUM)
    root = p.second.clamp(min=0).div_(1 - BETA2**STEP).sqrt_().add_(EPS)
    move(p, p.moment / root[:, None], -LR / (1 - MOMENTUM**STEP))


FORMS = {"paper": (fused_paper, eager_paper), "adaptive": (fused_adaptive, eager_adaptive)}


def specified(form, p):
    W, D, M = p.parameters().double(), p.whole.double(), p.moment.double()
    if form == "paper":
        h = p.h.double()
        return reference.weight_step(W, D, LR, M, MOMENTUM, DECAY, h)[0]
    constants = reference.AdaptiveStep(LR, MOMENTUM, BETA2, DECAY, EPS)
    G = p.gradient.double()
    return reference.adaptive_weight_step(W, D, G, M, p.second.double(), STEP, constants)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", shapes.WEIGHTS, ids=lambda c: c.name)
def test_weight_step(race, case, form):
    fused, eager = FORMS[form]
    p, q = Problem(case), Problem(case)
    expected = specified(form, p)
    fused(p)
    eager(q, q.whole)
    for result in (p, q):
        torch.testing.assert_close(result.parameters().double(), expected, rtol=1e-4, atol=1e-4)

    p, q, full, plain = (Problem(case) for _ in range(4))
    lanes = {
        "step": lambda: fused(p),
        "eager step": lambda: eager(q, q.whole),
        "product and step": lambda: (full.multiply(), fused(full)),
        "eager product and step": lambda: eager(plain, torch.mm(plain.gradient, plain.P)),
    }
    race(
        f"{case.name}, {form}",
        lanes,
        ratios=["step / eager step", "product and step / eager product and step"],
        facts={"product_flop": 2 * case.outputs * case.inputs * (case.inputs + 1)},
        rounds=8 if case.inputs > 2000 else 20,
    )


def fused_momentum(p):
    one = p.h.view(1)
    flat, peak, length = _ops.foreach_nesterov_(
        [p.grad], [p.grad_bias], [p.moment], one, [0], [1], [len(p.grad)], MOMENTUM
    )  # fmt: skip
    return flat.view(1, *p.moment.shape), peak, length


def eager_momentum(p):
    ahead = torch.cat((p.grad, p.grad_bias[:, None]), 1)
    p.moment.lerp_(ahead, 1 - MOMENTUM)
    ahead.lerp_(p.moment, MOMENTUM)
    peak = ahead.abs().amax()
    ahead.div_(peak.clamp(min=torch.finfo(ahead.dtype).tiny))
    return ahead[None], peak[None], torch.linalg.vector_norm(ahead)[None]


@pytest.mark.parametrize("case", shapes.WEIGHTS, ids=lambda c: c.name)
def test_momentum(race, case):
    p, q = Problem(case), Problem(case)
    average, ahead = reference.nesterov(p.moment.double(), p.gradient.double(), MOMENTUM)
    for problem, run in ((p, fused_momentum), (q, eager_momentum)):
        found, peak, length = run(problem)
        torch.testing.assert_close(problem.moment.double(), average, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(peak[0].double(), ahead.abs().amax(), rtol=1e-5, atol=1e-5)
        normal = ahead / ahead.abs().amax()
        torch.testing.assert_close(found[0].double(), normal, rtol=1e-5, atol=1e-5)
        # torch's norm of a million elements is off by 2e-5
        torch.testing.assert_close(length[0].double(), normal.norm(), rtol=1e-4, atol=1e-5)
    race(
        f"{case.name}, spectral",
        {"step": lambda: fused_momentum(p), "eager step": lambda: eager_momentum(q)},
        ratios=["step / eager step"],
        rounds=8 if case.inputs > 2000 else 20,
    )
