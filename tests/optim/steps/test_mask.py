"""Rows that a mask leaves out enter no `P`: as if they were not there."""

import copy

import pytest
import torch
from support.compare import differing, snapshot
from support.training import make
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlscuda import RLSOptimizer

FORMS = ["paper", "natural", "adaptive"]
SUMMARIES = ["mean", "sketch", "sample"]
VALID = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()


def network(inputs=4, hidden=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3, bias=False))
    return model.double()


def step(model, optimizer, x, mask=None):
    """One step of a loss that looks at what the mask leaves."""
    if mask is None:
        optimizer.zero_grad()
        y = model(x)
    else:
        with optimizer.mask(mask):
            optimizer.zero_grad()  # inside or before it
            y = model(x)[mask]
    y.square().sum().backward()
    optimizer.step()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("options, sizes", [
    ({"rank": 3}, {}), ({"rank": 1}, {}), ({"rank": 2, "max_fan_in": 3}, {}),
    ({"rank": 1}, {"inputs": 60, "hidden": 80}),  # of few rows: no factors where some are left out
])  # fmt: skip
def test_same_as_the_rows_taken_out(form, summary, options, sizes):
    model, twin = network(**sizes), network(**sizes)
    optimizer, other = (make(m, summary, form=form, **options) for m in (model, twin))
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(3, 5, sizes.get("inputs", 4)).double()
        x[~VALID] = 1e3
        step(model, optimizer, x, VALID)
        step(twin, other, x[VALID])
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


def test_every_row_is_no_mask():
    model, twin = network(), network()
    optimizer, other = make(model), make(twin)
    x = torch.randn(3, 5, 4).double()
    step(model, optimizer, x, torch.ones(3, 5).bool())
    step(twin, other, x.reshape(15, 4))
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


def test_no_row_at_all():
    model = network()
    optimizer = RLSOptimizer(model)
    with optimizer.mask(torch.zeros(3, 5).bool()):
        model(torch.randn(3, 5, 4).double()).sum().backward()
    optimizer.step()
    assert {(h.updates, h.missing) for h in optimizer.health().values()} == {(0, 1)}


def test_only_inputs_of_its_shape_are_masked():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2), "c": nn.Conv1d(3, 2, 1)})
    twin = copy.deepcopy(model)
    optimizer, other = make(model, rank=1), make(twin, rank=1)
    x = torch.randn(3, 5, 4)

    def forward(m, mask):
        hidden = m["a"](x)
        return m["b"](hidden.mean(1)).sum() + m["c"](hidden.transpose(0, 1)).sum()

    for m, o in ((model, optimizer), (twin, other)):
        if m is model:
            with o.mask(VALID):
                loss = forward(m, VALID)
        else:
            loss = forward(m, None)
        loss.backward()
        o.step()
    P = [{k: o.inverse_autocorrelation(k) for k in "abc"} for o in (optimizer, other)]
    assert {k for k in "abc" if torch.equal(P[0][k], P[1][k])} == {"b", "c"}


def test_masks_nest_and_end_with_an_error():
    model = network()
    optimizer = make(model)
    rows = optimizer._registry.inputs
    with pytest.raises(ZeroDivisionError), optimizer.mask(VALID):
        with optimizer.mask(VALID[:1]):
            assert rows.shape == (1, 5)
        assert rows.shape == (3, 5)
        raise ZeroDivisionError
    assert rows.shape is None
    twin = network()
    other = make(twin)
    x = torch.randn(3, 5, 4).double()
    for m, o in ((model, optimizer), (twin, other)):  # and none is left to a later forward
        step(m, o, x)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("wrong, got", [
    (torch.ones(3, 5), "torch.float32"), (torch.ones(3, 5).long(), "torch.int64"),
    ([[True]], "list"), (None, "NoneType"),
])  # fmt: skip
def test_wrong_mask(wrong, got):
    optimizer = make(network())
    with pytest.raises(TypeError, match=f"mask must be a bool tensor, got {got}"):  # noqa: SIM117
        with optimizer.mask(wrong):
            pass


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = network(), nn.Linear(3, 2).double()

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_checkpointed_segments_need_it_around_the_backward():
    model, twin = Checkpointed(), Checkpointed()
    twin.load_state_dict(model.state_dict())
    optimizer, other = make(model), make(twin)
    x = torch.randn(3, 5, 4).double().requires_grad_()
    with optimizer.mask(VALID):
        optimizer.zero_grad()
        loss = model(x)[VALID].square().sum()
    with pytest.raises(
        RuntimeError, match=r"'body.0' is recomputed outside of the mask .*\[3, 5\]"
    ):
        loss.backward()
    optimizer.zero_grad()
    with optimizer.mask(VALID):
        model(x)[VALID].square().sum().backward()
    optimizer.step()
    step(twin, other, x[VALID].detach().requires_grad_())
    assert_same(snapshot(model, optimizer), snapshot(twin, other))
    model(x).sum().backward()  # of no mask: nothing is left of the last


def test_self_attention():
    """Of the encoder of a padded batch, whose padded positions hold rubbish."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    twin = copy.deepcopy(layer)
    optimizer, other = RLSOptimizer(layer), RLSOptimizer(twin)
    x = torch.randn(3, 5, 8).double()
    spoiled = x.clone()
    spoiled[~VALID] = 100
    for m, o, given in ((layer, optimizer, x), (twin, other, spoiled)):
        for _ in range(3):
            o.zero_grad()
            with o.mask(VALID):
                m(given, src_key_padding_mask=~VALID)[VALID].square().sum().backward()
            o.step()
    for name in ("self_attn", "linear1", "linear2"):
        torch.testing.assert_close(*(o.inverse_autocorrelation(name) for o in (optimizer, other)))
    copied = copy.deepcopy((layer, optimizer))[1]
    with copied.mask(VALID):
        assert copied._registry.inputs is not optimizer._registry.inputs
