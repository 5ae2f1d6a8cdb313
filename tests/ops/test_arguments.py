"""What every operator refuses whatever it computes: devices, storages, memory shared, sizes."""

import math

import numpy as np
import pytest
import torch
from support.op_cases import VALID, health, registered
from support.operators import factors_agree, nonfinite, weight_step_

import rlscuda.functional as RF
from rlscuda import _C, HeldMatrix

ops = torch.ops.rlscuda
X = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(0))
GEOMETRY = [[3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 1, 0, False]
PATCHES = {"patch_mean": (), "patch_sample": (1, 0, 0), "patch_sketch": (1, 0, 0)}


def tensors(arguments):
    """The places of all tensors: of an argument, or of an argument and in its list."""
    for place, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and value.numel():
            yield place, None
        for inner, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, torch.Tensor) and item.numel():
                yield place, inner


def places():
    """Every tensor argument of every operator."""
    return [(name, *at) for name in registered() for at in tensors(VALID[name]())]


def changed(name, place, inner, change):
    arguments = VALID[name]()
    if inner is None:
        arguments[place] = change(arguments[place])
    else:
        arguments[place][inner] = change(arguments[place][inner])
    return arguments


def snapshot(value):
    if isinstance(value, list):
        return [snapshot(v) for v in value]
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return None
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
    reached = (value.storage_offset() + last + 1) * value.element_size()
    return value.clone() if value.untyped_storage().nbytes() >= reached else None


def refused(name, arguments, message):
    before = snapshot(arguments)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*arguments)
    flat = [(a, b) for a, b in zip(arguments, before) if not isinstance(a, list)]
    flat += [pair for a, b in zip(arguments, before) if isinstance(a, list) for pair in zip(a, b)]
    assert all(b is None or torch.equal(a, b) for a, b in flat)


@pytest.mark.parametrize("name, place, inner", places())
def test_one_meta_tensor_among_real_ones(name, place, inner):
    if sum(1 for _ in tensors(VALID[name]())) == 1:
        return  # all of its tensors are on meta then
    arguments = changed(name, place, inner, lambda t: t.to("meta"))
    refused(name, arguments, "must be on one device, got cpu, meta")


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("name, place, inner", places())
def test_tensor_without_its_storage(name, place, inner, left):
    def shrunk(t):
        t = t.clone()
        t.untyped_storage().resize_(0 if left == 0 else t.untyped_storage().nbytes() - 1)
        return t

    arguments = changed(name, place, inner, shrunk)
    refused(name, arguments, "needs .* elements of storage, got")


@pytest.mark.parametrize("name", [n for n in registered() if n.endswith("_")])
def test_written_tensors_of_shared_memory(name):
    schema = getattr(ops, name).default._schema.arguments
    written = [i for i, a in enumerate(schema) if a.alias_info and a.alias_info.is_write]
    for place in written:
        for other, inner in tensors(VALID[name]()):
            arguments = VALID[name]()
            target = arguments[place][0] if isinstance(arguments[place], list) else arguments[place]
            source = arguments[other] if inner is None else arguments[other][inner]
            if other == place or source.dtype != target.dtype or source.numel() > target.numel():
                continue
            view = target.flatten()[: source.numel()].view(source.shape)
            if inner is None:
                arguments[other] = view
            else:
                arguments[other][inner] = view
            refused(name, arguments, "must not share memory")


def test_expanded_counters_are_refused_where_they_are_written():
    one = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"health must be contiguous, got strides \[0\]"):
        RF.rls_update_(torch.eye(3), torch.ones(3), health=one.expand(len(health())))
    arguments = VALID["foreach_weight_step_"]()
    wide = torch.full((2 * len(health()),), math.nan, dtype=torch.float64)
    arguments[10][0] = wide[::2].copy_(arguments[10][0])
    other = [[t.clone() for t in a] if isinstance(a, list) and torch.is_tensor(a[0]) else a
             for a in arguments]  # fmt: skip
    other[10][0] = other[10][0].contiguous()
    ops.foreach_weight_step_(*arguments)
    ops.foreach_weight_step_(*other)
    assert all(torch.equal(a, b) for a, b in zip(arguments[0], other[0]))


