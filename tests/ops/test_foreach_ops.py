"""foreach_rls_update_: the matrices of many layers a call, against the reference."""

import math
from dataclasses import dataclass

import pytest
import torch
from support.compare import assert_close, random_spd
from torch import Tensor

import rlscuda.functional  # noqa: F401  (its import registers the operators)
from rlscuda import reference

_ops = torch.ops.rlscuda
DTYPES = [torch.float32, torch.float64]
SLOTS = UPDATES, REFUSED, RESETS, LARGEST, MISSING, STEPS, EARLIER = range(7)
# batch (None: one matrix [n, n]), n, rank: whole matrices and streamed ones, aligned rows and not
SIZES = [
    (None, 1, 1), (3, 9, 2), (None, 64, 16), (None, 65, 4), (2, 128, 5), (None, 129, 1),
    (None, 132, 16), (2, 131, 3), (None, 27, 0), (5, 2, 0), (1, 40, 40), (None, 260, 1),
]  # fmt: skip


@dataclass
class Rule:
    """The constants of an update, in the order of the operator."""

    forgetting: float = 1.0
    gain: float = 1.0
    decay: float = 1.0
    diffusion: float = 0.0
    drift: float = 0.0
    initial_scale: float = 1.0
    averaging: bool = False

    def at(self, updates: int) -> dict[str, float]:
        gain = max(self.gain, 1 / (updates + 1)) if self.averaging else self.gain
        keep = 1 - gain * self.drift
        return {
            "forgetting": self.forgetting, "gain": gain, "decay": self.decay * keep,
            "diffusion": self.diffusion * keep + (gain if self.drift else 0),
        }  # fmt: skip


RULES = {
    "plain": Rule(),
    "forgetting": Rule(0.95, 0.3, 0.9, 0.1),
    "averaging": Rule(gain=0.2, averaging=True),
    "drift": Rule(gain=0.05, drift=0.3, averaging=True),
}


