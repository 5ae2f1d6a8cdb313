"""state_dict, copies and pickles: exact, independent, and refused whole where they do not fit."""

import copy
import gc
import io
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from support.compare import differing, snapshot
from support.training import batch, cnn, mlp, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rlscuda import RLSOptimizer
from rlscuda.optim.hooks import ForwardHook

FORMS = ["paper", "natural", "adaptive", "spectral"]
SUMMARIES = ["mean", "sketch", "sample"]


def saved_and_loaded(state, weights_only=True):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@pytest.mark.parametrize("fallback", ["adamw", "sgd"])
@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("form", FORMS)
def test_resumed_run_is_bitwise_the_same(form, summary, fallback):
    def make():
        model = cnn()
        return model, RLSOptimizer(model, form=form, summary=summary, rank=2, lr=0.02,
                                   momentum=0.5, fallback=fallback)  # fmt: skip

    model, optimizer = make()
    train(model, optimizer, 3)
    weights, state = saved_and_loaded((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 3, seed=50)

    other, resumed = make()
    train(other, resumed, 1, seed=7)  # of no consequence
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, resumed, 3, seed=50)
    assert not differing(snapshot(model, optimizer), snapshot(other, resumed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("requested", [None, torch.float64], ids=str)
def test_dtypes_survive_loading(dtype, requested):
    model = cnn(dtype)
    optimizer = RLSOptimizer(model, dtype=requested)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    twin = cnn(dtype)
    other = RLSOptimizer(twin, dtype=requested)
    other.load_state_dict(state)
    for mine, its in zip(optimizer.state.values(), other.state.values()):
        for name, value in mine.items():
            assert torch.is_tensor(value) == torch.is_tensor(its[name])
            if torch.is_tensor(value):
                assert value.dtype == its[name].dtype and torch.equal(value, its[name])


@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_lie_anyhow_are_loaded_in_order(form):
    pairs = []
    for anyhow in (False, True):
        model = mlp()
        optimizer = RLSOptimizer(model, form=form, momentum=0.5)
        train(model, optimizer, 2)
        state = optimizer.state_dict()
        for entries in state["state"].values() if anyhow else ():
            matrices = {k: v for k, v in entries.items() if torch.is_tensor(v) and v.dim() > 1}
            entries.update({k: v.mT.contiguous().mT for k, v in matrices.items()})
        optimizer.load_state_dict(state)
        train(model, optimizer, 2, seed=50)
        pairs.append(snapshot(model, optimizer))
    assert not differing(*pairs)


def test_loading_neither_changes_nor_aliases_the_callers_dict():
    model = cnn()
    optimizer = RLSOptimizer(model)
    train(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    twin = cnn()
    other = RLSOptimizer(twin)
    other.load_state_dict(state)
    pointers = {v.data_ptr() for s in state["state"].values() for v in s.values()
                if torch.is_tensor(v)}  # fmt: skip
    for entries in other.state.values():
        for value in entries.values():
            assert not torch.is_tensor(value) or value.data_ptr() not in pointers
    train(twin, other, 2)
    assert state["param_groups"] == kept["param_groups"]
    for key, entries in kept["state"].items():
        assert entries.keys() == state["state"][key].keys()
        for name, value in entries.items():
            actual = state["state"][key][name]
            assert torch.equal(actual, value) if torch.is_tensor(value) else actual == value


def test_loading_restores_the_options_of_the_groups():
    model = mlp()
    optimizer = RLSOptimizer(model, lr=0.05, gain=0.02)
    optimizer.param_groups[0]["lr"] = 0.01
    other = RLSOptimizer(mlp(), lr=0.3)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.01 and other.param_groups[0]["gain"] == 0.02
    assert next(iter(other._registry.covered.values())).group is other.param_groups[0]


def test_state_hooks_may_replace_the_state():
    model = mlp()
    optimizer = RLSOptimizer(model)
    train(model, optimizer)
    good = copy.deepcopy(optimizer.state_dict())
    other = RLSOptimizer(mlp())
    seen = []
    other.register_load_state_dict_pre_hook(lambda opt, state: good)
    other.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.state[opt.param_groups[0]["params"][0]]["P"].clone())
    )
    other.load_state_dict({"state": {}, "param_groups": []})
    P = optimizer.inverse_autocorrelation("0")
    assert torch.equal(other.inverse_autocorrelation("0"), P) and torch.equal(seen[0], P)
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


def wrong_states(state, model):
    """Message -> a state that does not fit `RLSOptimizer(mlp())`."""

    def changed(edit):
        result = copy.deepcopy(state)
        edit(result)
        return result

    def entry(name, value):
        return changed(lambda s: s["state"][0].__setitem__(name, value))

    def option(name, value):
        return changed(lambda s: s["param_groups"][0].__setitem__(name, value))

    def fallback(**entries):
        adamw = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(6), "exp_avg_sq": torch.zeros(6)}
        return changed(lambda s: s["state"].__setitem__(1, {**adamw, **entries}))

    def counter(place, value):
        return changed(lambda s: s["state"][0]["health"].__setitem__(place, value))

    adam = torch.optim.Adam(model.parameters())
    paper = RLSOptimizer(model, form="paper")
    wider = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    other = RLSOptimizer(wider, form="adaptive")
    for optimizer in (paper, other):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return {
        "must have the keys 'state' and 'param_groups'": {"state": {}},
        "must have groups of [4] parameters, got [2]":
            changed(lambda s: s["param_groups"][0].__setitem__("params", [0, 1])),
        "must have groups of [4] parameters, got []":
            changed(lambda s: s["param_groups"].clear()),
        "is not that of an RLSOptimizer": adam.state_dict(),
        "is of form 'paper', the optimizer of 'adaptive'": paper.state_dict(),
        "disagree on whether 0 has a matrix P":
            changed(lambda s: s["state"][0].pop("P")),
        "disagree on whether a fallback parameter has a matrix P":
            changed(lambda s: s["state"].__setitem__(1, s["state"][0])),
        "P of '0' in state_dict must be [5, 5], got [6, 6]": other.state_dict(),
        "P of '0' in state_dict must be float32 or float64":
            entry("P", torch.eye(5).half()),
        "first_moment of '0' in state_dict must be [6, 5], got NoneType":
            entry("first_moment", None),
        "first_moment of '0' in state_dict must be [6, 5], got [5, 6]":
            entry("first_moment", torch.zeros(5, 6)),
        "second_moment of '0' in state_dict must be float32 or float64, as P is, got torch.float64":
            entry("second_moment", torch.zeros(6).double()),
        "health of '0' in state_dict must be [7], got [3]": entry("health", torch.zeros(3)),
        "step of '0' in state_dict must be an int >= 0, got None": entry("step", None),
        "step of '0' in state_dict must be an int >= 0, got -1": entry("step", -1),
        "the counter steps of '0' in state_dict must be a count, got nan":
            counter(5, float("nan")),
        "must be a dense tensor with data, got torch.strided on meta":
            entry("P", torch.empty(5, 5, device="meta")),
        "must be a dense tensor with data, got torch.sparse_coo":
            entry("P", torch.eye(5).to_sparse()),
        "state of state_dict must map parameters to dicts": {**state, "state": [state["state"]]},
        "map parameters to dicts of their entries": changed(lambda s: s["state"].update({0: 5})),
        "param_groups of state_dict must be a list of dicts": {**state, "param_groups": 3},
        "list of dicts, each with its params": option("params", [0, 1, 2, [3]]),
        "gain must be > 0 and finite, got 0": option("gain", 0),
        "gain must be > 0 and finite, got 1000": option("gain", 10**400),
        "lr must be >= 0 and finite, got nan": option("lr", float("nan")),
        "drift must be at most 1": option("drift", 7.0),
        "rank must be an int >= 1 and at most 65536, got 'many'": option("rank", "many"),
        "beta2 must have a value, got None": option("beta2", None),
        "gain in state_dict must be one value, got Tensor": option("gain", torch.ones(2)),
        "form in state_dict must be one value, got list": option("form", ["adaptive"]),
        "disagree on whose rate lr is": option("fallback_lr", None),
        "peak_lr in state_dict must be >= 0 and finite": option("peak_lr", float("nan")),
        "fallback_decays in state_dict must be a bool, got 2": option("fallback_decays", 2),
        "fallback entries ['momentum_buffer'], the fallback rule keeps":
            changed(lambda s: s["state"].__setitem__(1, {"momentum_buffer": torch.zeros(6)})),
        "exp_avg must be [6], got [7]": fallback(exp_avg=torch.zeros(7)),
        "exp_avg_sq must be [6], got str": fallback(exp_avg_sq="0"),
        "exp_avg in state_dict must be floating point":
            fallback(exp_avg=torch.zeros(6, dtype=torch.int64)),
        "step must be [], got [2]": fallback(step=torch.zeros(2)),
        "step must be [], got int": fallback(step=3),
        "step of a fallback parameter in state_dict must be a count, got -1":
            fallback(step=torch.tensor(-1.0)),
        "exp_avg in state_dict must be floating point and dense, got torch.float32, torch.sparse":
            fallback(exp_avg=torch.zeros(6).to_sparse()),
    }  # fmt: skip


