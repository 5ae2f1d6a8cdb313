"""Where pruning's matrices come from: a calibration, and the optimizer's own."""

import copy
import math

import pytest
import torch
from support.cases import CONVOLUTIONS, unfolded
from support.compare import random_spd
from torch import nn
from torch.nn.utils import prune

from rlscuda import RLSOptimizer
from rlscuda.closed_form import formulas
from rlscuda.pruning.matrices.calibration import calibrate, disagreement
from rlscuda.pruning.matrices.own import own_matrices

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def with_ones(rows: torch.Tensor, module: nn.Module) -> torch.Tensor:
    if module.bias is None:
        return rows
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def damped(rows: torch.Tensor, damping: float = 1e-3) -> torch.Tensor:
    """The damped inverse of the autocorrelation of rows [groups, N, n], one by one."""
    A = rows.mT @ rows / rows.shape[1]
    mean = A.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return torch.linalg.inv(A + damping * mean * torch.eye(A.shape[-1]).double())


# -- calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.name)
def test_calibration_is_the_inverse_of_the_unfolded_autocorrelation(case):
    model = nn.Sequential(case.layer())
    batches = [case.input(4), case.input(2)]
    P = calibrate(model, batches)["0"]
    expected = damped(with_ones(unfolded(model[0], torch.cat(batches)), model[0]))
    scale = float(expected.abs().max())  # 1 / damping, where there are fewer rows than columns
    torch.testing.assert_close(P / scale, expected / scale, **EXACT)
    assert torch.equal(P, P.mT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(12,), (3, 4)], ids=["rows", "sequences"])
def test_calibration_of_linear_layers(bias, lead):
    model = nn.Sequential(nn.Linear(5, 3, bias=bias).double())
    x = torch.randn(*lead, 5).double()
    expected = damped(with_ones(x.reshape(1, -1, 5), model[0]), 0.1)
    torch.testing.assert_close(calibrate(model, [x], damping=0.1)["0"], expected, **EXACT)


def test_calibration_in_float32_is_of_float64_sums():
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    x = 30 + torch.randn(8, 2, 6, 6)
    P = calibrate(model, [x])["0"]
    expected = damped(with_ones(unfolded(model[0], x.double()), model[0]))
    torch.testing.assert_close(P, expected, **EXACT)


def test_calibration_by_parts_of_a_batch(monkeypatch):
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3).double()), torch.randn(5, 2, 6, 6).double()
    whole = calibrate(model, [x])["0"]
    monkeypatch.setattr("rlscuda.pruning.matrices.calibration._UNFOLD_BYTES", 1)
    torch.testing.assert_close(calibrate(model, [x])["0"], whole, **EXACT)


