"""Gates: what they compute, what they leave alone, how they decide, and that a run can resume."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.blocks import CASES, IMAGES, copies, resnet
from support.compare import differing, snapshot
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import LayerGates, find_blocks
from rlscuda.pruning.blocks.proving import with_stand_ins
from rlscuda.pruning.blocks.stand_ins import Mapped
from rlscuda.pruning.gates.differences import differences
from rlscuda.pruning.running.calls import call
from rlscuda.pruning.running.measure import count_flops

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(5, (32,), generator=torch.Generator().manual_seed(1))


def made(optimizer=None, seed=0, **options):
    """A ResNet, its optimizer and its gates."""
    torch.manual_seed(seed)
    model = resnet()
    optimizer = (optimizer or RLSOptimizer)(model)
    options = {"total_steps": 20, "price": 0.01, "patience": 2} | options
    return model, optimizer, LayerGates(model, IMAGES, optimizer, **options)


def loss_of(model, rows=slice(None)):
    return F.cross_entropy(model(X[rows]), Y[rows])


def steps(model, optimizer, gates, count, first=0):
    for k in range(first, first + count):
        rows = torch.randperm(32, generator=torch.Generator().manual_seed(k))[:16]
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        gates.step(lambda rows=rows: loss_of(model, rows), loss)
        optimizer.step()


def set_gates(gates, bits, theta=None):
    for gate, bit in zip(gates._alive, bits, strict=True):
        gate.open = bool(bit)
        if theta is not None:
            gate.theta = float(theta)


@pytest.mark.parametrize("training", [True, False])
def test_a_gate_is_the_branch_or_nothing_to_the_bit(training):
    model, _, gates = made()
    model.train(training)
    for bits in itertools.product((0, 1), repeat=4):
        stand_ins = {}
        for gate, bit in zip(gates._alive, bits, strict=True):
            gate.open, gate.theta = bool(bit), 0.6 if bit else 0.5
            stand_ins |= {} if bit else gate.block.stand_ins
        deleted = with_stand_ins(model, stand_ins).train(training)
        assert torch.equal(model(X), deleted(X))


@pytest.mark.parametrize("name", ["preactivation", "in place", "channels last", "post-norm"])
def test_any_network_can_have_gates(name):
    make, inputs, names, _ = CASES[name]
    torch.manual_seed(0)
    model = make()
    wanted = call(copy.deepcopy(model).eval(), inputs)
    gates = LayerGates(model, inputs, total_steps=10)
    assert [gate.name for gate in gates.report().gates] == names
    assert torch.equal(call(model.eval(), inputs), wanted)
    set_gates(gates, [0] * len(names))
    call(model.train(), inputs).sum().backward()
    gone = {f"{part}." for name in names for part in find_blocks(model, inputs).block(name).modules}
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(gone)):
            assert parameter.grad is None


@pytest.mark.parametrize("make", [RLSOptimizer, lambda m: torch.optim.AdamW(m.parameters())])
def test_what_is_off_stays_as_it_is(make):
    model, optimizer, gates = made(make, warmup=0.9)
    steps(model, optimizer, gates, 3)
    off = gates._alive[1].block
    inside = tuple(f"{name}." for name in off.modules)
    own = {name: p for name, p in model.named_parameters() if name.startswith(inside)}
    set_gates(gates, [1, 0, 1, 1])
    if make is RLSOptimizer:  # else weight decay and momentum go on, as they do for any layer
        before = {n: [p.clone(), copy.deepcopy(optimizer.state.get(p))] for n, p in own.items()}
        P = {n: optimizer.inverse_autocorrelation(model.get_submodule(n)).clone()
             for n in off.modules if hasattr(model.get_submodule(n), "stride")}  # fmt: skip
        assert P
    buffers = {n: b.clone() for n, b in model.named_buffers() if n.startswith(inside)}
    optimizer.zero_grad()
    loss_of(model).backward()
    assert all(p.grad is None for p in own.values())
    optimizer.step()
    assert all(torch.equal(b, model.get_buffer(n)) for n, b in buffers.items())
    if make is RLSOptimizer:
        assert {n for n, m in P.items()
                if not torch.equal(m, optimizer.inverse_autocorrelation(model.get_submodule(n)))
                } == set()  # fmt: skip
        for name, (_, state) in before.items():
            for entry, value in (state or {}).items():
                now = optimizer.state[own[name]][entry]
                assert torch.equal(torch.as_tensor(now), torch.as_tensor(value)), (name, entry)
        assert all(health.missing == 0 for health in optimizer.health().values())


def test_differences_are_the_gradient_of_the_expected_loss():
    """Of all draws, weighed by their probability, in float64, for one probe and for all."""
    model, _, gates = made(lambda m: torch.optim.SGD(m.parameters(), 0.1))
    model.double()
    theta = [0.9, 0.3, 0.6, 0.5]

    def loss():
        return F.cross_entropy(model(X.double()), Y).item()

    losses, expected = {}, [0.0] * 4
    with torch.no_grad():
        for bits in itertools.product((0, 1), repeat=4):
            set_gates(gates, bits)
            losses[bits] = loss()
            share = 1.0
            for bit, p in zip(bits, theta):
                share *= p if bit else 1 - p
            found = differences(model, gates._alive, loss, None)
            for place, gate in enumerate(gates._alive):
                expected[place] += share * found[gate]

    def mean_loss(at):
        total = 0.0
        for bits, value in losses.items():
            share = 1.0
            for bit, p in zip(bits, at):
                share *= p if bit else 1 - p
            total += share * value
        return total

    for place in range(4):
        ends = [mean_loss([*theta[:place], end, *theta[place + 1 :]]) for end in (0.0, 0.5, 1.0)]
        assert ends[1] == pytest.approx((ends[0] + ends[2]) / 2, abs=1e-12)  # linear in each
        assert expected[place] == pytest.approx(ends[2] - ends[0], abs=1e-9)
    # a probe of one gate at random, times their number, has the same mean
    set_gates(gates, (1, 0, 1, 1))
    all_of = differences(model, gates._alive, loss, None)
    singles = [4 * differences(model, [gate], loss, loss())[gate] / 4 for gate in gates._alive]
    assert singles == pytest.approx(list(all_of.values()), abs=1e-12)


def test_estimates_leave_no_trace():
    model, _, gates = made()
    model.train()
    before, state = copies(model), torch.get_rng_state()
    opened = [gate.open for gate in gates._alive]
    assert differences(model, gates._alive, lambda: loss_of(model), None)
    assert not differing(before, copies(model))
    assert torch.equal(state, torch.get_rng_state())
    assert opened == [gate.open for gate in gates._alive]
    with pytest.raises(ZeroDivisionError):
        differences(model, gates._alive, lambda: 1 / 0, None)
    assert not differing(before, copies(model))
    assert opened == [gate.open for gate in gates._alive]


@pytest.mark.parametrize("seed", range(3))
def test_learning_ends_where_no_single_flip_helps(seed):
    """With fixed weights and the exact gradient: at a vertex; a higher price keeps no more."""
    torch.manual_seed(seed)
    values = {bits: torch.rand(()).item() for bits in itertools.product((0, 1), repeat=4)}
    left = []
    for price in (0.01, 0.1, 0.5):
        _, _, gates = made(price=price, warmup=0, ramp=0, total_steps=1000)
        mine = list(gates._alive)
        set_gates(gates, [1] * 4, theta=0.9)
        for _ in range(3000):
            found = {}
            for place, gate in enumerate(mine):
                slope = 0.0
                for bits, value in values.items():
                    share = 1.0
                    for k, bit in enumerate(bits):
                        p = mine[k].theta if k != place else 1.0
                        share *= p if bit or k == place else 1 - p
                    slope += share * value * (1 if bits[place] else -1)
                found[gate] = slope
            gates._learn(found)
        bits = tuple(round(gate.theta) for gate in mine)
        assert [gate.theta for gate in mine] == list(map(float, bits))

        def cost(bits, price=price):
            return values[bits] + price * sum(bits)

        flips = [(*bits[:k], 1 - bits[k], *bits[k + 1 :]) for k in range(4)]
        assert cost(bits) <= min(map(cost, flips))
        left.append(sum(bits))
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("maps", [None, [X]])
@pytest.mark.parametrize("make", [RLSOptimizer, lambda m: torch.optim.AdamW(m.parameters())])
def test_the_dead_leave_and_training_goes_on(make, maps):
    model, optimizer, gates = made(make, price=10.0, warmup=0, ramp=0, probes=4, maps=maps)
    whole = count_flops(copy.deepcopy(model).eval(), IMAGES)
    steps(model, optimizer, gates, 20)
    assert {gate.state for gate in gates.report().gates} == {"gone"}
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters()) and set(optimizer.state) <= held
    assert sum(isinstance(m, Mapped) for m in model.modules()) == (4 if maps else 0)
    steps(model, optimizer, gates, 2)
    model.eval()
    with torch.no_grad():
        wanted = model(X)
        report = gates.finish()
        assert torch.equal(model(X), wanted)
    assert report.flops == count_flops(model, IMAGES) < whole
    assert str(report).splitlines()[-1].startswith("0 of 4 branches on:")


def test_a_removal_that_is_refused_changes_nothing():
    model, optimizer, gates = made(
        lambda m: torch.optim.LBFGS(m.parameters(), 1e-3), price=10.0, warmup=0, ramp=0, patience=1,
        initial=0.05,
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = gates.state_dict(), copies(model)
    with pytest.raises(ValueError, match="LBFGS keeps"):
        gates.step(lambda: loss_of(model))
    now = gates.state_dict(), copies(model)
    generators = [state.pop("generator") for state, _ in (before, now)]
    assert before[0] == now[0] and torch.equal(*generators) and not differing(before[1], now[1])


def test_removals_wait_for_each_other():
    model, optimizer, gates = made(price=10.0, warmup=0, ramp=0, probes=4, patience=4)
    gone = []
    for k in range(30):
        steps(model, optimizer, gates, 1, k)
        gone.append(len(gates._gone))
    first = [gone.index(count) for count in range(1, 5)]
    assert all(later - sooner >= 4 for sooner, later in itertools.pairwise(first))


def test_finish_leaves_what_eval_mode_showed():
    model, optimizer, gates = made(warmup=0, ramp=0)
    steps(model, optimizer, gates, 5)
    for gate, theta in zip(gates._alive, (0.4, 0.5, 0.9, 0.51)):
        gate.theta = theta
    model.eval()
    wanted = model(X)
    report = gates.finish()
    assert [gate.state for gate in report.gates] == ["off", "off", "on", "on"]
    assert torch.equal(model(X), wanted)
    assert torch.equal(copy.deepcopy(model)(X), wanted)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    model.train()
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    gates.step(lambda: 0.0)  # which is over, so that loops need not know


def test_norms_can_be_measured_anew():
    model, optimizer, gates = made(warmup=0.9)
    steps(model, optimizer, gates, 5)
    gates.finish([X[:16], X[16:]])
    norm = model.bn
    inputs = []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.eval()
    for part in (X[:16], X[16:]):
        model(part)
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    assert norm.momentum == 0.1


def test_copies_files_and_pickles_have_no_gates(tmp_path):
    model, _, gates = made()
    plain = resnet()
    plain.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_gates(gates, [0] * 4)
        assert torch.equal(other(X), plain(X))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_gates_go_with_their_object():
    model, optimizer, gates = made()
    set_gates(gates, [0] * 4, theta=0.1)
    reference = weakref.ref(gates)
    del gates
    gc.collect()
    assert reference() is None
    assert torch.equal(model(X), copy.deepcopy(model)(X))
    kept = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert kept() is None


def test_a_resumed_run_is_the_same_to_the_bit():
    options = {"price": 0.5, "warmup": 0.1, "ramp": 0.1, "total_steps": 12, "initial": 0.2}
    model, optimizer, gates = made(**options)
    steps(model, optimizer, gates, 9)
    assert gates._gone  # so that the resumed model has to lose them first
    saved = copy.deepcopy([gates.state_dict(), model.state_dict(), optimizer.state_dict()])
    steps(model, optimizer, gates, 6, first=9)
    again, other, resumed = made(seed=5, **options)
    resumed.load_state_dict(pickle.loads(pickle.dumps(saved[0])))
    again.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    steps(again, other, resumed, 6, first=9)
    assert str(resumed.report()) == str(gates.report())
    assert not differing(snapshot(model, optimizer), snapshot(again, other))


def test_a_map_is_resumed_too():
    options = {"price": 10.0, "warmup": 0, "ramp": 0, "initial": 0.1, "maps": [X]}
    model, optimizer, gates = made(**options)
    steps(model, optimizer, gates, 6)
    again, other, resumed = made(seed=5, **options)
    resumed.load_state_dict(gates.state_dict())
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert not differing(snapshot(model, optimizer), snapshot(again, other))


def test_prices_follow_the_size():
    model, _, gates = made(by="params", price=0.02)
    prices = {gate.name: gate.price for gate in gates.report().gates}
    assert sum(prices.values()) == pytest.approx(0.08)
    sizes = {b.name: b.parameters for b in find_blocks(model, IMAGES).found}
    ratio = prices["block11"] / prices["block22"]
    assert ratio == pytest.approx(sizes["block11"] / sizes["block22"])
    assert {gate.price for gate in made(price=0.02)[2].report().gates} == {0.02}


def test_a_step_that_cannot_know_is_refused():
    model, optimizer, gates = made(warmup=0)
    before = gates.state_dict()
    with pytest.raises(RuntimeError, match="'block11' was not called since the last draw"):
        gates.step(lambda: loss_of(model))
    model.eval()
    loss_of(model)
    with pytest.raises(RuntimeError, match="call model.train"):
        gates.step(lambda: loss_of(model))
    model.train()
    loss_of(model)
    for closure, kind in ((lambda: "low", "str"), (lambda: model(X), "Tensor")):
        with pytest.raises(TypeError, match=f"closure must give a number, got {kind}"):
            gates.step(closure)
    now = gates.state_dict()
    generator = [state.pop("generator") for state in (before, now)]
    assert before == now and torch.equal(*generator)
    gates.step(lambda: float("nan"))  # an estimate that is none teaches nothing
    assert all(gate.theta == 0.9 for gate in gates._alive)
    others = {"other": gates.state_dict()["gates"]["block11"]}
    with pytest.raises(ValueError, match="must be of gates on"):
        gates.load_state_dict({**gates.state_dict(), "gates": others})


def test_a_checkpointed_branch_is_recomputed_as_it_was_drawn():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    grads = []
    for wrap in (nn.Sequential, Checkpointed):
        torch.manual_seed(0)
        model = wrap(resnet())
        gates = LayerGates(model, IMAGES, total_steps=10)
        set_gates(gates, [1, 0, 1, 0])
        loss_of(model).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))
