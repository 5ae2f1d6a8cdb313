"""foreach_weight_step_ and foreach_complete_products_, many layers a call: as the reference."""

import itertools
import math

import pytest
import torch
from support.compare import TOLERANCE, assert_close, assert_same_by_any_threads, random_spd
from support.op_cases import VALID
from torch import Tensor

import rlscuda.functional  # noqa: F401  (its import registers the operators)
from rlscuda import _C, reference

_ops = torch.ops.rlscuda
SLOTS = _C.health_slots
STEPS, MISSING, EARLIER = (SLOTS.index(name) for name in ("steps", "missing", "earlier"))
SHAPES = {
    "linear": ((5, 7), 1), "wide": ((3, 300), 1), "one": ((1, 1), 1), "many": ((40, 33), 1),
    "conv": ((6, 2, 3, 3), 2), "long": ((4, 31, 3, 3), 1), "depthwise": ((8, 1, 2, 3), 8),
}  # fmt: skip
PAIRS = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16), (torch.float64, torch.float64), (torch.float64, torch.float32),
]  # fmt: skip


class Steps:
    """The arguments of a step of many layers, and what it must make of them, in float64."""

    def __init__(self, compute, storage, adaptive, momentum=0.9, repeat=1, bad_group=False):
        self.compute, self.adaptive, self.momentum = compute, adaptive, momentum
        kinds = list(itertools.product(SHAPES.values(), (True, False), (False, True))) * repeat
        names = "weight bias product grad bias_row grad_bias h first second health matrices"
        for name in names.split():
            setattr(self, name, [])
        self.groups = []
        empty = torch.empty(0, dtype=storage)
        for (shape, groups), bias, last in kinds:
            c, n = shape[0], math.prod(shape[1:])
            weight = torch.randn(shape).to(storage)
            if last:  # another dense layout
                weight = weight.to(memory_format=torch.channels_last) if len(shape) == 4 else (
                    weight.t().contiguous().t())  # fmt: skip
            P = random_spd(groups, n + bias, dtype=compute)
            grad = torch.randn(c, n).to(compute)
            grad_bias = torch.randn(c).to(storage) if bias else empty
            product = torch.zeros(c, n + bias, dtype=compute)
            product.view(groups, -1, n + bias).copy_(grad.view(groups, -1, n) @ P[:, :n])
            G = torch.cat([grad, grad_bias[:, None].to(compute)], 1).double() if bias else (
                grad.double())  # fmt: skip
            D = (G.view(groups, -1, n + bias) @ P.double()).flatten(0, 1)
            self.matrices.append((D, G))
            self.weight.append(weight)
            self.bias.append(torch.randn(c).to(storage) if bias else empty)
            self.product.append(product)
            self.grad.append(grad)
            self.bias_row.append(P[:, n] if bias else torch.empty(0, dtype=compute))
            self.grad_bias.append(grad_bias)
            self.h.append(1 + torch.rand(groups).to(compute))
            self.first.append(torch.randn(c, n + bias).to(compute))
            self.second.append(torch.rand(c).to(compute))
            health = torch.zeros(len(SLOTS), dtype=torch.float64)
            health[STEPS], health[MISSING] = 4, len(self.health) % 3
            health[EARLIER] = len(self.health) % 4
            self.health.append(health)
            self.groups.append(groups)
        if bad_group:
            self.h[-1][0] = math.nan

    def complete(self) -> Tensor:
        """Completes the products; the norms [2, matrices]."""
        norms = _ops.foreach_complete_products_(
            self.product, self.weight, self.bias, self.bias_row, self.grad_bias, self.groups
        )
        self.bias_row = [row[:0] for row in self.bias_row]
        return norms

    def run(self, divide=False, rate=None, gain=0.0, trust=math.inf):
        norms = self.complete() if trust < math.inf else None
        moments = self.adaptive or self.momentum > 0
        _ops.foreach_weight_step_(
            self.weight, self.bias, self.product, self.grad if self.adaptive else [],
            self.bias_row, self.grad_bias, torch.cat(self.h), self.groups,
            self.first if moments else [], self.second if self.adaptive else [], self.health, rate,
            norms, 0.05, self.momentum, 0.99, 0.1, 1e-8, gain, trust, divide,
        )  # fmt: skip

    def stacked(self, layer: int) -> Tensor:
        weight = self.weight[layer].flatten(1)
        bias = self.bias[layer]
        return torch.cat([weight, bias[:, None]], 1).double() if len(bias) else weight.double()

    def of_groups(self, layer: int, rows: Tensor) -> Tensor:
        """Rows [c, n] by groups [groups, c / groups, n]."""
        return rows.view(self.groups[layer], -1, rows.shape[1])

    def expected(self, layer: int, divide: bool, rate: float, gain: float, trust: float):
        W, (D, G), M = self.stacked(layer), self.matrices[layer], self.first[layer].double()
        health, lr = self.health[layer], 0.05 * rate
        if gain > 0:
            counted = (health[EARLIER] + health[STEPS]).item()  # those that saw no input too
            lr *= gain / max(gain, 1 / counted)
        if self.adaptive:
            constants = reference.AdaptiveStep(lr, self.momentum, 0.99, 0.1, 1e-8)
            v = self.second[layer].double()
            W_new, M_new, v_new = reference.adaptive_weight_step(W, D, G, M, v, 4, constants)
        else:
            h = self.h[layer].double() if divide else torch.ones(self.groups[layer]).double()
            parts = zip(h, self.of_groups(layer, D), self.of_groups(layer, W))
            h = torch.stack([reference.trusted(*part, lr, trust) for part in parts])
            W_new, M_new = reference.weight_step(
                W, D, lr, M if self.momentum else None, self.momentum, 0.1,
                h.repeat_interleave(len(W) // self.groups[layer]),
            )  # fmt: skip
            v_new = self.second[layer].double()
        if not (self.adaptive or self.momentum):
            M_new = M
        still = self.h[layer].isnan().repeat_interleave(len(W) // self.groups[layer])
        for old, new in ((W, W_new), (M, M_new), (self.second[layer].double(), v_new)):
            new[still] = old[still]
        return W_new, M_new, v_new

    def check(self, **options):
        values = {"divide": False, "rate": 1.0, "gain": 0.0, "trust": math.inf, **options}
        exact = [self.expected(layer, **values) for layer in range(len(self.weight))]
        rate = torch.tensor(values["rate"]) if "rate" in options else None
        strides = [w.stride() for w in self.weight]
        self.run(values["divide"], rate, values["gain"], values["trust"])
        assert strides == [w.stride() for w in self.weight]
        for layer, (W, M, v) in enumerate(exact):
            rtol, atol = TOLERANCE[self.weight[layer].dtype]
            torch.testing.assert_close(self.stacked(layer), W, rtol=2 * rtol, atol=20 * atol)
            assert_close(self.first[layer], M, 20)
            assert_close(self.second[layer], v, 50)


@pytest.mark.parametrize("compute, storage", PAIRS, ids=str)
@pytest.mark.parametrize("adaptive", [True, False])
def test_step_of_mixed_layers_equals_the_reference(compute, storage, adaptive):
    Steps(compute, storage, adaptive).check()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("divide", [True, False])
def test_step_of_the_plain_form(momentum, divide):
    Steps(torch.float32, torch.float32, False, momentum).check(divide=divide)


@pytest.mark.parametrize("adaptive", [True, False])
def test_rate_and_gain_scale_the_step_on_the_device(adaptive):
    Steps(torch.float64, torch.float64, adaptive).check(rate=0.25, gain=0.1)


@pytest.mark.parametrize("adaptive", [True, False])
def test_rows_of_a_refused_matrix_are_left_alone(adaptive):
    Steps(torch.float64, torch.float64, adaptive, bad_group=True).check()


def test_step_of_more_layers_than_one_launch_takes():
    Steps(torch.float32, torch.float32, True, repeat=8).check()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("trust", [1e-3, 0.1])  # every matrix is held back; some are
def test_a_step_within_the_trust_ratio(momentum, divide, trust):
    Steps(torch.float32, torch.float32, False, momentum).check(divide=divide, trust=trust)


@pytest.mark.parametrize("compute, storage", PAIRS, ids=str)
def test_the_trust_ratio_follows_a_rate_on_the_device(compute, storage):
    Steps(compute, storage, False).check(divide=True, rate=0.25, trust=1e-2)


@pytest.mark.parametrize("trust", [1e-3, math.inf])
def test_a_refused_matrix_is_left_alone_within_the_trust_ratio(trust):
    Steps(torch.float64, torch.float64, False, bad_group=True).check(divide=True, trust=trust)


def test_a_weight_of_zeros_is_not_held_back():
    steps = Steps(torch.float64, torch.float64, False)
    for weight, bias in zip(steps.weight, steps.bias):
        weight.zero_(), bias.zero_()
    steps.check(divide=True, trust=1e-3)
    assert all(weight.any() for weight in steps.weight)


@pytest.mark.parametrize("repeat", [1, 8])  # more layers than one launch takes
@pytest.mark.parametrize("compute, storage", PAIRS, ids=str)
def test_products_are_completed_and_measured(compute, storage, repeat):
    steps = Steps(compute, storage, False, repeat=repeat)
    norms, start = steps.complete(), 0
    assert norms.shape == (2, sum(steps.groups))
    for layer, (D, _) in enumerate(steps.matrices):
        assert_close(steps.product[layer], D, 20)
        stop = start + steps.groups[layer]
        for of, rows in zip(norms[:, start:stop], (D, steps.stacked(layer))):
            assert_close(of, steps.of_groups(layer, rows).flatten(1).norm(dim=1), 20)
        start = stop


@pytest.mark.parametrize("c, n", [(300, 785), (1, 40_000)])
def test_norms_do_not_depend_on_the_threads(c, n):
    def run(lists):
        return [_ops.foreach_complete_products_(*lists, [1])]

    none = torch.empty(0)
    assert_same_by_any_threads(
        lambda: [[torch.randn(c, n)], [torch.randn(c, n)], [none], [none], [none]], run
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_sizes_whose_squares_are_out_of_range(scale):
    product, weight = torch.full((2, 3), scale).double(), torch.ones(2, 3).double()
    none = torch.empty(0)
    norms = _ops.foreach_complete_products_([product], [weight], [none], [none], [none], [1])
    torch.testing.assert_close(norms[0, 0].item(), scale * 6**0.5)


def test_layers_without_rows():  # as of a weight whose rows are on other processes
    none, empty = torch.empty(0), torch.empty(0, 4)
    norms = _ops.foreach_complete_products_(
        [empty, torch.ones(1, 4)], [empty, torch.ones(1, 4)], [none] * 2, [none] * 2, [none] * 2,
        [1, 1],
    )  # fmt: skip
    assert norms.tolist() == [[0, 2], [0, 2]]


REFUSED = {  # message -> argument, value
    r"product must hold at least one layer": (0, []),
    r"every list must have 2 tensors, got 1": (1, [torch.ones(4, 3)]),
    r"groups must have 2 entries, got 1": (5, [1]),
    r"the layer has 3 groups, which do not divide 4 rows": (5, [1, 3]),
    r"the layer has 4 groups, bias_row 1": (5, [4, 2]),
    r"product must be \[4, 4\], got \[4, 5\]": (0, [torch.ones(4, 5), torch.ones(4, 18)]),
    r"bias_row completes the product: bias and grad_bias expected":
        (4, [torch.empty(0), torch.empty(0)]),
    r"every product must have the dtype of the first":
        (0, [torch.ones(4, 4), torch.ones(4, 18).double()]),
    r"bias must have the dtype of weight": (2, [torch.ones(4).half(), torch.empty(0)]),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_products_are_refused_and_nothing_changes(message):
    arguments = VALID["foreach_complete_products_"]()
    before = [D.clone() for D in arguments[0]]
    place, value = REFUSED[message]
    with pytest.raises(RuntimeError, match=message):
        _ops.foreach_complete_products_(*arguments[:place], value, *arguments[place + 1 :])
    assert all(torch.equal(a, b) for a, b in zip(arguments[0], before))


def test_integer_weights_are_refused():
    none = torch.empty(0)
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16"):
        _ops.foreach_complete_products_(
            [torch.ones(2, 3)], [torch.ones(2, 3).long()], [none], [none], [none], [1]
        )


@pytest.mark.parametrize(
    "norms, trust, message",
    [
        (torch.ones(2, 2), 0.1, r"norms must be \[2, 3\], got \[2, 2\]"),
        (torch.ones(2, 3).double(), 0.1, "norms must have the dtype of product"),
        (torch.ones(2, 3), 0.0, "trust must be > 0, got 0"),
        (torch.ones(2, 3), math.nan, "trust must be > 0, got nan"),
    ],
)
def test_wrong_norms_are_refused_and_nothing_moves(norms, trust, message):
    arguments = VALID["foreach_weight_step_"]()
    arguments[3], arguments[9] = [], []  # of the plain form
    arguments[12], arguments[19] = norms, trust
    before = [weight.clone() for weight in arguments[0]]
    with pytest.raises(RuntimeError, match=message):
        _ops.foreach_weight_step_(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments[0], before))


def test_the_adaptive_form_takes_no_norms():
    arguments = VALID["foreach_weight_step_"]()
    arguments[12] = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="the adaptive form takes no norms"):
        _ops.foreach_weight_step_(*arguments)