class Named(nn.Module):
    """A forward with names, of which `label` is none."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2).double()

    def forward(self, x, shift=0.0):
        return self.inner(input=x + shift)


def test_batches_of_every_kind():
    model, x = Named(), torch.randn(6, 3).double()
    expected = calibrate(model, [x])["inner"]
    for batch in ((x, torch.zeros(6)), [x], {"x": x, "label": torch.zeros(6)}):
        assert torch.equal(calibrate(model, [batch])["inner"], expected)
    shifted = calibrate(model, [{"x": x - 1, "shift": 1.0}])["inner"]
    torch.testing.assert_close(shifted, expected, **EXACT)
    endless = iter(lambda: x, None)
    assert torch.equal(calibrate(model, endless, max_batches=1)["inner"], expected)


def test_calibration_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(),
                          nn.Linear(16, 2))  # fmt: skip
    model[1].eval()
    optimizer = RLSOptimizer(model)
    model(torch.randn(4, 1, 4, 4)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    loader = torch.utils.data.DataLoader(torch.randn(8, 1, 4, 4), batch_size=4, shuffle=True)
    random = torch.get_rng_state()

    def broken():
        yield torch.randn(4, 1, 4, 4)
        raise RuntimeError("the disk is gone")

    for attempt in (loader, broken()):
        if attempt is loader:
            assert set(calibrate(model, attempt)) == {"0", "4"}
        else:
            with pytest.raises(RuntimeError, match="the disk is gone"):
                calibrate(model, attempt)
        assert torch.equal(torch.get_rng_state(), random)
        assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert torch.is_grad_enabled()
    assert all(stage.calls == 1 for stage in optimizer._registry.stages.values())


def test_calibration_where_inputs_never_fire():
    """Dead channels, a dead group and a dead layer: finite, positive definite, free to remove."""
    model = nn.Sequential(nn.Conv2d(3, 3, 2, groups=3, bias=False), nn.Flatten(),
                          nn.Linear(3, 2, bias=False)).double()  # fmt: skip
    x = torch.randn(50, 3, 2, 2).double()
    x[:, 1] = 0
    model[0].weight.data[2] = 0
    found = calibrate(model, [x])
    for P in found.values():
        assert (torch.linalg.cholesky_ex(P).info == 0).all()
    costs = formulas.block_saliency(found["2"][0], model[2].weight, torch.tensor([[0], [1], [2]]))
    assert costs[1:].max() < 1e-2 * costs[0]
    assert (torch.linalg.cholesky_ex(calibrate(model, [0 * x])["2"]).info == 0).all()


def test_shared_and_unused_layers():
    shared = nn.Linear(3, 3).double()
    model = nn.ModuleDict({"used": shared, "unused": nn.Linear(3, 3)})
    model.forward = lambda x: shared(shared(x))
    x = torch.randn(20, 3).double()
    found = calibrate(model, [x])
    assert set(found) == {"used"}
    rows = torch.cat([x, shared(x).detach()])[None]
    torch.testing.assert_close(found["used"], damped(with_ones(rows, shared)), **EXACT)
    with pytest.raises(ValueError, match=r"\['unused'\] saw no input"):
        calibrate(model, [x], layers=["unused"])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"damping": -1.0}, ValueError, "damping must be a finite number >= 0, got -1.0"),
        ({"damping": "a"}, ValueError, "damping must be a finite number >= 0, got 'a'"),
        ({"max_batches": 0}, ValueError, "max_batches must be an integer >= 1, got 0"),
        ({"max_batches": 1.5}, ValueError, "max_batches must be an integer >= 1, got 1.5"),
        ({"loader": []}, ValueError, "at least one batch"),
        ({"loader": ["text"]}, TypeError, "got str"),
        ({"loader": [("text", 1)]}, TypeError, "got a tuple of str, int"),
        ({"loader": [torch.full((2, 3), float("inf"))]}, ValueError, "'0' saw NaN or infinite"),
        ({"layers": ["9"]}, ValueError, "layers names '9', which the model does not have"),
        ({"layers": [9]}, TypeError, "layers takes names and modules, got int"),
        ({"model": nn.ReLU()}, ValueError, "must have a Linear or convolution"),
        ({"model": torch.relu}, TypeError, "model must be a module"),
    ],
)  # fmt: skip
def test_errors_of_a_calibration(arguments, error, message):
    arguments = {"model": nn.Sequential(nn.Linear(3, 2)), "loader": [torch.ones(2, 3)], **arguments}
    with pytest.raises(error, match=message):
        calibrate(**arguments)


def test_a_model_none_of_whose_layers_saw_input():
    model = nn.ModuleDict({"unused": nn.Linear(3, 3)})
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=r"none of the layers \['unused'\] saw input"):
        calibrate(model, [torch.ones(2, 3)])


class Part(nn.Module):
    """A compiled layer inside of a model that is not compiled."""

    def __init__(self):
        super().__init__()
        self.part = torch.compile(nn.Sequential(nn.Linear(3, 2)), backend="eager")

    def forward(self, x):
        return self.part(x)


def whole():
    return torch.compile(Named().float(), backend="eager")


@pytest.mark.parametrize("make", [whole, Part])
def test_calibration_of_a_compiled_model_that_has_run(make):
    model, x = make(), torch.randn(6, 3)
    with torch.no_grad():
        before = model.eval()(x)
    found = calibrate(model, [{"x": x, "label": 1}])
    (P,) = found.values()
    torch.testing.assert_close(P, damped(with_ones(x.double()[None], nn.Linear(1, 1))), **EXACT)
    assert torch.equal(model(x).detach(), before)


def test_calibration_of_masked_layers():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    masked, x = copy.deepcopy(model), torch.randn(30, 2, 4, 4)
    for index in (0, 2):
        prune.identity(masked[index], "weight")
    prune.identity(masked[2], "bias")
    expected, found = calibrate(model, [x]), calibrate(masked, [x], layers=["*"])
    assert torch.equal(found["0"], expected["0"])
    # a masked bias is in no matrix
    assert disagreement({"2": found["2"]}, {"2": expected["2"]})["2"] < 0.1


def test_a_bias_of_two_layers_is_in_neither_matrix():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    prune.identity(model[0], "weight")
    found = calibrate(model, [torch.randn(9, 3)])
    assert [list(P.shape) for P in found.values()] == [[1, 3, 3], [1, 3, 3]]


# -- the optimizer's own ---------------------------------------------------------------------------


def test_own_matrix_of_the_paper_form_is_its_recursion():
    model = nn.Sequential(nn.Linear(3, 2).double(), nn.Tanh(), nn.Linear(2, 2, bias=False).double())
    optimizer = RLSOptimizer(model, form="paper", forgetting=0.9, gain=0.5, ridge=0)
    R = torch.eye(4).double()
    for _ in range(5):
        x = torch.randn(6, 3).double()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        s = torch.cat([x.mean(0), torch.ones(1)])
        R = 0.9 * R + 0.5 * torch.outer(s, s)
    found = own_matrices(optimizer, ["0", "2"])
    torch.testing.assert_close(found["0"][0], torch.linalg.inv(R), **EXACT)
    assert {name: list(P.shape) for name, P in found.items()} == {"0": [1, 4, 4], "2": [1, 2, 2]}
    live = optimizer.inverse_autocorrelation("2")
    assert found["2"].data_ptr() == live.data_ptr()  # no copy where none is needed
    assert own_matrices(optimizer).keys() == found.keys()


@pytest.mark.parametrize("groups", [1, 2])
def test_own_matrix_of_the_adaptive_form_is_the_inverse(groups):
    """The fixed point on a stationary input, after the random rows that enter P average out.

    P remembers about 2 / gain updates of 16 rows: sqrt(n / 3200) a direction, .1 for n = 33. It
    settles in about 1 / (2 gain sqrt(a)) steps where the power is a, relative to its mean.
    """
    n = 32 // groups
    model = nn.Sequential(nn.Conv2d(32, 4, 1, groups=groups))
    optimizer = RLSOptimizer(model, lr=0.0, interval=1, fallback_lr=0.0)
    mix = torch.linspace(0.4, 1.5, 32).diag() + 0.1 * torch.randn(32, 32)
    inputs = [(0.5 + torch.randn(64, 32)) @ mix for _ in range(600)]
    for x in inputs:
        optimizer.zero_grad()
        model(x[:, :, None, None]).square().mean().backward()
        optimizer.step()
    exact = calibrate(model, [torch.cat(inputs)[:, :, None, None]])
    before = optimizer.inverse_autocorrelation("0").clone()
    own = own_matrices(optimizer, ["0"])
    assert own["0"].shape == (groups, n + 1, n + 1)
    tolerance = 2 * math.sqrt((n + 1) / 3200)
    assert disagreement(own, exact)["0"] < tolerance
    raw = before.double().reshape_as(own["0"])
    assert disagreement({"0": raw}, exact)["0"] > 3 * tolerance  # the root of it is not it
    assert torch.equal(optimizer.inverse_autocorrelation("0"), before)


def test_own_matrix_without_damping():
    """At no damping it is the limit of small ones, where P stays below the cap of the drift."""
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = RLSOptimizer(model)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(16, 3)).square().mean().backward()
        optimizer.step()
    small, none = (own_matrices(optimizer, damping=d)["0"] for d in (1e-9, 0))
    torch.testing.assert_close(none, small, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="damping must be a finite number >= 0, got -1"):
        own_matrices(optimizer, damping=-1)


def test_errors_of_own_matrices():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = RLSOptimizer(model)
    with pytest.raises(ValueError, match="'0' has no matrix yet"):
        own_matrices(optimizer, ["0"])
    assert not optimizer.state  # asking made none
    with pytest.raises(ValueError, match="'1' has no inverse autocorrelation matrix"):
        own_matrices(optimizer, ["1"])
    with pytest.raises(TypeError, match="RLSOptimizer, got SGD"):
        own_matrices(torch.optim.SGD(model.parameters()), ["0"])


# -- disagreement ----------------------------------------------------------------------------------


def test_disagreement_is_a_relative_error_without_scale():
    exact = random_spd(1, 6)
    assert disagreement({"a": 7 * exact}, {"a": exact})["a"] < 1e-6
    off = torch.tensor([0.01, -0.01] * 3, dtype=torch.float64).exp()
    root = torch.linalg.cholesky(exact)
    own = {"a": root @ torch.diag(off) @ root.mT, "b": exact}
    assert disagreement(own, {"a": exact}) == {"a": pytest.approx(0.01, rel=1e-3)}
    T = torch.randn(6, 6).double()  # another basis of the same inputs
    changed = disagreement({"a": T @ own["a"] @ T.mT}, {"a": T @ exact @ T.mT})["a"]
    assert changed == pytest.approx(0.01, rel=1e-3)
    both = disagreement({"a": torch.cat([own["a"], exact])}, {"a": torch.cat([exact, exact])})["a"]
    assert both == pytest.approx(0.01 / math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_disagreement_without_the_bias(groups):
    rows = with_ones(torch.randn(groups, 40, 4).double(), nn.Linear(1, 1))
    exact = torch.linalg.inv(rows.mT @ rows)
    own = torch.linalg.inv(rows[..., :4].mT @ rows[..., :4])
    assert disagreement({"a": 3 * own}, {"a": exact})["a"] < 1e-6


def test_errors_of_disagreement():
    P = torch.eye(3)[None]
    with pytest.raises(ValueError, match=r"no layer is in both: \['a'\] and \['b'\]"):
        disagreement({"a": P}, {"b": P})
    with pytest.raises(ValueError, match=r"one shape, got \[1, 3, 3\] and \[1, 2, 2\]"):
        disagreement({"a": P}, {"a": P[:, :2, :2]})
    with pytest.raises(ValueError, match="positive definite"):
        disagreement({"a": -P}, {"a": P})
