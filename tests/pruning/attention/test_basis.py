"""Heads are turned into the basis of their second moments: same function, least loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, calibrate
from rlscuda.pruning.attention.basis import in_basis
from rlscuda.pruning.attention.moments import Moments
from rlscuda.pruning.structure.trace import trace

WIDTH, HEADS, SIZE = 12, 3, 4


class SelfAttention(nn.Module):
    """With queries, keys and values of one layer, or of three; keys may be shared by heads."""

    def __init__(self, fused: bool, shared: bool = False, own_scale: bool = False):
        super().__init__()
        self.num_heads, self.head_dim, self.fused, self.own_scale = HEADS, SIZE, fused, own_scale
        self.kv_heads = 1 if shared else HEADS
        inner, kv = HEADS * SIZE, self.kv_heads * SIZE
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * inner)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (inner, kv, kv))
        self.proj = nn.Linear(inner, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        if self.fused:
            qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = self.q(x).view(b, t, -1, self.head_dim).transpose(1, 2)
            k, v = (
                layer(x).view(b, t, -1, self.head_dim).transpose(1, 2)
                .repeat_interleave(self.num_heads // self.kv_heads, 1)
                for layer in (self.k, self.v)
            )  # fmt: skip
        if self.own_scale:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, t, -1))


class Net(nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.attention = SelfAttention(*args, **kwargs)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + self.attention(x)).mean(1))


KINDS = [(True, False), (False, False), (False, True)]
every_kind = pytest.mark.parametrize(("fused", "shared"), KINDS)


def made(seed: int = 0, **kwargs) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    model = Net(**kwargs).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    mixing = torch.randn(6, 6).double()
    return model, torch.randn(256, 5, 6).double() @ mixing


@every_kind
def test_the_function_stays_and_moments_are_diagonal(fused, shared):
    model, data = made(fused=fused, shared=shared)
    structure = trace(model, data[:2])
    matrices = calibrate(model, [data], damping=1e-9)
    names = {coupling.name for coupling in structure.couplings}
    new, values = in_basis(structure, dict(matrices), data[:2], names)
    assert values and new.model is not model
    torch.testing.assert_close(new.model(data), model(data), rtol=1e-6, atol=1e-6)
    moments = Moments(dict(new.model.named_modules()), calibrate(new.model, [data], damping=1e-9))
    products = [family for family in new.families if family.product]
    assert len(products) == (1 if shared else HEADS)
    assert len(new.families) == 2 * len(products)
    for family in products:
        left, right = moments.side(family.left), moments.side(family.right)
        torch.testing.assert_close(left, torch.diag(left.diagonal()), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)
        worth = moments.cost(family)[family.units.argsort()]
        assert bool((worth[:-1] >= worth[1:] - 1e-9).all())  # the first are kept longest


@every_kind
@pytest.mark.parametrize("own_scale", [False, True])
def test_heads_lose_less_than_by_any_choice_of_dimensions(fused, shared, own_scale):
    model, data = made(1, fused=fused, shared=shared, own_scale=own_scale)
    whole, off = model(data), {}
    for importance in ("saliency", "l2", "random"):
        pruned = copy.deepcopy(model)
        RLSPruner(pruned, None, data[:2], ratio={"attention*": 0.5}, loader=[data],
                  importance=importance).step()  # fmt: skip
        assert pruned.attention.head_dim == SIZE // 2
        off[importance] = float((pruned(data) - whole).square().mean())
    assert off["saliency"] < min(off["l2"], off["random"])


def test_heads_of_less_rank_lose_nothing():
    model, data = made(2, fused=True)
    with torch.no_grad():
        rows = model.attention.qkv.weight.view(3, HEADS, SIZE, WIDTH)
        bias = model.attention.qkv.bias.view(3, HEADS, SIZE)
        for part in (rows, bias):  # every head is of rank 2, in no axis of its own
            part[:, :, 2:] = 0
        turn = torch.linalg.qr(torch.randn(HEADS, SIZE, SIZE).double())[0]
        model.attention.qkv.weight.copy_((turn @ rows).flatten(0, 2))
        model.attention.qkv.bias.copy_((turn @ bias[..., None]).flatten())
    whole = model(data)
    pruner = RLSPruner(model, None, data[:2], ratio={"attention*": 0.5}, loader=[data],
                       damping=1e-9)  # fmt: skip
    report = pruner.step()
    assert report.uncompensated == {} and model.attention.qkv.out_features == 3 * HEADS * 2
    torch.testing.assert_close(model(data), whole, rtol=1e-4, atol=1e-4)


def test_whole_heads_go_with_their_numbers():
    for fused, shared in KINDS[:2]:
        model, data = made(3, fused=fused, shared=shared)
        RLSPruner(model, None, data[:2], ratio={"attention*": 0.4}, loader=[data],
                  heads=True).step()  # fmt: skip
        assert (model.attention.num_heads, model.attention.head_dim) == (2, SIZE)
        assert model(data).shape == (256, 5)


def test_matrices_that_an_optimizer_keeps_are_not_turned():
    model, data = made(4, fused=True)
    model, data = model.float(), data.float()
    optimizer = RLSOptimizer(model)
    model(data).square().mean().backward()
    optimizer.step()
    before = model.attention.qkv.weight.detach().clone()
    RLSPruner(model, optimizer, data[:2], ratio={"attention*": 0.5}, loader=[data]).step()
    rows = model.attention.qkv.weight
    assert all(bool((before == row).all(1).any()) for row in rows[:HEADS])  # chosen, not mixed
    optimizer.zero_grad()
    model(data).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("ratio", [0.0, {"embed": 0.0, "attention*": 0.0}])
def test_heads_that_lose_nothing_stay_as_they_are(ratio):
    torch.manual_seed(0)
    model, data = Net(False).eval(), torch.randn(64, 5, 6)
    before = copy.deepcopy(model.state_dict())
    RLSPruner(model, None, data[:2], ratio=ratio, loader=[data]).step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    structure = trace(model, data[:2])
    matrices = calibrate(model, [data])
    assert in_basis(structure, dict(matrices), data[:2], {"embed"}) == (structure, {})


class Faint(nn.Module):
    """A branch that adds little, whose queries may pass a ReLU before they meet the keys."""

    def __init__(self, bent: bool):
        super().__init__()
        self.bent, self.embed, self.head = bent, nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gain = nn.Parameter(torch.full((WIDTH,), 1e-3))

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (
            f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = ((q.relu() if self.bent else q) @ k.mT * 0.5).softmax(-1) @ v
        return self.head(x + self.gain * self.proj(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("bent", [False, True])
def test_a_faint_branch_is_not_turned_where_that_changes_it(bent):
    torch.manual_seed(0)
    model, data = Faint(bent), torch.randn(64, 5, 6)
    structure, matrices = trace(model, data[:2]), calibrate(model, [data])
    names = {coupling.name for coupling in structure.couplings}
    _, values = in_basis(structure, dict(matrices), data[:2], names)
    assert ("q.weight" in values) is not bent