MESSAGES = list(wrong_states(RLSOptimizer(m := mlp(), form="adaptive").state_dict() | {
    "state": {0: {"P": torch.eye(5), "health": torch.zeros(7)}}}, m))  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES)
def test_state_that_does_not_fit_changes_nothing(message):
    model = mlp()
    optimizer = RLSOptimizer(model, form="adaptive")  # the one with the most entries
    train(model, optimizer)
    state = wrong_states(copy.deepcopy(optimizer.state_dict()), mlp())[message]
    before, groups = (
        snapshot(model, optimizer),
        copy.deepcopy(optimizer.state_dict()["param_groups"]),
    )
    with pytest.raises(ValueError) as caught:
        optimizer.load_state_dict(state)
    assert message in str(caught.value)
    assert not differing(before, snapshot(model, optimizer))
    assert optimizer.state_dict()["param_groups"] == groups
    train(model, optimizer, 1)


def test_momentum_turned_on_by_a_scheduler_loads_again():
    model = mlp()
    optimizer = RLSOptimizer(model, form="paper", lr=0.02)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(model, optimizer, 2)
    assert "momentum_buffer" in optimizer.state[model[0].weight]
    twin = copy.deepcopy(model)
    other = RLSOptimizer(twin, form="paper", lr=0.02)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2, seed=9)
    train(twin, other, 2, seed=9)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("form", ["paper", "natural"])
