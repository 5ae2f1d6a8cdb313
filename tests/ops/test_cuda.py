"""Operators and optimizer on a GPU against the CPU and the specification.

`tests/cuda_on_cpu` executes the same kernels without a GPU; here is what only a device can show:
its arithmetic, streams, graphs, synchronisation. RLSCUDA_TEST_DEVICE=cpu tries the tests.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from support.compare import assert_close, random_spd
from support.operators import nonfinite
from support.patch_cases import CASES, DTYPES, layouts
from support.training import batch, cnn, mlp
from torch import nn

import rlscuda
import rlscuda.functional as RF
from rlscuda import HeldMatrix, RLSOptimizer, reference

DEVICE = torch.device(os.environ.get("RLSCUDA_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
FORMS = ("adaptive", "paper", "natural", "spectral")
pytestmark = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"
)
gpu_only = pytest.mark.skipif(not ON_GPU, reason="is about a GPU's own machinery")


@pytest.fixture(autouse=True)
def _no_tf32():
    """Convolutions in full float32, so that they can be compared with the CPU's."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_the_build_has_cuda():
    assert not ON_GPU or rlscuda.build_info()["cuda"]


# -- operators --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_patch_operators(case, dtype):
    options = {"ones": True, **case.options}
    draw = {"rank": 5, "seed": 11, "offset": 3}
    for x, y in zip(
        layouts(case.input(dtype)).values(), layouts(case.input(dtype).to(DEVICE)).values()
    ):
        mean = RF.patch_mean(x, case.kernel_size, **options)
        assert_close(RF.patch_mean(y, case.kernel_size, **options).cpu(), mean, 4)
        sketch = RF.patch_sketch(x, case.kernel_size, **options, **draw)
        assert_close(RF.patch_sketch(y, case.kernel_size, **options, **draw).cpu(), sketch, 16)
        expected = RF.patch_sample(x, case.kernel_size, **options, **draw)
        actual = RF.patch_sample(y, case.kernel_size, **options, **draw)
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 5, 16])
@pytest.mark.parametrize("shape", [(1,), (7,), (33,), (128,), (577,), (1301,), (3, 9), (64, 40)],
                         ids=str)  # fmt: skip
