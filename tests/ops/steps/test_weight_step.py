"""weight_step_ and adaptive_weight_step_ against their specification, and errors."""

import math

import pytest
import torch
from support.compare import TOLERANCE, assert_same_by_any_threads, random_spd
from support.operators import adaptive_weight_step_, nonfinite, weight_step_

from rlscuda import reference

PAIRS = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16), (torch.float64, torch.float64),
    (torch.float64, torch.float32), (torch.float64, torch.bfloat16),
]  # fmt: skip
SHAPES = {
    "linear": (5, 7), "one": (1, 1), "row": (1, 33), "column": (17, 1), "wide": (3, 130),
    "conv": (6, 2, 3, 3), "pointwise": (4, 9, 1, 1),
}  # fmt: skip


class Problem:
    """A weight step's arguments, and the same as float64 matrices [c, n (+ 1)] per group."""

    def __init__(self, shape, compute, storage, bias=True, groups=1, last=False, seed=0):
        torch.manual_seed(seed)
        self.groups, c = groups, shape[0]
        self.weight = torch.randn(shape).to(storage)
        if last:
            self.weight = self.weight.to(memory_format=torch.channels_last)
        n = self.weight[0].numel()
        self.bias = torch.randn(c).to(storage) if bias else None
        self.grad = torch.randn(c, n, dtype=compute)
        self.grad_bias = torch.randn(c).to(storage) if bias else None
        self.P = random_spd(groups, n + bias, dtype=compute)
        self.columns = n + bias
        self.h = 1 + torch.rand(groups, dtype=compute)
        self.buffer = torch.randn(c, self.columns, dtype=compute)
        # W and G with the bias as their last column, D = G P
        self.W = self.matrix(self.weight.flatten(1), self.bias)
        self.G = self.matrix(self.grad, self.grad_bias)
        self.D = (self.G.view(groups, -1, self.columns) @ self.P.double()).flatten(0, 1)
        parts = self.grad.view(groups, -1, n) @ self.P[:, :n]
        self.product = parts.flatten(0, 1)
        self.bias_row = self.P[:, n] if bias else None

    def matrix(self, weight, bias):
        columns = [weight] if bias is None else [weight, bias[:, None].to(weight.dtype)]
        return torch.cat(columns, 1).double().clone()

    def step(self, **options):
        weight_step_(
            self.weight, self.product, bias=self.bias, bias_row=self.bias_row,
            grad_bias=self.grad_bias, **options,
        )  # fmt: skip

    def check(self, expected):
        actual = self.matrix(self.weight.flatten(1), self.bias)
        rtol, atol = TOLERANCE[self.weight.dtype]
        torch.testing.assert_close(actual, expected, rtol=2 * rtol, atol=10 * atol)


