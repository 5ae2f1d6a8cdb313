"""Surgery on a model: dead channels can go unnoticed, and everything that was there follows."""

from __future__ import annotations

import copy

import pytest
import torch
from support.compare import assert_close
from support.pruning_models import ZOO, Attention, Case, Twice, inputs, lenet, resnet, vgg
from support.pruning_surgery import every_other, gathered, operate, prune, training
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner
from rlscuda.pruning.running.calls import all_tensors
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan

by_name = {"argvalues": ZOO, "ids": lambda case: case.name}
WITH_STATISTICS = ("convnext", "attention", "grouped")  # over channels, dead ones included


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize("case", [c for c in ZOO if c.name not in WITH_STATISTICS],
                         ids=lambda case: case.name)  # fmt: skip
def test_dead_channels_are_not_missed(case: Case, training_mode, dtype):
    model, x = case.model(dtype).train(training_mode), inputs(dtype)
    structure = trace(model, x)
    surgery = plan(structure, every_other(structure))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in surgery.tensors:
                parameter.copy_(surgery.tensors[name].mask(parameter))
    whole = copy.deepcopy(model)
    operate(model, [], surgery, {}, x)
    torch.manual_seed(0)
    expected = whole(x)
    torch.manual_seed(0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    drop = isinstance(model, nn.Sequential) and any(isinstance(m, nn.Dropout) for m in model)
    if not (drop and training_mode):  # fewer draws
        torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", ["adaptive", "paper", "natural", "spectral"])
@pytest.mark.parametrize("case", **by_name)
def test_every_remaining_weight_moves(case: Case, form):
    model = case.model(torch.float64)  # gradients may be too small for float32 to add
    optimizer = RLSOptimizer(model, form=form, lr=0.05, momentum=0.5, fallback="sgd")
    training(model, optimizer)
    prune(model, optimizer)
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        training(model, optimizer, steps=1)
        still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
        assert still == []
    names = {row.name for row in optimizer.coverage() if row.status == "exact"}
    assert names and all(health.missing == 0 for health in optimizer.health().values())


@pytest.mark.parametrize("case", **by_name)
def test_shapes_attributes_and_groups(case: Case):
    model = case.model()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    before = dict(model.named_parameters())
    surgery = prune(model, optimizer)
    members = {p for group in optimizer.param_groups for p in group["params"]}
    assert members == set(model.parameters()) and len(members) < len(members | set(before.values()))
    tensors = all_tensors(model)
    assert all(kept.shape == tensors[name].shape for name, kept in surgery.tensors.items())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert module.weight.shape[:2] == shape
    for weight in optimizer._registry.layers:
        assert optimizer.state[weight]["P"].shape == optimizer._registry.layers[weight].matrix_shape
    prune(model, optimizer)  # and again
    training(model, optimizer)


def test_widths_by_hand():
    model = vgg()
    first, second = model[0].weight, model[4].weight
    structure = trace(model, inputs())
    operate(model, [], plan(structure, {"0": [1, 4], "4": [0]}), {}, inputs())
    keep = [0, 2, 3, 5]
    assert torch.equal(model[0].weight, first[keep])
    assert torch.equal(model[4].weight, second[1:][:, keep])
    assert (model[1].num_features, model[4].in_channels, model[4].out_channels) == (4, 4, 7)


def test_buffers_follow():
    model = vgg()
    model(inputs())
    model[1].register_buffer("extra", torch.arange(6.0), persistent=False)
    mean, extra = model[1].running_mean.clone(), model[1].extra
    structure = trace(model, inputs())
    operate(model, [], plan(structure, {"0": [0, 5]}), {}, inputs())
    assert torch.equal(model[1].running_mean, mean[1:5])
    assert model[1].num_batches_tracked == 1 and model[1].extra is extra
    assert "1.extra" not in model.state_dict()


def test_values_take_the_place_of_weights():
    model = lenet().double()
    x = inputs(torch.float64)
    structure = trace(model, x)
    values = {"3.weight": torch.randn_like(model[3].weight), "3.bias": torch.randn(6).double()}
    bias = model[3].bias
    operate(model, [], plan(structure, {"0": [2]}), values, x)
    assert torch.equal(model[3].weight, values["3.weight"][:, [0, 1, 3]])
    assert model[3].bias is bias and torch.equal(bias, values["3.bias"])


def test_raw_inputs():
    model = resnet()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    structure = trace(model, inputs(), include_inputs=True)
    surgery = plan(structure, {"input 0": [1]})
    weight = model[0].weight
    with torch.no_grad():
        weight[:, 1] = 0
    expected = model.eval()(inputs())
    operate(model, [optimizer], surgery, {}, inputs())
    assert surgery.inputs["0"].tolist() == [0, 2]
    assert torch.equal(model[0].weight, weight[:, [0, 2]])
    assert_close(model(surgery.slice_inputs(inputs())), expected)


def test_what_hangs_on_a_parameter_stays():
    model = lenet()
    model[0].weight.requires_grad_(False)
    model[3].weight.label = "third"
    seen, forwards, after = [], [], []
    handle = model[3].weight.register_hook(lambda grad: seen.append(grad.shape))
    model[3].weight.register_post_accumulate_grad_hook(lambda p: after.append(p.shape))
    model[3].register_forward_hook(lambda *_: forwards.append(1))
    model(inputs()).square().mean().backward()
    gradient = model[3].weight.grad
    forwards.clear()
    structure = trace(model, inputs())
    operate(model, [], plan(structure, {"0": [0], "3": [5]}), {}, inputs())
    new = model[3].weight
    assert new.shape == (5, 3, 2, 2) and new.label == "third" and new.is_leaf
    assert torch.equal(new.grad, gradient[:5, 1:]) and model[6].bias.grad is not None
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    assert forwards == []
    model(inputs()).square().mean().backward()
    assert seen[-1] == after[-1] == new.shape and forwards == [1]
    handle.remove()
    model(inputs()).square().mean().backward()
    assert len(seen) == 2 and len(after) == 3


def test_frozen_stays_where_it_is():
    model = vgg()
    model[0].weight.requires_grad_(False)
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    prune(model, optimizer)
    frozen = model[0].weight.clone()
    training(model, optimizer)
    assert torch.equal(model[0].weight, frozen)


def test_ties_stay():
    model = Twice()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    prune(model, optimizer)
    assert model.first.weight is model.second.weight
    assert model.first.out_features == model.second.out_features == model.first.weight.shape[0]
    training(model, optimizer)


def test_a_module_of_two_names():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared, nn.Conv2d(4, 2, 6))
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    prune(model, optimizer)
    assert model[1] is model[3] and shared.weight.shape == (2, 2, 3, 3)
    training(model, optimizer)


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 6), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.encoder(x)) @ self.encoder.weight)