def test_rls_update(shape, rank, dtype):
    P = random_spd(*shape, dtype=dtype)
    options = {"forgetting": 0.95, "gain": 0.3, "decay": 0.9, "diffusion": 0.1}
    matrices, expected = P.to(DEVICE, copy=True), P.double().reshape(-1, shape[-1], shape[-1])
    for _ in range(2):
        S = torch.randn(*shape[:-1], rank, shape[-1], dtype=dtype)
        u, h = RF.rls_update_(matrices, S.to(DEVICE), **options)
        steps = [
            reference.rls_update(p, s, **options)
            for p, s in zip(expected, S.double().reshape(-1, rank, shape[-1]))
        ]
        expected = torch.stack([step[0] for step in steps])
        assert_close(u.cpu(), torch.stack([step[1] for step in steps]).view_as(S), 50)
        assert_close(h.cpu().reshape(-1), torch.stack([step[2] for step in steps]), 50)
    assert torch.equal(matrices, matrices.mT)
    assert_close(matrices.cpu(), expected.view_as(P), 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hold, rank", [(16, 1), (3, 5)])
@pytest.mark.parametrize("shape", [(1,), (33,), (128,), (577,), (1301,), (3, 40)], ids=str)
def test_rls_held(shape, hold, rank, dtype):
    options = {"forgetting": 0.95, "gain": 0.3, "decay": 0.97, "diffusion": 0.1}
    P = random_spd(*shape, dtype=dtype)
    exact, matrix = P.double(), HeldMatrix(P.to(DEVICE, copy=True), rank, hold, ridge=0)
    for _ in range(hold + 2):
        S = torch.randn(*shape[:-1], rank, shape[-1], dtype=dtype)
        u, h = matrix.update(S.to(DEVICE), **options)
        v, g = RF.rls_update_(exact, S.double(), **options)
        assert_close(u.cpu(), v, 50)
        assert_close(h.cpu(), g, 50)
    assert torch.equal(matrix.P, matrix.P.mT)
    assert_close(matrix.P.cpu(), exact, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nonfinite(dtype):
    tensors = [torch.randn(n, dtype=dtype, device=DEVICE) for n in (1, 5, 100_003)] * 40
    assert not nonfinite(tensors)
    for bad in (float("inf"), float("nan")):
        tensors[-1] = tensors[-1].clone()
        tensors[-1][-1] = bad
        assert nonfinite(tensors)


@gpu_only
def test_elements_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.ones(3, 1, 1 << 15, 1 << 15, dtype=torch.bfloat16, device=DEVICE)
    x[2] = 4
    assert RF.patch_mean(x, 1).item() == 2
    assert RF.patch_mean(x.view(3 << 15, 1 << 15, 1, 1), 1).sum().item() == 2 * (1 << 15)


@gpu_only
def test_tensors_of_two_devices_are_refused():
    P = torch.eye(4, device=DEVICE)
    with pytest.raises(ValueError, match="s must be on the device of P"):
        RF.rls_update_(P, torch.ones(4))
    assert torch.equal(P.cpu(), torch.eye(4))


# -- the optimizer ----------------------------------------------------------------------------


def pair(build, dtype=torch.float64, **options):
    """The same model on the CPU and on the device, each with its optimizer."""
    model = build(dtype)
    twin = copy.deepcopy(model).to(DEVICE)
    return [(m, RLSOptimizer(m, seed=3, **options)) for m in (model, twin)]


def train(model, optimizer, steps=4, seed=1, channels_last=False):
    for step in range(steps):
        x = batch(model, 8, seed + step).to(next(model.parameters()).device)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def assert_same(first, second, scale=1.0):
    """Parameters and matrices of two pairs (model, optimizer)."""
    (model, optimizer), (twin, other) = first, second
    for p, q in zip(model.parameters(), twin.parameters()):
        assert_close(q.detach().cpu(), p.detach().cpu(), scale)
        for name in ("P", "first_moment", "momentum_buffer", "exp_avg"):
            if name in optimizer.state[p]:
                assert_close(other.state[q][name].cpu(), optimizer.state[p][name].cpu(), scale)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("summary, rank", [("mean", 1), ("mean", 3), ("sketch", 2), ("sample", 5)])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_training_is_that_of_the_cpu(build, form, summary, rank):
    first, second = pair(
        build, form=form, summary=summary, rank=rank, momentum=0.5, lr=0.02, weight_decay=0.01
    )
    train(*first)
    train(*second)
    assert_same(first, second, 100)


@pytest.mark.parametrize("form", FORMS)
def test_one_step_for_the_sanitizer_trains_short(form):
    first, second = pair(cnn, torch.float32, form=form, lr=0.02)
    for each in (first, second):
        train(*each, steps=1)
    assert_same(first, second, 50)


@pytest.mark.parametrize("form", FORMS)
def test_float32_and_channels_last(form):
    first, second = pair(cnn, torch.float32, form=form, lr=0.02)
    second[0].to(memory_format=torch.channels_last)
    train(*first)
    train(*second, channels_last=True)
    assert_same(first, second, 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_model(dtype):
    if dtype == torch.float16 and not ON_GPU:
        pytest.skip("float16 convolutions are a GPU's")
    model = cnn(dtype).to(DEVICE)
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 8)
    assert all(torch.isfinite(p).all() and p.dtype == dtype for p in model.parameters())
    assert optimizer.inverse_autocorrelation("0").dtype == torch.float32
    assert all(h.updates and not h.refused for h in optimizer.health().values())


@pytest.mark.parametrize("form", FORMS)
def test_grad_scaler_skips_a_step_with_infinities(form):
    model = mlp().to(DEVICE)
    optimizer = RLSOptimizer(model, form=form, lr=0.02)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=16.0)
    for bad in (False, True, False):
        before = [p.detach().clone() for p in model.parameters()]
        P = optimizer.inverse_autocorrelation("0").clone()
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(batch(model).to(DEVICE)).square().mean()
        scaler.scale(loss).backward()
        if bad:
            model[2].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert same == bad and torch.equal(P, optimizer.inverse_autocorrelation("0")) == bad


def test_nonfinite_gradient_voids_the_step():
    model = cnn().to(DEVICE)
    optimizer = RLSOptimizer(model)
    train(model, optimizer, 1)
    covered = [p for p in model.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in covered]
    optimizer.zero_grad()
    model(batch(model).to(DEVICE)).square().mean().backward()
    model[0].weight.grad[1, 1, 0, 0] = float("nan")
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, covered))
    assert all(h.refused for h in optimizer.health().values())


