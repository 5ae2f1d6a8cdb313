"""Calls every operator and entry point with hostile arguments; see README.md.

python tests/fuzz/fuzz.py CALLS SEED
"""

from __future__ import annotations

import collections
import faulthandler
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from hostile import Hostile
from support.op_cases import RULE, VALID, registered
from torch import Tensor

from rlscuda import _C, reference

HANG_SECONDS = 60
REFUSALS = {
    "operator": (RuntimeError,),
    "entry point": (RuntimeError, TypeError, ValueError, MemoryError),
}


def _filter_arrays(kind: Any) -> list[Any]:
    dtype = np.dtype(kind.__name__.split("_")[1])
    n, n_out, samples = 6, 2, 7
    rng = np.random.default_rng(0)
    state = np.zeros(_C.filter_slots)
    state[0] = 1
    return [
        np.eye(n, dtype=dtype), np.zeros((n_out, n), dtype), np.zeros((kind.rows, n), dtype),
        np.zeros(n), state, rng.standard_normal((samples, n)).astype(dtype),
        rng.standard_normal((samples, n_out)).astype(dtype), np.zeros((samples, n_out), dtype),
        rng.random(samples), np.full(samples, 0.9), np.zeros((samples, n_out, n), dtype), *RULE[:2],
        -1.0,
    ]  # fmt: skip


def _learn(kind: type, *arguments: Any) -> list[Any]:
    """A filter over arrays, and all that it does."""
    f = kind(*arguments[:5])
    f.forgetting, f.gain, f.ridge = arguments[11:]
    learnt = f.run(*arguments[5:11])
    variance = f.variance(arguments[5])
    f.update(arguments[5][0], arguments[6][0])
    f.flush()
    return [learnt, variance]


def entry_points() -> dict[str, tuple[Callable[..., Any], Callable[[], list[Any]]]]:
    """The classes of the module that NumPy arrays go to, and valid arguments of each."""
    kinds = {name: value for name, value in vars(_C).items() if callable(value)}
    return {
        name: (partial(_learn, kind), partial(_filter_arrays, kind)) for name, kind in kinds.items()
    }


def doubled(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, list):
        return [doubled(v) for v in value]
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    single = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.double() if single else value


def copied(value: Any) -> Any:
    """A copy that keeps nothing of the memory; None for a tensor that has none."""
    if isinstance(value, list):
        return [copied(v) for v in value]
    if isinstance(value, np.ndarray):
        return value.copy() if value.size < 1 << 20 else None
    if not isinstance(value, Tensor):
        return value
    short = value.layout == torch.strided and value.device.type == "cpu" and value.numel() and (
        value.untyped_storage().nbytes() < value.element_size() * (1 + value.storage_offset() + sum(
            (size - 1) * stride for size, stride in zip(value.shape, value.stride())
        ))
    )  # fmt: skip
    if short or value.layout != torch.strided or value.is_meta or value.numel() > 1 << 20:
        return None
    return value.detach().clone(memory_format=torch.contiguous_format)


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Whether two values agree; what could not be copied agrees with anything."""
    if a is None or b is None:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    if not isinstance(a, Tensor):
        return a == b or (a != a and b != b)
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if tolerance and a.is_floating_point():
        return torch.allclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True)
    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def exact(name: str, given: list[Any], left: list[Any], result: Any) -> bool:
    """Whether a valid call did what `rlscuda.reference` says, where that is cheap."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in given]
    if name == "rls_update_":
        power, kept = reference.running_power(1.0, float(wide[1].square().mean()), RULE[1])
        P, U, h = reference.rls_update(wide[0], wide[1] / power**0.5, *RULE)
        after = [left[0].double(), result[0].double() / power**0.5, result[1].double(), left[7]]
        return same(after, [P, U, h, torch.tensor([kept], dtype=left[7].dtype)], 1e-3)
    if name.startswith("patch_"):
        draw = dict(zip(("rank", "seed", "offset"), given[8:]))
        return same(_doubled(result), getattr(reference, name)(*given[:8], **draw), 1e-4)
    if name == "nonfinite":
        return bool(result) == any(not t.isfinite().all() for t in given[0])
    if name == "factors_agree":
        return result is True or given[0].dtype == torch.float64  # of a gradient in float32
    return True


def _doubled(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_doubled(r) for r in result)
    return result.double() if result.is_floating_point() else result


def main(calls: int, seed: int) -> int:
    """Makes the calls; 0 where every one was refused as documented or did what it should."""
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    hostile = Hostile(seed)
    assert sorted(VALID) == registered(), "tests/support/op_cases.py must know every operator"
    targets = [
        ("operator", name, getattr(torch.ops.rlscuda, name).default, VALID[name]) for name in VALID
    ] + [("entry point", name, *both) for name, both in entry_points().items()]
    counts: collections.Counter[str] = collections.Counter()
    for number in range(calls):
        kind, name, function, valid = hostile.random.choice(targets)
        arguments = valid()
        if hostile.random.random() < 0.3:
            arguments = doubled(arguments)
        hostile.start(arguments)
        for place in hostile.random.sample(
            range(len(arguments)), min(len(arguments), hostile.random.choice([0, 1, 1, 2, 3]))
        ):
            arguments[place] = hostile.changed(arguments[place])
        before = copied(arguments)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            result = function(*arguments)
        except REFUSALS[kind] as error:
            faulthandler.cancel_dump_traceback_later()
            outcome = "refused"
            text = str(error)
            fine = same(copied(arguments), before) and "API call failed" not in text
        else:
            faulthandler.cancel_dump_traceback_later()
            outcome, text = "accepted", "no exception"
            fine = True
            if hostile.plain and kind == "operator":
                outcome = "compared"
                again = copied(before)
                fine = same(function(*again), result, 1e-4) and same(again, copied(arguments), 1e-4)
                fine = fine and exact(name, before, copied(arguments), result)
        counts[f"{name} {outcome}"] += 1
        if not fine:
            print(f"call {number} of seed {seed}, {name}: {outcome}, but not as it should")
            print(f"  {text}\n  given {before}\n  left  {copied(arguments)}")
            return 1
    for name, count in sorted(counts.items()):
        print(f"{count:6d} {name}")
    print(f"{calls} calls of seed {seed}, none amiss")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