@pytest.mark.parametrize("compute, storage", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("momentum, divide", [(0.0, True), (0.8, True), (0.8, False)])
def test_weight_step(compute, storage, shape, bias, momentum, divide):
    p = Problem(SHAPES[shape], compute, storage, bias)
    buffer = p.buffer.clone() if momentum else None
    p.step(lr=0.3, momentum=momentum, weight_decay=0.1, h=p.h, divide_by_h=divide,
           momentum_buffer=buffer)  # fmt: skip
    expected, moved = reference.weight_step(
        p.W, p.D, 0.3, p.buffer.double() if momentum else None, momentum, 0.1,
        p.h.double() if divide else None,
    )  # fmt: skip
    p.check(expected)
    if momentum:
        rtol, atol = TOLERANCE[compute]
        torch.testing.assert_close(buffer.double(), moved, rtol=5 * rtol, atol=20 * atol)


@pytest.mark.parametrize("compute, storage", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_adaptive_weight_step(compute, storage, shape, bias):
    p = Problem(SHAPES[shape], compute, storage, bias)
    M, v = p.buffer.clone(), torch.rand(p.W.shape[0], dtype=compute)
    constants = reference.AdaptiveStep(0.05, 0.9, 0.99, 0.1, 1e-8)
    expected, first, second = reference.adaptive_weight_step(
        p.W, p.D, p.G, M.double(), v.double(), 3, constants
    )
    adaptive_weight_step_(
        p.weight, p.product, p.grad, M, v, 0.05, 3, bias=p.bias, bias_row=p.bias_row,
        grad_bias=p.grad_bias, h=p.h, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8,
    )  # fmt: skip
    p.check(expected)
    rtol, atol = TOLERANCE[compute]
    torch.testing.assert_close(M.double(), first, rtol=5 * rtol, atol=20 * atol)
    torch.testing.assert_close(v.double(), second, rtol=5 * rtol, atol=20 * atol)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_groups_have_their_own_matrix_and_h(adaptive, bias):
    p = Problem((6, 2, 3, 3), torch.float64, torch.float64, bias, groups=3)
    if adaptive:
        M, v = p.buffer.clone(), torch.rand(6).double()
        expected = reference.adaptive_weight_step(
            p.W, p.D, p.G, M, v, 1, reference.AdaptiveStep(0.05)
        )[0]
        adaptive_weight_step_(
            p.weight, p.product, p.grad, M, v, 0.05, 1, bias=p.bias, bias_row=p.bias_row,
            grad_bias=p.grad_bias, h=p.h,
        )  # fmt: skip
    else:
        rows_h = p.h.repeat_interleave(2)
        expected = reference.weight_step(p.W, p.D, 0.3, h=rows_h)[0]
        p.step(lr=0.3, h=p.h, divide_by_h=True)
    p.check(expected)


@pytest.mark.parametrize("adaptive", [False, True])
def test_rows_without_a_finite_h_are_left_alone(adaptive):
    p = Problem((6, 4), torch.float64, torch.float64, True, groups=3)
    p.h[1] = math.nan
    M, v = p.buffer.clone(), torch.rand(6).double()
    before = [t.clone() for t in (p.weight, p.bias, M, v)]
    if adaptive:
        adaptive_weight_step_(
            p.weight, p.product, p.grad, M, v, 0.05, 1, bias=p.bias, bias_row=p.bias_row,
            grad_bias=p.grad_bias, h=p.h,
        )  # fmt: skip
        after = (p.weight, p.bias, M, v)
    else:
        p.step(lr=0.3, h=p.h, momentum_buffer=M, momentum=0.5, weight_decay=0.1)
        after = (p.weight, p.bias, M)
    for old, new in zip(before, after):
        assert torch.equal(old[2:4], new[2:4])
        assert (old[[0, 1, 4, 5]] != new[[0, 1, 4, 5]]).all()


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_weight_stays_so(storage):
    p = Problem((6, 3, 2, 4), torch.float32, storage, last=True)
    pointer, strides = p.weight.data_ptr(), p.weight.stride()
    assert not p.weight.is_contiguous()
    expected = reference.weight_step(p.W, p.D, 0.3)[0]
    p.step(lr=0.3)
    assert (p.weight.data_ptr(), p.weight.stride()) == (pointer, strides)
    p.check(expected)


def test_transposed_weight():
    p = Problem((6, 5), torch.float32, torch.float32)
    p.weight = p.weight.t().contiguous().t()
    expected = reference.weight_step(p.W, p.D, 0.3)[0]
    p.step(lr=0.3)
    p.check(expected)


def test_complete_product_needs_no_bias_row():
    p = Problem((6, 5), torch.float64, torch.float64)
    weight_step_(p.weight, p.D.clone(), 0.3, bias=p.bias)
    p.check(reference.weight_step(p.W, p.D, 0.3)[0])


@pytest.mark.parametrize("adaptive", [False, True])
def test_vectors_and_gradients_of_any_strides(adaptive):
    def apart(t):
        wide = torch.full([2 * size for size in t.shape], math.nan, dtype=t.dtype)
        wide[tuple(slice(None, None, 2) for _ in t.shape)] = t
        return wide[tuple(slice(None, None, 2) for _ in t.shape)]

    def step(p, change):
        names = ("bias", "grad_bias", "bias_row", "h", "grad")
        bias, grad_bias, row, h, grad = (change(getattr(p, name)) for name in names)
        options = {"bias": bias, "grad_bias": grad_bias, "bias_row": row, "h": h}
        if adaptive:
            M, v = p.buffer.clone(), torch.ones(6)
            adaptive_weight_step_(p.weight, p.product, grad, M, v, 0.1, 1, **options)
        else:
            weight_step_(p.weight, p.product, 0.1, divide_by_h=True, **options)
        return p.weight, bias.contiguous()

    results = [
        step(Problem((6, 5), torch.float32, torch.float32, groups=2), change)
        for change in (lambda t: t, apart)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_weight_and_bias_that_are_columns_of_one_matrix():
    p = Problem((6, 5), torch.float32, torch.float32)
    both = torch.cat([p.weight, p.bias[:, None]], 1)
    p.weight, p.bias = both[:, :5], both[:, 5]
    expected = reference.weight_step(p.W, p.D, 0.3)[0]
    p.step(lr=0.3)
    p.check(expected)
    p.bias = both[:, 4]
    with pytest.raises(ValueError, match="weight and bias must not share memory"):
        p.step(lr=0.3)


def test_nothing_shares_memory_with_what_is_written():
    D = torch.ones(4, 3)
    with pytest.raises(ValueError, match="product and momentum_buffer must not share memory"):
        weight_step_(torch.ones(4, 3), D, 0.1, momentum=0.5, momentum_buffer=D)
    with pytest.raises(ValueError, match="must not share memory, since one of them is written"):
        adaptive_weight_step_(D, torch.ones(4, 3), D, torch.ones(4, 3), torch.ones(4), 0.1, 1)


def test_weight_without_columns_moves_its_bias():
    bias = torch.ones(4)
    weight_step_(torch.ones(4, 0), torch.ones(4, 1), 0.5, bias=bias)
    assert torch.equal(bias, torch.full((4,), 0.5))


def test_many_rows_on_many_threads_are_the_same_bits():
    def run(p):
        p.step(lr=0.1, h=p.h, divide_by_h=True)
        return [p.weight]

    options = {"compute": torch.float32, "storage": torch.float32}
    assert_same_by_any_threads(
        lambda: Problem((300, 257), seed=torch.initial_seed(), **options), run
    )


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_half_precision_rounds_as_torch_does(compute, storage):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(storage).float()
    finite = every[every.isfinite()].sort().values
    ties = (finite[:-1].double() + finite[1:].double()).div(2).float()
    bits = torch.arange(-(2**31), 2**31, 8191).to(torch.int32)
    values = [every, ties, bits.view(torch.float32)]
    values += [ties.nextafter(torch.tensor(to)) for to in (-math.inf, math.inf)]
    product = torch.cat(values).to(compute)[None]
    weight = torch.full_like(product, -0.0, dtype=storage)
    weight_step_(weight, product.clone(), -1.0)  # -0 + product, to the sign of a zero
    expected = product.to(storage)
    assert torch.equal(weight.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(weight[number].view(torch.int16), expected[number].view(torch.int16))


def wrong_arguments():
    f = torch.float32
    return {
        "weight must be [c, n] or [c, C, kh, kw], got [4]": {"weight": torch.ones(4)},
        "product must be [4, 4], got [4, 3]": {"product": torch.ones(4, 3)},
        "bias must be [4], got [3]": {"bias": torch.ones(3)},
        "bias must have the dtype of weight": {"bias": torch.ones(4).double()},
        "bias must not be expanded or overlap itself": {"bias": torch.ones(1).expand(4)},
        "grad_bias must be [4], got [5]": {"grad_bias": torch.ones(5)},
        "grad_bias must have the dtype of weight": {"grad_bias": torch.ones(4).half()},
        "h has 4 groups, bias_row 2": {"bias_row": torch.ones(2, 4), "h": torch.ones(4)},
        "h has 2 groups, bias_row 1": {"h": torch.ones(2)},
        "weight must not be expanded or overlap itself, got strides [1, 1] of [4, 3]": {
            "weight": torch.ones(6).as_strided((4, 3), (1, 1))},
        "lr must be a finite number": {"lr": math.nan},
        "weight_decay must be a finite number": {"weight_decay": 1e39},
        "momentum must be a finite number": {"momentum": math.inf},
        "bias_row must be [4] or a batch of such, got [3]": {"bias_row": torch.ones(3)},
        "bias_row has 3 groups, which do not divide 4 rows": {"bias_row": torch.ones(3, 4)},
        "bias_row must have the dtype of product": {"bias_row": torch.ones(4).double()},
        "bias_row completes the product": {"grad_bias": None},
        "h has 3 groups, which do not divide 4 rows": {"h": torch.ones(3)},
        "h must have the dtype of product": {"h": torch.ones(1).double()},
        "momentum_buffer must have 16 elements, got [4, 3]": {
            "momentum_buffer": torch.ones(4, 3)},
        "momentum_buffer must have the dtype of product": {
            "momentum_buffer": torch.ones(4, 4).double()},
        "momentum_buffer must be contiguous": {"momentum_buffer": torch.ones(8, 4)[::2]},
        "product must be float32 or float64": {"product": torch.ones(4, 4, dtype=torch.half)},
        "weight must be float32, bfloat16 or float16, or float64 with a float64 P": {
            "weight": torch.ones(4, 3).double(), "bias": torch.ones(4).double(),
            "grad_bias": torch.ones(4).double(), "bias_row": torch.ones(4, dtype=f)},
    }  # fmt: skip


@pytest.mark.parametrize("message", wrong_arguments())
def test_wrong_argument(message):
    changed = wrong_arguments()[message]
    arguments = {
        "weight": torch.ones(4, 3), "product": torch.ones(4, 4), "bias": torch.ones(4),
        "grad_bias": torch.ones(4), "bias_row": torch.ones(4), "h": torch.ones(1),
        "momentum_buffer": torch.zeros(4, 4), "lr": 0.1, "momentum": 0.5, **changed,
    }  # fmt: skip
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError) as caught:
        weight_step_(**arguments)
    assert message in str(caught.value)
    assert all(torch.equal(arguments[k], v) for k, v in before.items())


def test_momentum_without_its_buffer():
    with pytest.raises(ValueError, match="momentum needs a momentum_buffer"):
        weight_step_(torch.ones(2, 2), torch.ones(2, 2), 0.1, momentum=0.5)


@pytest.mark.parametrize("message, changed", {
    "step must count from 1, got 0": {"step": 0},
    "grad must have 12 elements, got [4, 2]": {"grad": torch.ones(4, 2)},
    "grad must have the dtype of product": {"grad": torch.ones(4, 3).double()},
    "beta1 must be in [0, 1), got 1": {"beta1": 1.0},
    "beta2 must be in [0, 1), got nan": {"beta2": math.nan},
    "eps must be >= 0, got -1": {"eps": -1.0},
    "grad_bias is expected where there is a bias": {"bias": torch.ones(4),
                                                    "product": torch.ones(4, 4),
                                                    "first_moment": torch.zeros(4, 4)},
    "first_moment must have 12 elements, got [4]": {"first_moment": torch.zeros(4)},
    "second_moment must have 4 elements, got [3]": {"second_moment": torch.zeros(3)},
}.items())  # fmt: skip
def test_wrong_adaptive_argument(message, changed):
    arguments = {
        "weight": torch.ones(4, 3), "product": torch.ones(4, 3), "grad": torch.ones(4, 3),
        "first_moment": torch.zeros(4, 3), "second_moment": torch.zeros(4), "lr": 0.1, "step": 1,
        **changed,
    }  # fmt: skip
    with pytest.raises(ValueError) as caught:
        adaptive_weight_step_(**arguments)
    assert message in str(caught.value)
    assert torch.equal(arguments["weight"], torch.ones(4, 3))


def test_opcheck():
    ops = torch.ops.rlscuda
    weight, bias, product = torch.ones(4, 3), torch.ones(4), torch.ones(4, 4)
    torch.library.opcheck(ops.weight_step_.default, (
        weight, bias, product, torch.ones(4), torch.ones(4), torch.ones(1), torch.zeros(4, 4),
        0.1, 0.9, 0.1, True,
    ))  # fmt: skip
    torch.library.opcheck(ops.adaptive_weight_step_.default, (
        weight, bias, product, torch.ones(4, 3), torch.ones(4), torch.ones(4), torch.ones(1),
        torch.zeros(4, 4), torch.ones(4), 0.1, 0.9, 0.99, 0.1, 1e-8, 1,
    ))  # fmt: skip
    torch.library.opcheck(ops.nonfinite.default, ([torch.ones(3), torch.ones(2)],))


def test_compiles_without_a_graph_break():
    def step(weight, product, buffer):
        weight_step_(weight, product, 0.1, momentum_buffer=buffer, momentum=0.9)
        return weight.sum() + nonfinite([weight])

    def arguments():
        return torch.ones(4, 3), torch.full((4, 3), 2.0), torch.zeros(4, 3)

    eager, compiled = arguments(), arguments()
    expected = step(*eager)
    assert expected == torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))