class Layers:
    """The arguments of an update of many layers, and what it must make of them, in float64."""

    def __init__(self, dtype, sizes=SIZES, power=True, steps=0.0):
        self.dtype, self.P, self.S, self.ranks = dtype, [], [], []
        for batch, n, rank in sizes:
            shape = () if batch is None else (batch,)
            self.P.append(random_spd(*shape, n, dtype=dtype))
            self.S.append(torch.randn(*shape, rank, n, dtype=dtype))
        self.power = [torch.rand(self.matrices(P), dtype=dtype) for P in self.P] if power else []
        self.health = [torch.zeros(len(SLOTS), dtype=torch.float64) for _ in sizes]
        for layer, health in enumerate(self.health):
            health[STEPS], health[EARLIER] = steps, layer % 4
        self.exact_P = [P.double().reshape(-1, *P.shape[-2:]).clone() for P in self.P]
        self.exact_power = [p.double().clone() for p in self.power]
        self.exact_health = [health.clone() for health in self.health]

    @staticmethod
    def matrices(P: Tensor) -> int:
        return 1 if P.dim() == 2 else P.shape[0]

    def update(self, rule: Rule, found_inf: bool | None = None) -> Tensor:
        flag = None if found_inf is None else torch.tensor(found_inf)
        return _ops.foreach_rls_update_(
            self.P, self.S, self.power, self.health, flag, [], [], [], rule.forgetting, rule.gain,
            rule.decay, rule.diffusion, rule.drift, rule.initial_scale, rule.averaging,
        )  # fmt: skip

    def expect(self, rule: Rule, found_inf: bool = False) -> Tensor:
        h = []
        for layer, (P, health) in enumerate(zip(self.exact_P, self.exact_health)):
            constants = rule.at(int(health[EARLIER] + health[STEPS] - health[MISSING]))
            rank = self.S[layer].shape[-2]
            S = self.S[layer].double().reshape(len(P), rank, P.shape[-1])
            for b in range(len(P)):
                if found_inf or not torch.isfinite(S[b]).all():
                    health[REFUSED] += 1
                    h.append(math.nan)
                elif rank == 0:
                    h.append(rule.forgetting)
                else:
                    h.append(self.expect_one(layer, b, S[b], constants, rule.initial_scale))
            if not found_inf:
                health[STEPS] += 1
                health[MISSING] += rank == 0
        return torch.tensor(h, dtype=torch.float64)

    def expect_one(self, layer, b, S, constants, initial_scale) -> float:
        P, health = self.exact_P[layer], self.exact_health[layer]
        if self.power:
            power, seen = self.exact_power[layer], S.square().mean().item()
            now, power[b] = reference.running_power(power[b].item(), seen, constants["gain"])
            S = S / now**0.5
        P[b], _, h = reference.rls_update(P[b], S, initial_scale=initial_scale, **constants)
        if math.isnan(h):
            health[RESETS] += 1
        else:
            health[UPDATES] += 1
            health[LARGEST] = max(health[LARGEST], h - constants["forgetting"])
        return float(h)

    def check(self, h: Tensor, exact_h: Tensor, scale: float = 50.0) -> None:
        assert h.dtype == self.dtype
        torch.testing.assert_close(h.isnan(), exact_h.isnan())
        assert_close(h.nan_to_num(), exact_h.nan_to_num(), scale)
        for P, exact in zip(self.P, self.exact_P):
            assert torch.equal(P, P.mT), tuple(P.shape)
            assert_close(P, exact.view(P.shape), scale)
        for power, exact in zip(self.power, self.exact_power):
            assert_close(power, exact, scale)
        for health, exact in zip(self.health, self.exact_health):
            counts = [UPDATES, REFUSED, RESETS, MISSING, STEPS, EARLIER]
            assert health[counts].tolist() == exact[counts].tolist()
            assert health[LARGEST].item() == pytest.approx(exact[LARGEST].item(), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("power", [True, False])
def test_update_of_mixed_layers_equals_the_reference(dtype, name, power):
    layers = Layers(dtype, power=power, steps=2.0)
    for _ in range(2):
        exact_h = layers.expect(RULES[name])
        layers.check(layers.update(RULES[name]), exact_h)
        layers.S = [torch.randn_like(S) for S in layers.S]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(None, 70, 1), (4, 5, 2), (2, 150, 3)])
def test_one_layer_a_call_follows_the_same_rule(dtype, size):
    layers = Layers(dtype, [size])
    for _ in range(3):
        exact_h = layers.expect(RULES["drift"])
        layers.check(layers.update(RULES["drift"]), exact_h)


