"""What a step learns of its inputs: each differentiated forward once, and nothing else."""

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

SUMMARIES = ["mean", "sketch", "sample"]
MODELS = {"mlp": mlp, "cnn": cnn}


def no_batch_norm(name):
    model = MODELS[name](torch.float64)
    return nn.Sequential(*(m for m in model if not isinstance(m, nn.BatchNorm2d)))


def run(name, summary, rank, forward, steps=2, size=8):
    """The values after a few steps; `forward(model, x)` leaves gradients of the mean loss."""
    model = no_batch_norm(name)
    optimizer = make(model, summary, rank)
    for step in range(steps):
        optimizer.zero_grad()
        forward(model, batch(model, size, seed=step), optimizer)
        optimizer.step()
    return snapshot(model, optimizer)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-9, atol=1e-11, msg=key)


def whole(model, x, optimizer):
    model(x).square().sum().backward()


def micro_batches(sizes):
    def forward(model, x, optimizer):
        for part in x.split(sizes):
            model(part).square().sum().backward()

    return forward


def losses_added(model, x, optimizer):
    sum(model(part).square().sum() for part in x.split(4)).backward()


def zero_grad_after_forward(model, x, optimizer):
    for k, part in enumerate(x.split(4)):
        loss = model(part).square().sum()
        if k == 0:
            optimizer.zero_grad()
        loss.backward()


def abandoned_forward_first(model, x, optimizer):
    model(torch.full_like(x, 3.0)).square().sum()
    optimizer.zero_grad()
    whole(model, x, optimizer)


def retained_graph(model, x, optimizer):
    loss = model(x).square().sum() / 2
    loss.backward(retain_graph=True)
    loss.backward()


def gradient_dropped_in_between(model, x, optimizer):
    model(torch.full_like(x, 3.0)).square().sum().backward()
    model.zero_grad()
    whole(model, x, optimizer)


def gradient_dropped_and_graph_used_again(model, x, optimizer):
    loss = model(x).square().sum()
    (2 * loss).backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()


def double_backward(model, x, optimizer):
    loss = model(x).square().sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (loss + 0 * sum(g.square().sum() for g in grads)).backward()


def input_gradient_first(model, x, optimizer):
    probe = x.clone().requires_grad_()
    torch.autograd.grad(model(probe).sum(), probe)
    whole(model, x, optimizer)


def eval_and_no_grad_forwards(model, x, optimizer):
    model.eval()
    model(3 * x).sum()
    model.train()
    with torch.no_grad():
        model(3 * x)
    whole(model, x, optimizer)


def checkpointed(use_reentrant, parts=1):
    def forward(model, x, optimizer):
        for part in x.chunk(parts):
            out = checkpoint(model, part.requires_grad_(), use_reentrant=use_reentrant)
            out.square().sum().backward()

    return forward


def checkpointed_segments(use_reentrant):
    def forward(model, x, optimizer):
        out = checkpoint(model[:2], x.requires_grad_(), use_reentrant=use_reentrant)
        checkpoint(model[2:], out, use_reentrant=use_reentrant).square().sum().backward()

    return forward


SAME_AS_WHOLE = {
    "zero_grad_after_forward": zero_grad_after_forward,
    "micro_batches": micro_batches([4, 4]),
    "uneven_micro_batches": micro_batches([1, 5, 2]),
    "losses_added": losses_added,
    "retained_graph": retained_graph,
    "gradient_dropped_in_between": gradient_dropped_in_between,
    "gradient_dropped_and_graph_used_again": gradient_dropped_and_graph_used_again,
    "double_backward": double_backward,
    "eval_and_no_grad_forwards": eval_and_no_grad_forwards,
    "checkpoint": checkpointed(False),
    "checkpoint_reentrant": checkpointed(True),
    "checkpoint_segments": checkpointed_segments(False),
    "checkpoint_segments_reentrant": checkpointed_segments(True),
    "checkpoint_accumulated": checkpointed(False, 2),
    "checkpoint_reentrant_accumulated": checkpointed(True, 2),
}


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("forward", SAME_AS_WHOLE)
def test_same_as_one_large_batch(forward, name, summary):
    for rank in (1, 3):
        expected = run(name, summary, rank, whole)
        assert_same(expected, run(name, summary, rank, SAME_AS_WHOLE[forward]))


@pytest.mark.parametrize("forward", [abandoned_forward_first, input_gradient_first])
def test_a_forward_without_gradient_of_weights_changes_draws_only(forward):
    """Its loss was never differentiated, or by the input alone: the mean does not see it."""
    assert_same(run("mlp", "mean", 1, whole), run("mlp", "mean", 1, forward))


@pytest.mark.parametrize("dropped", [False, True])
def test_input_gradients_amid_accumulation_do_not_count(dropped):
    model = mlp()
    optimizer = make(model, "mean", 1)
    stage = optimizer._registry.stages[model[0].weight]
    for part in batch(model, 8).split(4):
        probe = part.clone().requires_grad_()
        torch.autograd.grad(model(probe).sum(), probe)
        model(part).sum().backward()
        if dropped:
            model.zero_grad()
    model(batch(model, 4)).sum().backward()
    assert stage.calls == (1 if dropped else 3)


