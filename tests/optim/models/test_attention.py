"""`nn.MultiheadAttention`: of one input, its in_proj is a Linear; of several, it says so."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from support.compare import differing, snapshot
from support.training import make
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlscuda import RLSOptimizer
from rlscuda.pruning import own_matrices
from rlscuda.pruning.matrices.calibration import pruning_layers

FORMS = ["paper", "natural", "adaptive"]


class ByHand(nn.Module):
    """Self-attention with its projections as Linears, of the numbers of a MultiheadAttention."""

    def __init__(self, attention):
        super().__init__()
        size, self.heads = attention.embed_dim, attention.num_heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.to(attention.in_proj_weight.dtype)
        for p, q in zip(self.parameters(), attention.parameters()):
            p.data = q.detach().clone()

    def forward(self, x):
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Itself(nn.Module):
    """Calls an attention on one tensor, in one of the ways that people do."""

    def __init__(self, attention, how="positional"):
        super().__init__()
        self.attention, self.how = attention, how

    def forward(self, x):
        if self.how == "named":
            return self.attention(query=x, key=x, value=x, need_weights=False)[0]
        if self.how == "mixed":
            return self.attention(x, x, value=x)[0]
        if self.how == "checkpointed":
            return checkpoint(lambda y: self.attention(y, y, y)[0], x, use_reentrant=False)
        return self.attention(x, x, x)[0]


def fit(model, optimizer, shape=(3, 5, 8), steps=3, dtype=torch.float64):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def attention(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True, **options).double()


@pytest.mark.parametrize("how", ["positional", "named", "mixed", "checkpointed"])
@pytest.mark.parametrize("options", [
    {"form": "paper", "trust_ratio": math.inf}, {"form": "paper"}, {"form": "natural"},
    {"form": "adaptive", "summary": "sample"}, {"form": "adaptive", "max_fan_in": 4},
])  # fmt: skip
def test_self_attention_steps_as_a_linear_of_its_input(options, how):
    model = Itself(attention(), how)
    twin = ByHand(model.attention)
    optimizer, other = make(model, **options), make(twin, exclude=["out"], **options)
    for m, o in ((model, optimizer), (twin, other)):
        fit(m, o)
    rows = {row.name: row for row in optimizer.coverage()}
    assert rows["attention"].status == "exact" and rows["attention"].fan_in == 9
    assert rows["attention.out_proj"].status == "fallback"
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
        for name, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, other.state[q][name], rtol=1e-8, atol=1e-10)
    health = optimizer.health()["attention"]
    assert (health.missing, health.updates) == (0, 3 * rows["attention"].blocks)
    assert own_matrices(optimizer)["attention"].shape == (1, 9, 9)


def test_time_first_and_without_biases():
    torch.manual_seed(0)
    model = Itself(nn.MultiheadAttention(8, 2, bias=False, add_zero_attn=True).double())
    optimizer = RLSOptimizer(model)
    fit(model, optimizer)
    assert optimizer.inverse_autocorrelation("attention").shape == (8, 8)
    assert optimizer.health()["attention"].updates == 3
    model = Itself(attention(add_bias_kv=True))
    optimizer = RLSOptimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, optimizer)
    assert not any(map(torch.equal, before, model.parameters()))


class Crossed(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = attention(), nn.Linear(8, 2).double()

    def forward(self, x):
        return self.head(self.attention(x, x.flip(1), x.flip(1))[0])


def test_attention_of_several_inputs_says_that_it_has_no_matrix():
    model = Crossed()
    optimizer = RLSOptimizer(model)
    assert optimizer.coverage()[0].why == ""  # only a forward can show it
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(
        UserWarning, match="no input was seen .* of 'attention': .*attention of more"
    ):
        fit(model, optimizer, steps=4)
    assert not any(map(torch.equal, before, model.parameters()))
    row = optimizer.coverage()[0]
    assert (row.status, row.why) == (
        "exact", "its query, key and value are not one tensor: it steps without P")  # fmt: skip
    assert optimizer.health()["attention"].missing == 4
    excluded = RLSOptimizer(model, exclude=["attention"]).coverage()[0]
    assert (excluded.status, excluded.why) == ("fallback", "excluded")


@pytest.mark.parametrize("build, why", [
    (lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
     "its query, key and value have weights of their own"),
    (lambda: nn.TransformerDecoderLayer(8, 2, 16).multihead_attn, ""),
])  # fmt: skip
def test_reason_for_the_fallback(build, why):
    model = nn.ModuleList([build(), nn.Linear(2, 2)])
    assert RLSOptimizer(model).coverage()[0].why == why


def test_decoder_layers_cross_only_where_they_do():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    optimizer = RLSOptimizer(model, lr=0.02)
    why = {r.name: r.why for r in optimizer.coverage() if r.kind == "MultiheadAttention"}
    assert why == {
        "encoder.layers.0.self_attn": "",
        "decoder.layers.0.self_attn": "",
        "decoder.layers.0.multihead_attn": "its query differs from its key and value",
    }
    torch.manual_seed(0)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 8), torch.randn(2, 3, 8)).square().mean().backward()
        optimizer.step()
    health = optimizer.health()
    assert {name: h.missing for name, h in health.items()} == dict.fromkeys(health, 0)


@pytest.mark.parametrize("form", FORMS)
def test_state_goes_round(form):
    model = Itself(attention())
    optimizer = RLSOptimizer(model, form=form)
    fit(model, optimizer)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    twin = Itself(attention())
    other = RLSOptimizer(twin, form=form)
    for one, state in zip((twin, other), torch.load(buffer, weights_only=True)):
        one.load_state_dict(state)
    copied, with_it = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other)):
        fit(m, o)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    fit(copied, with_it)
    assert with_it.health()["attention"].updates == 6


def test_what_cuts_or_masks_has_no_rule():
    model = nn.Sequential(attention(), nn.Linear(8, 2))
    assert [layer.name for layer in pruning_layers(model, None)] == ["1"]
    with pytest.raises(ValueError, match="MultiheadAttention cannot be pruned"):
        pruning_layers(model, ["0"])