def test_weight_used_outside_of_its_module_is_followed():
    model, x = TiedAutoencoder(), torch.randn(3, 4)
    structure = trace(model, x)
    with torch.no_grad():
        model.encoder.weight[2], model.encoder.bias[2] = 0, 0
    before = model(x)
    operate(model, [], plan(structure, {"encoder": [2]}), {}, x)
    assert model.encoder.weight.shape == (5, 4) and structure.refused == {}
    torch.testing.assert_close(model(x), before)


def test_weight_used_outside_of_its_module_is_not_compensated():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.second(x) + nn.functional.linear(x.square(), self.second.weight))

    x = torch.randn(64, 4)
    report = RLSPruner(Twice(), None, x[:2], ratio=0.5, loader=[x]).step()
    assert report.uncompensated == {"second": "its weight is also used outside of it"}


def test_memory_format_stays():
    model = vgg().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    training(model, optimizer)
    prune(model, optimizer)
    for tensor in (model[4].weight, optimizer.state[model[4].weight]["exp_avg"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def test_attention_shrinks_every_head():
    model = Attention()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    structure = trace(model, inputs())
    old = model.attention.in_proj_weight
    operate(model, [optimizer], plan(structure, {"patches": [1]}), {}, inputs())
    keep = torch.tensor([0, 2, 3, 4, 6, 7])
    rows = torch.cat([keep, keep + 8, keep + 16])
    assert torch.equal(model.attention.in_proj_weight, old[rows][:, keep])
    assert (model.attention.embed_dim, model.attention.head_dim) == (6, 3)
    assert model.position.shape == (1, 4, 6)
    training(model, optimizer)


def test_layer_norm_of_many_channels_keeps_their_order():
    model = nn.Sequential(nn.Linear(3, 300), nn.LayerNorm(300), nn.Linear(300, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(300.0))
    structure = trace(model, torch.randn(2, 3))
    kept = [7, 64, 65, 200, 290]  # few of many: a set of them comes in another order
    removed = [i for i in range(300) if i not in kept]
    operate(model, [], plan(structure, {"0": removed}), {}, torch.randn(2, 3))
    assert model[1].weight.tolist() == kept and model[1].normalized_shape == (5,)


def test_instance_norm_with_statistics():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, track_running_stats=True),
                          nn.Conv2d(6, 2, 1))  # fmt: skip
    prune(model)
    assert model[1].running_mean.shape == (3,)


def test_a_model_in_low_precision():
    model = vgg().to(torch.bfloat16)
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    prune(model, optimizer)
    training(model, optimizer)
    assert all(s["P"].dtype == torch.float32 for s in optimizer.state.values() if "P" in s)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_compiled_model_goes_on():
    model = lenet()
    optimizer = RLSOptimizer(model)
    compiled = torch.compile(model, backend="eager")
    training(compiled, optimizer)
    prune(compiled, optimizer)
    before = model[0].weight.detach().clone()
    training(compiled, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert all(health.missing == 0 for health in optimizer.health().values())


def test_averaged_model_follows():
    model = vgg()
    optimizer = RLSOptimizer(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    training(model, optimizer)
    averaged.update_parameters(model)
    mean = averaged.module[0].weight.clone()
    surgery = prune(model, optimizer)
    operate(averaged.module, [], surgery, {}, inputs())
    kept = surgery.tensors["0.weight"]
    assert torch.equal(averaged.module[0].weight, gathered(mean, kept.index, kept.shape))
    averaged.update_parameters(model)


def test_a_default_device_is_not_followed():
    model = Attention()
    optimizer = RLSOptimizer(model)
    training(model, optimizer)
    x = inputs()
    with torch.device("meta"):  # where nothing can be computed
        structure = trace(model, x, include_inputs=True)
        surgery = plan(structure, every_other(structure))
        operate(model, [optimizer], surgery, {}, x)
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert all(s["P"].device.type == "cpu" for s in optimizer.state.values() if "P" in s)
