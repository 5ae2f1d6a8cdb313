"""Above `max_fan_in` the matrix of a layer is block-diagonal: against the float64 specification."""

import copy
import io
import math

import pytest
import torch
from support.compare import assert_exact, differing, snapshot
from torch import nn

from rlscuda import RLSOptimizer, reference
from rlscuda.closed_form.formulas import downdate
from rlscuda.functional.ridges import share_of_power
from rlscuda.optim.forms import COUNTS
from rlscuda.pruning import RLSPruner, own_matrices
from rlscuda.reference.ridge import turns_of_cycle

FORMS = ["paper", "natural", "adaptive"]
OPTIONS = {
    "paper": {"form": "paper", "gain": 0.3, "momentum": 0.5, "trust_ratio": math.inf},
    "paper_trusted": {"form": "paper", "gain": 0.3, "trust_ratio": 1e-2, "rank": 2},
    "natural": {"form": "natural", "gain": 0.3, "forgetting": 0.8, "summary": "sketch",
                "rank": 3, "trust_ratio": math.inf},
    "natural_absolute": {"form": "natural", "forgetting": 0.7, "ridge": 0.4},
    "shrunk": {"form": "paper", "forgetting": 0.9, "ridge": 0.0, "shrinkage": 0.1},
    "adaptive_forgets": {"form": "adaptive", "forgetting": 0.6},
    "natural_decay": {"form": "natural", "gain": 0.3, "weight_decay": 0.1, "trust_ratio": 1e-2},
    "adaptive": {"form": "adaptive", "summary": "mean", "rank": 2},
    "adaptive_sample": {"form": "adaptive"},
}  # fmt: skip
LAYERS = {  # the layer, its input, its columns with the bias
    "linear": (lambda: nn.Linear(22, 5), (6, 22), 23),
    "linear_plain": (lambda: nn.Linear(16, 5, bias=False), (6, 16), 16),
    "linear_bias_alone": (lambda: nn.Linear(7, 3), (6, 7), 8),  # blocks of 7 and a bias
    "wide": (lambda: nn.Linear(90, 80), (2, 90), 91),  # steps by its factors
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (4, 3, 5, 5), 28),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 5, 5), 19),
    "line": (lambda: nn.Conv1d(4, 6, 5, bias=False), (4, 4, 9), 20),
}


def eye(P):
    return torch.eye(len(P), dtype=P.dtype)