def test_a_layer_may_join_when_momentum_is_off_again(form):
    model = mlp()
    twin, options = copy.deepcopy(model), {"form": form, "lr": 0.02, "trust_ratio": math.inf}
    optimizer, other = RLSOptimizer(model, **options), RLSOptimizer(twin, **options)
    optimizer.param_groups[0]["momentum"] = 0.5  # a first step is the same without
    for one, own in ((model, optimizer), (twin, other)):
        one[2].requires_grad_(False)
        train(one, own, 1)
        one[2].requires_grad_(True)
        own.param_groups[0]["momentum"] = 0.0
        train(one, own, 1, seed=9)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert other.state[twin[2].weight]["step"] == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("form", FORMS)
def test_copy_of_model_and_optimizer_goes_its_own_way(how, form):
    model = cnn()
    optimizer = RLSOptimizer(model, form=form, lr=0.02, exclude=["0"])
    train(model, optimizer, 2)
    before = snapshot(model, optimizer)
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    else:
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    train(twin, other, 2, seed=5)
    assert not differing(before, snapshot(model, optimizer))
    train(model, optimizer, 2, seed=5)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert str(optimizer.coverage()) == str(other.coverage())
    assert other.health() == optimizer.health()


def test_whole_objects_through_torch_save():
    model = mlp()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 2)
    twin, other = saved_and_loaded((model, optimizer), weights_only=False)
    train(model, optimizer, 2, seed=5)
    train(twin, other, 2, seed=5)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("copied", [copy.deepcopy, AveragedModel,
                                    lambda m: pickle.loads(pickle.dumps(m))])  # fmt: skip
