"""factors_agree: a gradient that is delta^T [x, 1] to rounding, and everything that is not."""

import math

import pytest
import torch
from support.operators import factors_agree

DTYPES = [torch.float32, torch.float64]
SHAPES = {  # rows N, outputs c, fan-in n
    "wide": (4, 70, 50), "one": (1, 1, 1), "one_row": (1, 9, 17), "one_output": (5, 1, 33),
    "one_input": (6, 7, 1), "odd": (3, 129, 65), "many_rows": (200, 3, 2), "no_rows": (0, 4, 5),
}  # fmt: skip


def factors(shape, dtype=torch.float64, bias=True, scale=1.0):
    """grad, x, delta and grad_bias, in this order, the gradient by the GEMM of autograd."""
    N, c, n = SHAPES[shape]
    x = torch.randn(N, n, dtype=dtype) * scale
    delta = torch.randn(N, c, dtype=dtype) / scale
    return [delta.T @ x, x, delta, delta.sum(0) if bias else None]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_a_linear_layer_agrees(shape, bias, dtype, scale):
    for seed in range(5):
        torch.manual_seed(seed)
        given = factors(shape, dtype, bias, scale)
        before = [None if t is None else t.clone() for t in given]
        assert factors_agree(*given) is True
        assert all(a is None or torch.equal(a, b) for a, b in zip(given, before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [(40, 60), (7, 300)])
def test_what_autograd_leaves_agrees(layer, dtype):
    linear = torch.nn.Linear(*layer, dtype=dtype)
    x = torch.randn(2, 3, layer[0], dtype=dtype) * 10 + 3  # a mean, as after a ReLU
    y = linear(x)
    y.retain_grad()
    (y.tanh().square().sum() * 1e3).backward()
    rows, delta = x.flatten(0, 1), y.grad.flatten(0, 1)
    assert factors_agree(linear.weight.grad, rows, delta, linear.bias.grad)


CHANGES = {
    "an_element": lambda g, x, d, b: g[0, 0].add_(1e-3),
    "last_element": lambda g, x, d, b: g[-1, -1].sub_(1e-3),
    "a_penalty": lambda g, x, d, b: g.add_(torch.randn_like(g), alpha=1e-3),
    "clipped": lambda g, x, d, b: (g.mul_(0.999), b.mul_(0.999)),
    "bias_alone": lambda g, x, d, b: b[-1].add_(1e-3),
    "zeroed_row": lambda g, x, d, b: g[1].zero_(),
    "other_rows": lambda g, x, d, b: x[0].mul_(1.001),
    "other_delta": lambda g, x, d, b: d[-1].mul_(1.001),
    "nan": lambda g, x, d, b: g[2, 1].fill_(math.nan),
    "infinite": lambda g, x, d, b: g[2, 1].fill_(math.inf),
    "nan_bias": lambda g, x, d, b: b[3].fill_(math.nan),
    "nan_rows": lambda g, x, d, b: x[0, 0].fill_(math.nan),
    "infinite_delta": lambda g, x, d, b: d[0, 0].fill_(-math.inf),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["wide", "odd"])
@pytest.mark.parametrize("change", CHANGES)
def test_any_other_gradient_does_not(change, shape, dtype):
    given = factors(shape, dtype)
    CHANGES[change](*given)
    assert factors_agree(*given) is False


def test_gradient_without_rows_is_zero():
    grad, x, delta, bias = factors("no_rows")
    assert factors_agree(grad, x, delta, bias)
    grad[1, 2] = 1e-30
    assert not factors_agree(grad, x, delta, bias)


@pytest.mark.parametrize("shape", ["wide", "one_row", "no_rows"])
def test_factors_of_any_strides_agree(shape):
    def apart(t):
        wide = torch.full([2 * size for size in t.shape], math.nan, dtype=t.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)

    given = factors(shape)
    for change in (apart, lambda t: t.t().contiguous().t()):
        assert factors_agree(*map(change, given))
    given[0][0, 1] += 1
    assert not factors_agree(*map(apart, given))


def test_a_gradient_without_inputs_is_that_of_the_bias():
    delta = torch.randn(5, 4)
    grad, x = torch.empty(4, 0), torch.empty(5, 0)
    assert factors_agree(grad, x, delta)
    assert factors_agree(grad, x, delta, delta.sum(0))
    assert not factors_agree(grad, x, delta, delta.sum(0) + 1)
    assert factors_agree(torch.empty(0, 0), torch.empty(0, 0), torch.empty(0, 0))


def test_large_gradient_on_many_threads():
    c, n = 2000, 1500
    x, delta = torch.randn(2, n), torch.randn(2, c)
    grad = delta.T @ x
    torch.set_num_threads(3)
    try:
        assert factors_agree(grad, x, delta)
        grad[c - 1, n // 2] += 1
        assert not factors_agree(grad, x, delta)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("message, changed", {
    "grad and x must be matrices, got [4] and [2, 3]": {"grad": torch.ones(4)},
    "grad and x must be matrices, got [4, 3] and [3]": {"x": torch.ones(3)},
    "x must be [2, 3], got [2, 5]": {"x": torch.ones(2, 5)},
    "delta must be [2, 4], got [3, 4]": {"delta": torch.ones(3, 4)},
    "delta must be [2, 4], got [2, 3]": {"delta": torch.ones(2, 3)},
    "grad_bias must be [4], got [3]": {"grad_bias": torch.ones(3)},
    "x must have the dtype of grad": {"x": torch.ones(2, 3).double()},
    "delta must have the dtype of grad": {"delta": torch.ones(2, 4).half()},
    "grad_bias must have the dtype of grad": {"grad_bias": torch.ones(4).bfloat16()},
}.items())  # fmt: skip
def test_wrong_argument(message, changed):
    given = {"grad": torch.ones(4, 3), "x": torch.ones(2, 3), "delta": torch.ones(2, 4),
             "grad_bias": torch.ones(4), **changed}  # fmt: skip
    with pytest.raises(ValueError) as caught:
        factors_agree(**given)
    assert message in str(caught.value)


def test_half_precision_is_refused():
    given = [t.half() for t in factors("wide")]
    with pytest.raises(ValueError, match="grad must be float32 or float64, got float16"):
        factors_agree(*given)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    given = factors("wide", bias=bias)
    torch.library.opcheck(torch.ops.rlscuda.factors_agree.default, tuple(given))


def test_gradients_may_be_tracked():
    given = [t.requires_grad_() for t in factors("wide")]
    assert factors_agree(*given)