@pytest.mark.parametrize("count", [45, 400])
def test_more_layers_than_one_launch_takes(count):
    sizes = [(None, 1 + i % 7, 1 + i % 3) for i in range(count - 1)] + [(None, 130, 2)]
    layers = Layers(torch.float32, sizes)
    exact_h = layers.expect(RULES["forgetting"])
    layers.check(layers.update(RULES["forgetting"]), exact_h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, rank", [(33, 33), (140, 64), (257, 17), (64, 64)])
def test_high_ranks(dtype, n, rank):
    layers = Layers(dtype, [(None, n, rank), (2, n, rank)])
    exact_h = layers.expect(RULES["forgetting"])
    layers.check(layers.update(RULES["forgetting"]), exact_h, scale=200)


def test_found_inf_voids_the_step_of_every_layer():
    layers = Layers(torch.float32)
    before = [P.clone() for P in layers.P]
    exact_h = layers.expect(RULES["drift"], found_inf=True)
    h = layers.update(RULES["drift"], found_inf=True)
    layers.check(h, exact_h)
    assert h.isnan().all() and all(torch.equal(a, b) for a, b in zip(before, layers.P))
    exact_h = layers.expect(RULES["drift"])
    layers.check(layers.update(RULES["drift"], found_inf=False), exact_h)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_rows_are_refused_for_their_own_matrix(bad):
    layers = Layers(torch.float64)
    layers.S[1][2, 1, 4] = bad
    layers.S[7][0, 2, 130] = bad
    before = layers.P[1][2].clone(), layers.P[7][0].clone()
    exact_h = layers.expect(RULES["averaging"])
    layers.check(layers.update(RULES["averaging"]), exact_h)
    assert torch.equal(layers.P[1][2], before[0]) and torch.equal(layers.P[7][0], before[1])
    assert layers.health[1][REFUSED] == layers.health[7][REFUSED] == 1


@pytest.mark.parametrize("start", ["indefinite", "nan"])
def test_broken_matrices_are_reset_and_counted(start):
    layers = Layers(torch.float64, power=False)
    for layer, b in ((1, 0), (7, 1)):
        P = layers.P[layer][b]
        P.copy_(-20 * torch.eye(len(P)) if start == "indefinite" else torch.full_like(P, math.nan))
        layers.exact_P[layer][b] = P.double()
    rule = Rule(0.9, initial_scale=3.0)
    exact_h = layers.expect(rule)
    layers.check(layers.update(rule), exact_h)
    for layer, b in ((1, 0), (7, 1)):
        n = layers.P[layer].shape[-1]
        assert torch.equal(layers.P[layer][b], 3 * torch.eye(n).double())
        assert layers.health[layer][RESETS] == 1


def test_layers_without_a_summary_keep_their_matrix_and_are_counted():
    layers = Layers(torch.float32, [(None, 20, 0), (3, 150, 0)])
    before = [P.clone() for P in layers.P]
    h = layers.update(Rule(0.9))
    assert torch.equal(h, torch.full((4,), 0.9))
    assert all(torch.equal(a, b) for a, b in zip(before, layers.P))
    for health in layers.health:
        assert health[:EARLIER].tolist() == [0, 0, 0, 0, 1, 1]


def test_power_of_zero_rows_is_no_division_by_zero():
    layers = Layers(torch.float32, [(None, 8, 2), (None, 140, 2)])
    for S, power, exact in zip(layers.S, layers.power, layers.exact_power):
        S.zero_(), power.zero_(), exact.zero_()
    before = [P.clone() for P in layers.P]
    h = layers.update(Rule())
    assert torch.equal(h, torch.ones(2))
    assert all(torch.equal(a, b) for a, b in zip(before, layers.P))


@pytest.mark.parametrize("n, rank", [(7, 3), (128, 16), (131, 5), (200, 1)])
def test_the_same_call_gives_the_same_bits(n, rank):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        layers = Layers(torch.float32, [(2, n, rank)])
        layers.update(RULES["drift"])
        results.append(layers.P[0])
    assert torch.equal(*results)


WRONG = {
    "P must hold at least one layer": {"P": []},
    "s must have 2 tensors, got 1": {"S": [torch.ones(1, 3)]},
    "health must have 2 tensors, got 0": {"health": []},
    "every P must have the dtype of the first": {
        "P": [torch.eye(3), torch.eye(3).double()],
        "S": [torch.ones(1, 3), torch.ones(1, 3).double()]},
    "P must be square, got [3, 4]": {"P": [torch.eye(3), torch.ones(3, 4)]},
    "s must have n=3 columns, got [1, 4]": {"S": [torch.ones(1, 3), torch.ones(1, 4)]},
    "gain must be > 0, got 0": {"gain": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_argument_of_an_update(message):
    given = {
        "P": [torch.eye(3), torch.eye(3)], "S": [torch.ones(1, 3), torch.ones(1, 3)],
        "health": [torch.zeros(len(SLOTS), dtype=torch.float64) for _ in range(2)], "gain": 1.0,
        **WRONG[message],
    }  # fmt: skip
    before = [P.clone() for P in given["P"]]
    with pytest.raises(RuntimeError) as caught:
        _ops.foreach_rls_update_(
            given["P"], given["S"], [], given["health"], None, [], [], [], 1.0, given["gain"], 1.0,
            0.0, 0.0, 1.0, False,
        )  # fmt: skip
    assert message in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, given["P"]))