def test_projected_rows_without_their_inputs():
    arguments = VALID["foreach_rls_update_"]()
    arguments[7] = []
    refused("foreach_rls_update_", arguments, "projected_x must have 2 tensors, got 0")


def test_projection_of_a_batch_of_matrices():
    arguments = VALID["foreach_rls_update_"]()
    arguments[5] = [arguments[5][0], torch.ones(1, 5)]
    refused("foreach_rls_update_", arguments, r"projection is for one matrix P \[n, n\], got")


def test_groups_beyond_h():
    arguments = VALID["foreach_weight_step_"]()
    for groups in ([1, 4], [1, 1], [1, 2**62], [2, 2], [-1, 2]):
        refused("foreach_weight_step_", [*arguments[:7], groups, *arguments[8:]], "groups|h must")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_numbers_that_are_none(value):
    for name, first in (("weight_step_", 7), ("adaptive_weight_step_", 9), ("rls_update_", 2)):
        arguments = VALID[name]()
        for place in range(first, len(arguments)):
            if type(arguments[place]) is float:
                wrong = [*arguments[:place], value, *arguments[place + 1 :]]
                refused(name, wrong, "must be")


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("change, message", [
    ({0: [2**40, 3]}, "kernel_size must be at most 2147483647, got 1099511627776"),
    ({0: [3, 2], 3: [2**62, 2]}, "dilation must be at most"),
    ({0: [2**31 - 1, 2**31 - 1], 3: [2**31 - 1, 2**31 - 1]}, "a dilated kernel of .* does not fit"),
    ({2: [2**27] * 4}, r"in proportion to x \[2, 4, 8, 9\], got .* taps along one side"),
    ({2: [2**14] * 4}, r"in proportion to x \[2, 4, 8, 9\], got .* patches"),
    ({2: [2**31 - 1, 2**31 - 1, 0, 0], 1: [1, 2**30]}, "in proportion to x .* taps along one side"),
    ({2: [0, 0, 2**31 - 1, 2**31 - 1], 1: [2**30, 1]}, "in proportion to x .* taps along one side"),
    ({4: 2**62}, "groups must divide the 4 channels"),
    ({5: -1}, "padding_mode must be 0"),
])  # fmt: skip
def test_geometries_out_of_all_proportion(name, change, message):
    geometry = [change.get(i, value) for i, value in enumerate(GEOMETRY)]
    refused(name, [X, *geometry, *PATCHES[name]], message)


def test_draws_out_of_all_proportion():
    refused("patch_sketch", [X, *GEOMETRY, 2**40, 0, 0], "in proportion to x")
    refused("patch_sample", [X, *GEOMETRY, 2**40, 0, 0], "in proportion to x")
    refused("patch_sketch", [X, *GEOMETRY, 1, 0, 2**63 - 10], "offset must leave room")
    with pytest.raises(ValueError, match="offset must leave room"):
        RF.patch_sample(X, 3, rank=1, seed=0, offset=2**63 - 1)
    with pytest.raises(ValueError, match="seed must be a 64-bit integer"):
        RF.patch_sketch(X, 3, rank=1, seed=2**63)
    x = X[:1, :1].expand(2**40, 4, 8, 9)  # of 72 elements
    with pytest.raises(ValueError, match="in proportion to x"):
        RF.patch_mean(x, 3)


def test_honest_convolutions_are_not_refused():
    wide = torch.randn(1, 1, 1, 4096)
    mean = RF.patch_mean(wide, (1, 4095), padding="same", padding_mode="circular")
    torch.testing.assert_close(mean, wide.mean().expand(1, 4095))
    RF.patch_sketch(torch.randn(1, 1, 1, 1), 1, padding=200, rank=64, seed=0)


def test_no_memory_says_so_and_how_much():
    with pytest.raises(RuntimeError, match=r"out of memory: no 70368744177664 bytes for a result"):
        RF.rls_update_(torch.empty(2**44, 0, 0), torch.empty(2**44, 1, 0))
    with pytest.raises(RuntimeError, match=r"out of memory: no \d+ bytes for a result"):
        factors_agree(torch.ones(1, 2), torch.ones(1, 2).expand(2**42, 2),
                         torch.ones(1, 1).expand(2**42, 1))  # fmt: skip
    with pytest.raises(RuntimeError, match=r"out of memory: no \d+ bytes for a workspace"):
        factors_agree(torch.empty(0, 2**42), torch.empty(0, 2**42), torch.empty(0, 0))
    with pytest.raises(ValueError, match=r"s must have at most 4096 rows, got \[5000, 3\]"):
        RF.rls_update_(torch.eye(3), torch.ones(5000, 3))


