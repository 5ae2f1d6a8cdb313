"""The fallback rule: exactly the torch optimizer, over all that no RLS rule covers."""

import pytest
import torch
from support.compare import differing, snapshot
from torch import nn

from rlscuda import RLSOptimizer

RULES = {
    "adamw": ("adamw", lambda groups: torch.optim.AdamW(groups, fused=True)),
    "sgd": ("sgd", lambda groups: torch.optim.SGD(groups, momentum=0.9)),
    "adagrad": (torch.optim.Adagrad, torch.optim.Adagrad),
    "nesterov": (lambda groups: torch.optim.SGD(groups, momentum=0.5, nesterov=True),) * 2,
    "rmsprop": (torch.optim.RMSprop, torch.optim.RMSprop),
}


class Mixed(nn.Module):
    """A layer of each kind that falls to the fallback rule, beside one that does not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.covered = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.up = nn.ConvTranspose1d(5, 3, 2)
        self.gain = nn.Parameter(torch.ones(3, 1))

    def forward(self, x):
        hidden = self.norm(self.covered(self.embedding(x)))
        return self.gain * self.up(hidden.mT)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", [False, True])
def test_fallback_is_exactly_the_torch_optimizer(rule, split):
    """Of the same gradients, with the weight decay and rate of each group."""
    ours, its = RULES[rule]
    model, twin = Mixed(), Mixed()
    twin.load_state_dict(model.state_dict())

    def others(m):
        return [p for name, p in m.named_parameters() if not name.startswith("covered")]

    if split:
        groups = [{"params": model.covered.parameters()},
                  {"params": others(model)[:3], "lr": 0.05, "weight_decay": 0.1},
                  {"params": others(model)[3:], "lr": 0.002}]  # fmt: skip
        optimizer = RLSOptimizer(groups, model=model, fallback=ours)
        oracle = its([{"params": others(twin)[:3], "lr": 0.05, "weight_decay": 0.1},
                      {"params": others(twin)[3:], "lr": 0.002, "weight_decay": 0.0}])  # fmt: skip
    else:
        optimizer = RLSOptimizer(model, fallback=ours, fallback_lr=0.03, weight_decay=0.2)
        oracle = its([{"params": others(twin), "lr": 0.03, "weight_decay": 0.0}])
    statuses = {row.name: row.status for row in optimizer.coverage()}
    assert statuses == {"": "fallback", "embedding": "fallback", "covered": "exact",
                        "norm": "fallback", "up": "fallback"}  # fmt: skip
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randint(7, (6, 2))).square().sum().backward()
        for p, q in zip(others(model), others(twin)):
            q.grad = p.grad.clone()
        optimizer.step()
        oracle.step()
    for p, q in zip(others(model), others(twin)):
        assert torch.equal(p, q)
        for name, value in oracle.state[q].items():
            if value is not None:
                assert torch.equal(optimizer.state[p][name], value), name
    assert optimizer.health()["covered"].updates == 5


@pytest.mark.filterwarnings("ignore:no module that holds the parameters")
@pytest.mark.parametrize("how", ["strided", "transposed", "channels_last", "gradient"])
def test_fallback_minds_the_layout_of_a_parameter(how):
    value = torch.randn(4, 6, 3, 3)
    p = {
        "strided": torch.stack([value, value], -1)[..., 0],
        "transposed": value.transpose(0, 1).contiguous().transpose(0, 1),
        "channels_last": value.to(memory_format=torch.channels_last),
        "gradient": value.clone(),
    }[how]
    p, q = nn.Parameter(p), nn.Parameter(value.clone())
    optimizer = RLSOptimizer([p], lr=0.01)
    oracle = torch.optim.AdamW([q], lr=0.01, weight_decay=0, foreach=False)
    for step in range(3):
        q.grad = torch.randn(4, 6, 3, 3)
        turned = how == "gradient" and step != 1
        p.grad = q.grad.transpose(2, 3).contiguous().transpose(2, 3) if turned else q.grad.clone()
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fallback, error, message", [
    ("adam", ValueError, r"fallback must be adamw | sgd or a callable, got 'adam'"),
    (0.1, TypeError, "fallback must be a name or a callable, got float"),
    (lambda groups: groups, TypeError, "fallback must return a torch optimizer, got list"),
    (lambda groups: torch.optim.SGD(groups[0]["params"], lr=1.0), ValueError,
     "fallback must return an optimizer over the groups that it is given"),
])  # fmt: skip
def test_wrong_fallback(fallback, error, message):
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2), nn.LayerNorm(2))
    groups = [{"params": m.parameters()} for m in model]
    with pytest.raises(error) as caught:
        RLSOptimizer(groups, model=model, fallback=fallback)
    assert message in str(caught.value)
    assert not any(m._forward_hooks for m in model)


def test_fallback_that_refuses_leaves_the_layers_where_they_were():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = RLSOptimizer(model)
    before = snapshot(model, optimizer)
    model(torch.tensor([1, 2])).square().sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert not differing(before, snapshot(model, optimizer))


def test_sparse_gradients_by_a_fallback_that_takes_them():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = RLSOptimizer(model, fallback=torch.optim.SparseAdam)
    model(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    moved = (model[0].weight != before[0]).any(1)
    assert moved.tolist() == [False, True, True, False, False]
    assert not torch.equal(model[1].weight, before[1])


@pytest.mark.filterwarnings("ignore:no module that holds the parameters")
def test_follows_a_weight_decay_set_later():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3))
    twin = torch.nn.Parameter(p.detach().clone())
    optimizers = RLSOptimizer([p], lr=0.1), torch.optim.AdamW([twin], lr=0.1, weight_decay=0)
    for decay in (0.0, 0.5):
        for optimizer, parameter in zip(optimizers, (p, twin)):
            optimizer.param_groups[0]["weight_decay"] = decay
            parameter.grad = torch.ones(3)
            optimizer.step()
    assert torch.equal(p, twin)
