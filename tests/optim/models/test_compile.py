"""torch.compile of the model, before and after the optimizer is made: the hooks still fire."""

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, train

from rlscuda import RLSOptimizer


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    return torch.compile(model, backend="eager")


def before(model):
    return make(compiled(model)), compiled(model)


def before_and_called(model):
    """A hook put on after the first compiled call would never fire without a reset."""
    fast = compiled(model)
    fast(batch(model)).sum().backward()
    model.zero_grad()
    return make(fast), fast


def called_then_by_parameters(model):
    fast = compiled(model)
    fast(batch(model)).sum().backward()
    model.zero_grad()
    return make(model.parameters(), model=fast), fast


def after(model):
    return make(model), compiled(model)


def in_place(model):
    optimizer = make(model)
    model.compile(backend="eager")
    return optimizer, model


def by_layer(model):
    optimizer = make(model)
    for layer in model:
        layer.compile(backend="eager")
    return optimizer, model


@pytest.mark.parametrize(
    "order", [before, before_and_called, called_then_by_parameters, after, in_place, by_layer]
)
def test_compiled_model_trains_as_the_eager_one(order):
    model, twin = cnn(), cnn()
    for m in (model, twin):
        m[1].eval()  # a first call must leave no running statistics behind
    optimizer, fast = order(model)
    other = make(twin)
    for step in range(3):
        x = batch(twin, seed=step)
        for m, o in ((fast, optimizer), (twin, other)):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    assert {h.missing for h in optimizer.health().values()} == {0}
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


def test_compiled_model_in_eval_mode_leaves_the_matrix_alone():
    """So that it compiles as a whole; the optimizer warns if that goes on."""
    model = cnn()
    optimizer = make(model)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    P = optimizer.inverse_autocorrelation("0").clone()
    compiled(model.eval())(batch(model)).sum().backward()
    optimizer.step()
    assert torch.equal(P, optimizer.inverse_autocorrelation("0"))
    assert optimizer.health()["0"].missing == 1


def test_compiled_training_step_breaks_its_graph_at_the_optimizer():
    model, twin = cnn(), cnn()
    optimizer, other = RLSOptimizer(model), RLSOptimizer(twin)

    def training_step(m, o, x):
        o.zero_grad()
        loss = m(x).square().mean()
        loss.backward()
        o.step()
        return loss

    fast = torch.compile(training_step, backend="eager")
    for step in range(2):
        x = batch(twin, seed=step)
        assert torch.equal(fast(model, optimizer, x), training_step(twin, other, x))
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