class Specified:
    """One layer by dense block-diagonal float64 matrices; it takes rows and a gradient."""

    def __init__(self, layer, most, group):
        self.group, self.most = group, most
        self.W = self.rows_of(layer, [p.detach().double() for p in layer.parameters()])
        self.groups, n = getattr(layer, "groups", 1), self.W.shape[1]
        self.size = -(-n // -(-n // most))
        self.P = [torch.eye(n).double() * group["initial_scale"]] * self.groups
        self.power, self.M = [0.0] * self.groups, torch.zeros_like(self.W)
        self.seen = [0.0] * self.groups
        self.v, self.steps = torch.zeros(len(self.W)).double(), 0

    def raised(self, P, power, turn):
        """A matrix after its turn, for a ridge that follows the power of the rows, or does not."""
        o, K = self.group, turns_of_cycle(self.group["forgetting"])
        if o["ridge"] is None:
            rho = share_of_power(o["forgetting"], self.size, P.dtype) * o["gain"] * power
        else:
            rho = o["ridge"]
        if turn % K:  # fewer than 16: each cycle is raised at its end
            return P
        return torch.linalg.inv(torch.linalg.inv(P) + rho * (o["forgetting"] ** -K - 1) * eye(P))

    @staticmethod
    def rows_of(layer, tensors):
        weight, *bias = tensors
        return torch.cat([weight.flatten(1), *(b[:, None] for b in bias)], 1)

    def step(self, S, G):
        o, t = self.group, self.steps
        mu, adaptive = o["shrinkage"], o["form"] == "adaptive"
        gain = max(o["gain"], 1 / (t + 1)) if adaptive else o["gain"]
        keep = 1 - gain * (o["drift"] or 0)
        diffusion = mu * o["initial_scale"] * keep + (gain if o["drift"] else 0)
        rule = {"forgetting": o["forgetting"], "gain": gain, "decay": (1 - mu) * keep,
                "diffusion": diffusion}  # fmt: skip
        old, h = list(self.P), []
        for g, rows in enumerate(S.double()):
            if adaptive:
                seen = rows.square().mean().item()
                now, self.power[g] = reference.running_power(self.power[g], seen, gain)
                rows = rows / now**0.5
            self.P[g], one = reference.block_rls_update(old[g], rows, self.size, **rule)
            h.append(one)
            self.seen[g] += (rows.square().mean().item() - self.seen[g]) / (t + 1)
            if o["forgetting"] < 1:
                self.P[g] = self.raised(self.P[g], 1.0 if adaptive else self.seen[g], t + 1)
        parts = G.chunk(self.groups)
        D = torch.cat([p @ P for p, P in zip(parts, old if o["form"] == "paper" else self.P)])
        if adaptive:
            constants = reference.AdaptiveStep(  # the rate warms up with the gain
                o["lr"] * o["gain"] / gain, o["momentum"], o["beta2"], o["weight_decay"], o["eps"]
            )
            moved = reference.adaptive_weight_step(self.W, D, G, self.M, self.v, t + 1, constants)
            self.W, self.M, self.v = moved
        else:
            each = len(D) // self.groups
            divisor = torch.stack(h) if o["form"] == "paper" else torch.ones(self.groups).double()
            longest = o["trust_ratio"] * (1 - o["momentum"])
            norms = [x.reshape(self.groups, -1).norm(dim=1) for x in (D, self.W)]
            divisor = torch.maximum(divisor, o["lr"] * norms[0] / norms[1] / longest)
            self.W, self.M = reference.weight_step(
                self.W, D, o["lr"], self.M, o["momentum"], o["weight_decay"],
                divisor.repeat_interleave(each))  # fmt: skip
        self.steps += 1

    def blocks(self):
        """The matrices as the optimizer keeps them, without what fills up the last."""
        k = self.size
        return [P[i : i + k, i : i + k] for P in self.P for i in range(0, len(P), k)]


def fit(layer, optimizer, shape, steps=4, seed=0, before_step=lambda: None):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(shape).to(next(layer.parameters()).dtype)
        (layer(x) - 1).square().mean().backward()
        before_step()
        optimizer.step()


@pytest.mark.parametrize("most", [7, 11])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", OPTIONS)
def test_steps_are_those_of_the_specification(case, name, most):
    build, shape, n = LAYERS[name]
    torch.manual_seed(3)
    layer = build().double()
    optimizer = RLSOptimizer(layer, lr=0.05, max_fan_in=most, **OPTIONS[case])
    spec = Specified(layer, most, optimizer.param_groups[0])

    def step():
        staged = optimizer._registry.stages[layer.weight]
        assert (staged.factors is not None) == (name == "wide")
        spec.step(staged.summary.rows, spec.rows_of(layer, [p.grad for p in layer.parameters()]))

    fit(layer, optimizer, shape, before_step=step)
    assert_exact(spec.rows_of(layer, list(layer.parameters())).detach(), spec.W)
    P = optimizer.inverse_autocorrelation("")
    count = -(-n // most) * spec.groups
    assert P.shape[-2:] == (spec.size, spec.size) and torch.equal(P, P.mT)
    for block, exact in zip(P.view(count, *P.shape[-2:]), spec.blocks(), strict=True):
        m = len(exact)
        assert_exact(block[:m, :m], exact)
        assert not block[:m, m:].any()  # what fills it up meets nothing
    if case.startswith("adaptive"):
        assert_exact(
            optimizer.state[layer.weight]["power"], torch.tensor(spec.power, dtype=P.dtype)
        )
    health = optimizer.health()[""]
    assert (health.updates, health.refused, health.resets) == (4 * count, 0, 0)
    assert health.symmetry_error == 0


def test_coverage_says_so():
    model = nn.Sequential(nn.Linear(40, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(3, 2))
    optimizer = RLSOptimizer(model, max_fan_in=16)
    blocked, grouped, whole = optimizer.coverage()
    assert blocked.why == ("P is 3 blocks of at most 14 of the 41 inputs: more than max_fan_in=16")
    assert (blocked.fan_in, blocked.blocks, blocked.bytes) == (41, 3, 3 * 14 * 14 * 4)
    assert (grouped.groups, grouped.blocks) == (2, 2) and (whole.blocks, whole.why) == (1, "")
    lines = str(optimizer.coverage()).splitlines()
    assert "3 x 14²" in lines[2] and "4 x 10²" in lines[3] and " 4² " in lines[4]
    assert RLSOptimizer(model).coverage()[0].blocks == 1


def test_a_large_layer_fits_where_its_whole_matrix_would_not():
    layer = nn.Linear(65_536, 2)
    optimizer = RLSOptimizer(layer, max_fan_in=256)  # in place of 16 GiB
    fit(layer, optimizer, (3, 65_536), steps=2)
    assert optimizer.coverage()[0].bytes < 70 << 20
    assert optimizer.health()[""].updates == 2 * 257


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_trains(form, dtype):
    layer = nn.Linear(40, 3).to(dtype)
    optimizer = RLSOptimizer(layer, form=form, max_fan_in=16)
    fit(layer, optimizer, (8, 40), steps=6)
    assert optimizer.inverse_autocorrelation("").dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in layer.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["input", "gradient"])
def test_what_is_not_finite_moves_nothing(form, what):
    layer = nn.Linear(40, 3)
    optimizer = RLSOptimizer(layer, form=form, max_fan_in=16)
    fit(layer, optimizer, (8, 40), 2)
    weights = [p.detach().clone() for p in layer.parameters()]
    state = {k: v.clone() for k, v in optimizer.state[layer.weight].items() if k not in COUNTS}
    optimizer.zero_grad()
    x = torch.randn(8, 40)
    if what == "input":
        x[:, 20] = math.inf
    (layer(x).nan_to_num(0, 0, 0) * 2).sum().backward()
    for p in layer.parameters():
        p.grad.nan_to_num_()
    if what == "gradient":
        layer.weight.grad[0, 0] = math.nan
    optimizer.step()
    assert all(map(torch.equal, weights, layer.parameters()))
    after = optimizer.state[layer.weight]
    finite = [1] if form != "adaptive" and what == "input" else []  # of the input, two blocks are
    for k in range(3):
        same = torch.equal(after["P"][k], state["P"][k])
        assert same != (bool(finite) and k != 1), k
    assert all(torch.equal(after[k], state[k]) for k in ("power",) if k in state)
    refused = optimizer.health()[""].refused
    assert refused == (1 if finite else 3)
    fit(layer, optimizer, (8, 40), 1)
    assert not any(map(torch.equal, weights, layer.parameters()))


def test_a_step_without_input():
    layer = nn.Linear(40, 3)
    optimizer = RLSOptimizer(layer, max_fan_in=16)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    health = optimizer.health()[""]
    assert (health.updates, health.missing) == (0, 1)
    assert not optimizer.state[layer.weight]["power"].any()


def test_state_goes_round_and_another_is_refused():
    def fresh(most):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 3), nn.Linear(3, 2))
        return model, RLSOptimizer(model, max_fan_in=most)

    model, optimizer = fresh(16)
    fit(model, optimizer, (8, 40))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, other = fresh(16)
    twin.load_state_dict(saved[0]), other.load_state_dict(saved[1])
    copied, with_it = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other), (copied, with_it)):
        fit(m, o, (8, 40), 2, seed=1)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert with_it.state[copied[0].weight]["P"].shape == (3, 14, 14)
    _, whole = fresh(None)
    with pytest.raises(ValueError, match="state_dict is of max_fan_in 16, the optimizer of 8192"):
        whole.load_state_dict(saved[1])
    spoiled = copy.deepcopy(saved[1])
    spoiled["state"][0]["P"] = torch.eye(41)
    with pytest.raises(ValueError, match=r"P of '0' .* must be \[3, 14, 14\], got \[41, 41\]"):
        other.load_state_dict(spoiled)
    before = snapshot(model, optimizer)
    optimizer.param_groups[0]["max_fan_in"] = 32
    with pytest.raises(
        ValueError, match="max_fan_in .* cannot change .*: '0' has 16, its group 32"
    ):
        optimizer.step()
    assert not differing(before, snapshot(model, optimizer))