def test_copy_of_the_model_alone_stages_nothing(copied):
    model = mlp()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    twin = copied(model)
    twin.train()
    twin(batch(model)).sum().backward()
    assert all(stage.calls == 0 for stage in optimizer._registry.stages.values())
    fresh = RLSOptimizer(getattr(twin, "module", twin))
    twin(batch(model)).sum().backward()
    assert all(stage.calls == 1 for stage in fresh._registry.stages.values())
    assert all(stage.calls == 0 for stage in optimizer._registry.stages.values())


def hooks_of(model):
    return [h for m in model.modules() for h in m._forward_hooks.values()
            if isinstance(h, ForwardHook)]  # fmt: skip


def test_hooks_end_with_their_optimizer():
    model = mlp()
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 1)
    assert len(hooks_of(model)) == 2
    del optimizer
    gc.collect()
    assert not hooks_of(model)
    second = RLSOptimizer(model)
    train(model, second, 1)
    assert second.health()["0"].updates == 1 and len(hooks_of(model)) == 2


def test_scheduled_optimizer_ends_too():
    model = mlp()
    optimizer = RLSOptimizer(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    del optimizer, scheduler
    gc.collect()
    assert not hooks_of(model)


def test_inverse_autocorrelation_is_the_live_matrix():
    model = cnn()
    optimizer = RLSOptimizer(model)
    P = optimizer.inverse_autocorrelation(model[0])
    assert P is optimizer.inverse_autocorrelation("0")
    assert P.shape == (19, 19) and torch.equal(P, torch.eye(19))
    assert optimizer.inverse_autocorrelation("3").shape == (2, 18, 18)
    assert optimizer.inverse_autocorrelation("5").shape == (37, 37)
    train(model, optimizer, 1)
    assert P is optimizer.state[model[0].weight]["P"] and not torch.equal(P, torch.eye(19))


# -- torch.distributed.checkpoint ----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_distributed_checkpoint_round_trip(form):
    model = cnn()
    optimizer = RLSOptimizer(model, form=form, lr=0.02)
    train(model, optimizer, 2)
    state = dcp.get_optimizer_state_dict(model, optimizer)
    assert "P" in state["state"]["0.weight"]
    twin = cnn()
    twin.load_state_dict(model.state_dict())
    other = RLSOptimizer(twin, form=form, lr=0.02)
    dcp.set_optimizer_state_dict(twin, other, state)
    train(model, optimizer, 2, seed=9)
    train(twin, other, 2, seed=9)
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))


@pytest.mark.parametrize("form", FORMS)
def test_materialising_the_state_moves_nothing(form):
    """DCP steps with zero gradients and lr = 0, so that every state exists."""
    model = cnn()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = RLSOptimizer(model, form=form, momentum=0.5)
    lr = optimizer.param_groups[0]["lr"]
    state = dcp.get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["lr"] == lr
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for name in ("0", "3", "5"):
        P = optimizer.inverse_autocorrelation(name)
        assert torch.equal(P, torch.eye(P.shape[-1]).expand_as(P))
        assert torch.equal(state["state"][f"{name}.weight"]["P"], P)
    assert optimizer.state.keys() == set(model.parameters())
    assert set(optimizer.state[model[0].bias]) == {"in_P"}