def test_expanded_tensors_are_finite_or_not_as_their_memory_is():
    assert not nonfinite([torch.ones(1).expand(2**60)])
    assert nonfinite([torch.tensor([[1.0], [math.inf]]).expand(2, 2**40)])


def test_what_is_no_tensor_is_a_type_error():
    P, s = torch.eye(3), torch.ones(3)
    for call in (
        lambda: RF.rls_update_(P, s, power="x"),
        lambda: RF.rls_update_(None, s),
        lambda: weight_step_(3, P, 0.1),
        lambda: weight_step_(P.clone(), P, "fast"),
        lambda: factors_agree(None, P, P),
        lambda: RF.patch_mean("x", 3),
        lambda: RF.rls_flush_(P, None, s),
        lambda: HeldMatrix("P"),
        lambda: HeldMatrix(P, hold=2).update(3),
    ):
        with pytest.raises(TypeError):
            call()


def test_sparse_tensors_are_refused():
    with pytest.raises(ValueError):
        RF.rls_update_(torch.eye(3), torch.ones(3).to_sparse())
    with pytest.raises(ValueError):
        nonfinite([torch.eye(3).to_sparse()])


def shifted(a):
    """The same elements at an address of which no float can be."""
    memory = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    memory[...] = a
    return memory


def between(a):
    """The same elements, a stride of one float and a half apart."""
    wide = np.zeros(a.shape, [("value", a.dtype), ("other", "i2")])
    wide["value"] = a
    return wide["value"]


@pytest.mark.parametrize("change, message", [
    (lambda a: {"X": shifted(a["X"])}, "X must be aligned, and its strides whole elements"),
    (lambda a: {"Y": between(a["Y"])}, "Y must be aligned, and its strides whole elements"),
    (lambda a: {"P": shifted(a["P"])}, "P must be aligned"),
    (lambda a: {"W": a["P"][:2]}, "W and P must not share memory, since one of them is written"),
    (lambda a: {"X": a["W"][:1].repeat(3, 0), "V": a["P"][:1]}, r"shapes must be P \[n, n\]"),
    (lambda a: {"Y": a["W"][:, :2].repeat(2, 0)[:3], "X": a["P"][:3]}, "X and P must not share"),
    (lambda a: {"predictions": a["Y"]}, "predictions and Y must not share"),
    (lambda a: {"gains": shifted(np.ones(3))}, "gains must be aligned"),
    (lambda a: {"forgettings": shifted(np.ones(3))}, "forgettings must be aligned"),
    (lambda a: {"gains": np.ones(2)}, r"gains and forgettings must be \[T\]"),
    (lambda a: {"history": np.ones((3, 4, 2), "f4")}, r"history must be \[T, n_out, n\]"),
    (lambda a: {"state": np.zeros(2)}, r"state \[40\]"),
    (lambda a: {"state": np.full(40, np.nan)}, "state must be that of a filter"),
    (lambda a: {"W": np.zeros((0, 4), "f4"), "Y": np.zeros((3, 0), "f4")}, "shapes must be P"),
])  # fmt: skip
def test_arrays_of_the_filter(change, message):
    state = np.zeros(_C.filter_slots)
    state[0] = 1
    arrays = {
        "P": np.eye(4, dtype="f4"), "W": np.zeros((2, 4), "f4"),
        "V": np.zeros((_C.Filter_float32.rows, 4), "f4"), "squares": np.zeros(4), "state": state,
        "X": np.ones((3, 4), "f4"), "Y": np.ones((3, 2), "f4"),
        "predictions": np.zeros((3, 2), "f4"), "gains": None, "forgettings": None, "history": None,
    }  # fmt: skip
    arrays |= change(arrays)
    before = {k: np.array(v) for k, v in arrays.items()}
    given = list(arrays.values())
    with pytest.raises(RuntimeError, match=message):
        _C.Filter_float32(*given[:5]).run(*given[5:])
    for k, v in arrays.items():
        np.testing.assert_array_equal(np.array(v), before[k])
