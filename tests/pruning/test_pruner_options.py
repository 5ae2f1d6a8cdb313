"""What `RLSPruner` refuses, and how it says so."""

import pytest
import torch
from support.pruning_nets import mlp, rows, trained, widths
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, SketchTracker


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of ratio, target_params, target_flops, max_loss must be given, got none"),
        ({"ratio": 0.5, "target_params": 9}, "exactly one of .* got ratio, target_params"),
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), got 1.0"),
        ({"target_params": 0}, "target_params must be > 0, got 0"),
        ({"target_flops": "1G"}, "target_flops must be a number, got '1G'"),
        ({"max_loss": -1}, "max_loss must be >= 0, got -1"),
        ({"max_loss": 0.1}, "max_loss needs evaluate"),
        ({"ratio": 0.5, "importance": "hessian"}, "importance must be saliency"),
        ({"ratio": 0.5, "selection": "all"}, "selection must be greedy | one-shot"),
        ({"ratio": 0.5, "selection": "greedy", "importance": "l1"}, "'greedy' is for importance"),
        ({"ratio": 0.5, "scope": "model"}, "scope must be layer | global, got 'model'"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be an integer >= 1, got 0"),
        ({"ratio": 0.5, "round_to": True}, "round_to must be an integer >= 1, got True"),
        ({"ratio": 0.5, "damping": -1}, "damping must be a finite number >= 0, got -1"),
        ({"ratio": 0.5, "damping": "a"}, "damping must be a finite number >= 0, got 'a'"),
        ({"ratio": 0.5, "damping": float("inf")}, "damping must be a finite number >= 0, got inf"),
        ({"ratio": 0.5, "seed": "a"}, "seed must be an integer, got 'a'"),
        ({"ratio": {0: 0.5}}, "ratio must be by name or shell pattern, got the key 0"),
        ({"ratio": 0.5, "ignored": "9"}, "ignored names '9', which the model does not have"),
        ({"ratio": 0.5, "source": "magic"}, "source must be own | sketch | calibration"),
        ({"ratio": 0.5, "source": "sketch"}, "source 'sketch' needs tracker="),
        ({"ratio": 0.5, "source": "calibration"}, "source 'calibration' needs loader="),
        ({"ratio": 0.5, "optimizer": None}, "matrices are needed: pass an RLSOptimizer"),
        ({"ratio": 0.5, "example_inputs": None}, "example_inputs must be what the model"),
    ],
)
def test_wrong_options(options, message):
    model = mlp(6, 8, 3)
    given = {"optimizer": RLSOptimizer(model), "example_inputs": rows(2), **options}
    with pytest.raises(ValueError, match=message):
        RLSPruner(model, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": [3]}, "model must be a module, got list"),
        ({"optimizer": "adam"}, "optimizer must be a torch optimizer, got str"),
        ({"optimizer": [3]}, "optimizer must be a torch optimizer, got int"),
        ({"tracker": 5}, "tracker must be a SketchTracker, got int"),
        ({"loader": 5}, "loader must be one that can be gone through again, .* got int"),
        ({"evaluate": 3}, "evaluate must be a function, got int"),
        ({"ignored": None}, "ignored takes names and modules, got NoneType"),
        ({"ignored": 3}, "ignored takes names and modules, got int"),
    ],
)
def test_wrong_types(options, message):
    given = {"model": mlp(6, 8, 3), "loader": [rows()], "example_inputs": rows(2), **options}
    with pytest.raises(TypeError, match=message):
        RLSPruner(**given, ratio=0.5)


def test_a_loss_that_is_no_number():
    model = mlp(6, 8, 3)
    pruner = RLSPruner(
        model, None, rows(2), max_loss=0.1, loader=[rows()], evaluate=lambda model: None
    )
    with pytest.raises(TypeError, match="evaluate must give a number, got NoneType"):
        pruner.step()


def test_taylor_without_gradients():
    model, optimizer = trained(6, 8, 3)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="importance 'taylor' needs gradients"):
        RLSPruner(model, optimizer, rows(2), ratio=0.5, importance="taylor").step()


@pytest.mark.parametrize("target", [{"ratio": 0.5}, {"target_params": 0.5}])
def test_a_tracker_that_saw_nothing_has_no_matrix(target):
    model = mlp(6, 8, 3)
    with pytest.raises(ValueError, match="the tracker's matrices are needed: it has seen no"):
        RLSPruner(model, None, rows(2), tracker=SketchTracker(model), **target).step()


def test_untrained_optimizer_has_no_matrix():
    model = mlp(6, 8, 3)
    with pytest.raises(ValueError, match="it has made no step yet"):
        RLSPruner(model, RLSOptimizer(model), rows(2), ratio=0.5).step()
    assert widths(model) == [8, 3]


def scripted():
    return torch.jit.script(mlp(6, 8, 3))


def scripted_inside():
    return nn.Sequential(scripted(), nn.Linear(3, 3))


def packed():
    return torch.ao.quantization.quantize_dynamic(mlp(6, 8, 3), {nn.Linear})


def of_integers():
    model = mlp(6, 8, 3)
    weight = torch.zeros(8, 6, dtype=torch.int8)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def of_other_tensors():
    model = mlp(6, 8, 3)
    weight = model[2].weight.detach()
    model[2].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (scripted, "^the model is a ScriptModule, whose code is fixed: prune the module"),
        (scripted_inside, "^'0', a RecursiveScriptModule, is a ScriptModule"),
        (packed, "^'0', a Linear, is quantised: prune the network first"),
        (of_integers, "^'0', a Linear, is quantised"),
        (of_other_tensors, "^'2', a Linear, must hold plain tensors, got a TwoTensor: prune it"),
    ],
)
def test_models_whose_weights_cannot_be_cut(make, message):
    with pytest.raises(ValueError, match=message):
        RLSPruner(make(), None, rows(2), ratio=0.5, loader=[rows()])


@pytest.mark.parametrize("error", [IndexError, RecursionError, ZeroDivisionError, RuntimeError])
def test_whatever_tracing_raises_is_one_kind_of_error(error, monkeypatch):
    def trace(*_):
        raise error("list index out of range")

    monkeypatch.setattr("rlscuda.pruning.pruner.trace", trace)
    model = mlp(6, 8, 3)
    message = f"the model cannot be traced: {error.__name__}: list index out of range"
    with pytest.raises(ValueError, match=message) as caught:
        RLSPruner(model, None, rows(2), ratio=0.5, loader=[rows()]).step()
    assert isinstance(caught.value.__cause__, error) and widths(model) == [8, 3]


def test_a_step_says_what_it_does():
    said = []
    RLSPruner(mlp(6, 6, 5, 2), None, rows(4), ratio=0.5, importance="l1", compensate=False).step(
        progress=said.append
    )
    assert said[:2] == ["following the forward", "trying 0 and 1 more"]
    assert said[-2:] == ["ranking 0", "ranking 2"]