def test_groups_may_differ():
    model = nn.Sequential(nn.Linear(40, 3), nn.Linear(3, 2))
    optimizer = RLSOptimizer(
        [{"params": model[1].parameters()}], model=model, max_fan_in=2, fallback_lr=1e-3
    )
    optimizer.add_param_group({"params": model[0].parameters(), "max_fan_in": 41})
    assert [row.blocks for row in optimizer.coverage()] == [1, 2]
    fit(model, optimizer, (8, 40))
    assert optimizer.inverse_autocorrelation("1").shape == (2, 2, 2)


# -- pruning --------------------------------------------------------------------------------------


def network(most, form="paper"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    optimizer = RLSOptimizer(model.double(), form=form, max_fan_in=most)
    fit(model, optimizer, (4, 3, 4, 4), 6)
    return model, optimizer


def test_own_matrices_are_whole():
    model, optimizer = network(50)
    P = optimizer.inverse_autocorrelation("3")
    (own,) = own_matrices(optimizer, ["3"]).values()
    assert P.shape == (3, 43, 43) and own.shape == (1, 129, 129)
    assert torch.equal(own[0], torch.block_diag(*P).double())
    model, optimizer = network(50, "adaptive")
    (own,) = own_matrices(optimizer, ["3"]).values()
    assert not own[0, :43, 43:].any() and torch.linalg.eigvalsh(own[0]).min() > 0


@pytest.mark.parametrize("form", FORMS)
def test_pruned_inputs_leave_blocks_of_the_same_size(form):
    """The new blocks are the inverse of A's, with what lay between the old ones taken as zero."""
    model, optimizer = network(50, form)
    whole = torch.block_diag(*optimizer.inverse_autocorrelation("3")).clone()
    RLSPruner(model, optimizer, torch.randn(1, 3, 4, 4).double(), ratio=0.3).step()
    kept = model[3].in_features
    assert kept == 16 * model[0].out_channels < 128
    layer = optimizer._registry.layers[model[3].weight]
    P = optimizer.inverse_autocorrelation("3")
    assert P.shape == layer.matrix_shape == (2, 49, 49) and torch.equal(P, P.mT)
    fit(model, optimizer, (4, 3, 4, 4), 2)
    assert optimizer.health()["3"].updates == 6 * 3 + 2 * 2
    assert whole.shape == (129, 129)


def test_blocks_after_a_cut_by_hand():
    model, optimizer = network(50)
    from rlscuda.optim.kept import KeptLayer

    layer = optimizer._registry.layers[model[3].weight]
    P = optimizer.inverse_autocorrelation("3")
    columns = torch.tensor([c for c in range(128) if c % 3])
    new = KeptLayer.of_columns(layer, columns)
    columns = torch.cat([columns, torch.tensor([128])])
    whole = torch.block_diag(*P)
    assert new.matrix(P).shape == (2, 43, 43)
    for block, own in zip(new.matrix(P), columns.split(43)):
        gone = torch.tensor([c for c in range(129) if c not in own])
        size = len(own)
        assert_exact(block[:size, :size], downdate(whole, gone))
