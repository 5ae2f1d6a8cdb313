"""Hooks leave no trace: in copies and pickles, for other tools, and once the optimizer is gone."""

import copy
import gc
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from support.compare import differing, snapshot
from support.training import batch, cnn, make, mlp, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rlscuda import RLSOptimizer
from rlscuda.optim.hooks import ForwardHook
from rlscuda.pruning import SketchTracker

COPIES = {
    "deepcopy": copy.deepcopy,
    "average": lambda model: AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def traces(model):
    """Everything of ours that a module holds."""
    found = []
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_hooks_with_kwargs"):
            hooks = getattr(module, name)
            if type(hooks) is not OrderedDict or hooks or vars(hooks):
                found.append((module, name, dict(hooks)))
    return found


@pytest.mark.parametrize("owner", [RLSOptimizer, SketchTracker])
@pytest.mark.parametrize("name", COPIES)
def test_copies_have_none(name, owner):
    model = mlp()
    kept = owner(model)
    assert len(traces(model)) == 4
    twin = COPIES[name](model)
    assert not traces(twin)
    twin(batch(model)).sum().backward()
    del kept
    gc.collect()
    assert not traces(model)


def test_hooks_of_others_are_copied_and_can_be_removed():
    model = mlp()
    before = model[0].register_forward_hook(lambda m, x, y: y + 1)
    optimizer = RLSOptimizer(model)
    after = model[2].register_forward_hook(nothing, with_kwargs=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch(model)), model(batch(model)))
    assert not torch.equal(twin(batch(model)), mlp()(batch(model)))
    assert not any(isinstance(h, ForwardHook) for m in twin for h in m._forward_hooks.values())
    assert list(twin[2]._forward_hooks.values()) == [nothing]
    train(model, optimizer, 1)
    before.remove(), after.remove()
    del optimizer
    gc.collect()
    assert not traces(model)


def nothing(module, args, kwargs, output):
    return None


def test_pickle_beside_the_hooks_of_others_needs_nothing_of_ours():
    model = mlp()
    model[0].register_forward_hook(nothing, with_kwargs=True)
    optimizer = RLSOptimizer(model)
    file = saved(model)
    assert b"rlscuda" not in file.getvalue()
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(batch(model)), model(batch(model)))
    del optimizer


def test_twenty_copies_do_not_grow():
    model = mlp()
    for _ in range(20):
        optimizer = RLSOptimizer(model)
        train(model, optimizer, 1)
        model = copy.deepcopy(model)
    assert not traces(model)
    fresh = RLSOptimizer(model)
    assert all(len(module._forward_hooks) == 1 for module in (model[0], model[2]))
    del fresh


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_leaves_them_out(protocol):
    model = mlp()
    theirs = model[0].register_forward_hook(nothing, with_kwargs=True)
    optimizer = RLSOptimizer(model)
    for dump in (pickle.dumps, pickle._dumps):
        twin = pickle.loads(dump(model, protocol))
        assert list(twin[0]._forward_hooks.values()) == [nothing] and not traces(twin[2])
    assert all(type(model[i]._forward_hooks) is OrderedDict for i in (0, 2))  # for the compiler
    assert len(model[2]._forward_hooks.copy()) == 1
    theirs.remove()
    del optimizer


# -- other tools, while the optimizer lives --------------------------------------------------------


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantised_in_place(model):
    """Moves the hooks to modules of its own, registered without keyword arguments."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)


def quantisation_aware(model):
    model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(model)


def exported(strict):
    def export(model):
        return torch.export.export(model, (batch(mlp()),), strict=strict).module()

    return export


def compiled_whole(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def compiled_whole_no_grad(model):
    return torch.no_grad()(compiled_whole(model))


def traced(model):
    return torch.jit.trace(model, (batch(mlp()),))


def symbolic(model):
    return torch.fx.symbolic_trace(model)


TOOLS = {
    "quantize_dynamic": (quantised, False, 0.1),
    "quantize_dynamic_in_place": (quantised_in_place, False, 0.1),
    "prepare_qat": (quantisation_aware, True, 0.1),
    "export_strict": (exported(True), False, 1e-6),
    "export_strict_training": (exported(True), True, 1e-6),
    "export": (exported(False), False, 1e-6),
    "fullgraph": (compiled_whole, False, 1e-6),
    "fullgraph_no_grad": (compiled_whole_no_grad, False, 1e-6),
    "jit_trace": (traced, False, 1e-6),
    "jit_trace_training": (traced, True, 1e-6),
    "fx": (symbolic, False, 1e-6),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOOLS)
def test_tools_take_a_model_under_training(name):
    tool, training, tolerance = TOOLS[name]
    torch.compiler.reset()
    model = mlp().train(training)
    optimizer = RLSOptimizer(model)
    x = batch(model)
    expected = model(x).detach()
    result = tool(model)
    for _ in range(2):  # a dead hook may be called only later
        torch.testing.assert_close(result(x).detach(), expected, rtol=tolerance, atol=tolerance)
    del optimizer
    torch.compiler.reset()


def test_tools_that_list_hooks_find_names():
    model = mlp()
    optimizer = RLSOptimizer(model)
    assert {hook.__name__ for module in model for hook in module._forward_hooks.values()} == {
        "rlscuda_forward_hook"
    }
    del optimizer


def test_construction_leaves_what_is_compiled_of_others():
    frames = []

    def counting(graph, inputs):
        frames.append(graph)
        return graph

    torch.compiler.reset()
    other = torch.compile(nn.Linear(3, 3), backend=counting)
    other(torch.ones(1, 3))
    model = mlp()
    optimizer = RLSOptimizer(model)
    tracker = SketchTracker(model)
    train(model, optimizer, 1)
    other(torch.ones(1, 3))
    assert len(frames) == 1
    tracker.detach()
    torch.compiler.reset()


def test_copied_optimizer_observes_the_copied_model():
    model = cnn()
    optimizer = make(model)
    train(model, optimizer, 2)
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2, seed=5)
    train(twin, other, 2, seed=5)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