def test_what_is_done_in_place_to_a_view_of_the_output_loses_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    optimizer = make(model, "mean", 1)
    model(torch.ones(2, 5, 4)).sum().backward()
    assert optimizer._registry.stages[model[0].weight].summary.total == 10


class Twice(nn.Module):
    """One layer called twice in a forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_shared_layer_counts_every_call(summary, reentrant):
    model = Twice()
    optimizer = make(model, summary, 2)
    x = torch.randn(6, 3).double().requires_grad_()
    out = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    out.sum().backward()
    stage = optimizer._registry.stages[model.layer.weight]
    assert stage.calls == 2 and stage.summary.total == 12
    if summary == "mean":
        hidden = torch.tanh(model.layer(x))
        rows = torch.cat([x, hidden])
        mean = torch.cat([rows.mean(0), torch.ones(1)])
        torch.testing.assert_close(stage.summary.rows[0].mean(0), mean)
    else:  # the two calls draw differently
        before = stage.summary.rows
        optimizer.zero_grad()
        model.layer(x).sum().backward()
        assert not torch.allclose(before, stage.summary.rows)


@pytest.mark.parametrize("summary", ["sketch", "sample"])
def test_draws_differ_by_step_layer_and_seed(summary):
    def rows(seed=0, steps=0, second=False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
        optimizer = make(model, summary, 1, seed=seed)
        x = torch.arange(60.0).view(20, 3).double()
        for _ in range(steps + 1):
            optimizer.zero_grad()
            model[second](x).sum().backward()
            result = optimizer._registry.stages[model[second].weight].summary.rows
            optimizer.step()
        return result

    different = [rows(), rows(seed=1), rows(steps=1), rows(second=True)]
    for i, first in enumerate(different):
        assert torch.equal(first, first)
        for second in different[:i]:
            assert not torch.equal(first, second)
    assert torch.equal(rows(), rows())


@pytest.mark.parametrize("module", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)])
def test_output_may_be_changed_in_place(module):
    model = nn.Sequential(nn.Linear(4, 6), module, nn.Linear(6, 2)).double()
    optimizer = make(model, rank=1)
    seen = []
    model[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    x = batch(model)
    model(x).sum().backward()
    for layer, rows in ((model[0], x), (model[2], seen[0])):
        summary = optimizer._registry.stages[layer.weight].summary
        torch.testing.assert_close(summary.rows[0, 0, :-1], rows.mean(0))
    optimizer.step()
    assert optimizer.health()["0"].updates == 1


def test_empty_batch_is_no_input():
    model = mlp()
    optimizer = make(model)
    model(batch(model)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(model, optimizer)
    model(torch.empty(0, 4)).sum().backward()
    optimizer.step()
    changed = differing(before, snapshot(model, optimizer))
    assert not any(name.endswith(".P") for name in changed)
    assert not any(name.startswith("param") for name in changed)  # a zero gradient moves nothing
    assert optimizer.health()["0"].missing == 1


def test_undefined_gradient_is_no_input():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    model = mlp()
    optimizer = make(model)
    (Cut.apply(model(batch(model))).sum() + model[2].weight.sum()).backward()
    optimizer.step()
    assert optimizer.health()["2"].missing == 1


def test_transforms_of_torch_func_pass_the_layers_untouched():
    model = mlp()
    optimizer = make(model)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(
        dict(model.named_parameters()), batch(model)
    )
    for name, parameter in model.named_parameters():
        parameter.grad = per_sample[name].mean(0)
    optimizer.step()
    assert optimizer.health()["0"].missing == 1
    optimizer.zero_grad()
    model(batch(model)).sum().backward()
    optimizer.step()
    assert optimizer.health()["0"].updates == 1


def test_two_optimizers_see_the_same_model_apart():
    model = mlp()
    first = make(list(model[0].parameters()), model=model)
    second = make(list(model[2].parameters()), model=model, summary="sketch")
    model(batch(model)).sum().backward()
    first.step()
    second.step()
    assert first.health().keys() == {"0"} and second.health().keys() == {"2"}


def test_forward_between_backward_and_step_counts_for_the_next():
    model = nn.Linear(4, 3)
    optimizer = make(model, summary="mean", rank=1)
    stage = optimizer._registry.stages[model.weight]
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    model(first).sum().backward()
    ahead = model(second)
    torch.testing.assert_close(stage.summary.rows[0, 0, :4], first.mean(0))
    optimizer.step()
    optimizer.zero_grad()
    ahead.sum().backward()
    torch.testing.assert_close(stage.summary.rows[0, 0, :4], second.mean(0))


@pytest.mark.parametrize("form", ["paper", "natural", "adaptive", "spectral"])
def test_autograd_notices_that_the_weights_have_moved(form):
    model = mlp()
    optimizer = make(model, form=form)
    stale = model(batch(model)).sum()
    model(batch(model)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