def test_state_moves_between_devices():
    first, second = pair(cnn)
    train(*first)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    train(*first, seed=9)
    train(*second, seed=9)
    assert_same(first, second, 100)


# -- streams, graphs, launches ------------------------------------------------------------------


@gpu_only
@pytest.mark.parametrize("forgetting", [1.0, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_the_device(form, forgetting):
    model = cnn().to(DEVICE)
    optimizer = RLSOptimizer(model, form=form, momentum=0.5, lr=0.02, forgetting=forgetting)
    train(model, optimizer, 2)
    inputs = [batch(model, 8, seed).to(DEVICE) for seed in (7, 8)]
    optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in inputs:  # two micro-batches, one step
            model(x).square().mean().backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.parametrize("forgetting", [1.0, 0.6])  # by which each step raises all
@pytest.mark.parametrize("form", FORMS)
def test_a_captured_step_goes_on_counting(form, forgetting):
    options = {"summary": "mean", "rank": 1, "momentum": 0.5, "forgetting": forgetting}
    first, second = pair(cnn, form=form, lr=0.02, **options)
    model, optimizer = second
    x = batch(model).to(DEVICE)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        step(model, optimizer, x)
    for _ in range(4):
        graph.replay()
    torch.cuda.synchronize()
    for _ in range(3 + 4):  # the capture itself runs nothing
        step(*first, x.cpu())
    assert_same(first, second, 1000)


@gpu_only
@pytest.mark.parametrize("ridge", [0, 0.5])
def test_captured_held_updates_go_on_counting_and_wait_for_nothing(ridge):
    n, hold = 1000, 3
    P, s = random_spd(n), torch.randn(n, dtype=torch.float64)
    plain, matrix = P.clone(), HeldMatrix(P.to(DEVICE), 1, hold, ridge)
    row = s.to(DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        matrix.update(row, 0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        matrix.update(row, 0.99)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matrix.update(row, 0.99)
    for k in range(5):  # full at the first replay, and again at the fourth
        row.copy_(s * (k + 1))
        graph.replay()
    for _ in range(2):  # the host has no turn so early
        RF.rls_update_(plain, s, 0.99)
    for k in range(1, 6):  # the device has one at each replay
        RF.rls_update_(plain, s * k, 0.99, ridge=ridge, turn=k)
    assert_close(matrix.P.cpu(), plain, 100)


@gpu_only
def test_another_stream():
    first, second = pair(cnn)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(*second)
    side.synchronize()
    train(*first)
    assert_same(first, second, 100)


@gpu_only
def test_the_last_of_several_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first = pair(cnn)[0]
    model = copy.deepcopy(first[0]).to(f"cuda:{torch.cuda.device_count() - 1}")
    second = (model, RLSOptimizer(model, seed=3))
    train(*first)
    train(*second)
    assert_same(first, second, 100)


GEMM = ("gemm", "gemv", "cutlass", "xmma", "nvjet", "splitk", "cublas", "dot_kernel")


@gpu_only
@pytest.mark.parametrize("form", FORMS)
def test_launches_of_a_step(form):
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=i % 2 == 0), nn.BatchNorm2d(8),
                            nn.ReLU()) for i in range(24)]  # fmt: skip
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 10)).to(DEVICE)
    optimizer = RLSOptimizer(model, form=form, lr=0.02)
    x = torch.randn(4, 8, 6, 6, device=DEVICE)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model(x).square().mean().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    launches = [name for name in names if not any(part in name.lower() for part in GEMM)]
    assert names and len(launches) <= 12, launches


@gpu_only
def test_complex_matrix_is_refused():
    P = torch.eye(3, dtype=torch.complex64, device=DEVICE)
    before = P.clone()
    with pytest.raises(ValueError, match="P must be float32 or float64 on a GPU, got complex64"):
        RF.rls_update_(P, torch.ones_like(P[0]))
    assert torch.equal(P, before)
