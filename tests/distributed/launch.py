"""Many cases in few launches of processes that talk by gloo: a launch costs seconds."""

import datetime
import fcntl
import os
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)


class case:  # noqa: N801
    """A case with its arguments, which a launched process can be sent."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __call__(self, rank, size):
        return self.function(rank, size, *self.args)


def _rank(rank, size, cases, folder):
    os.environ.update(OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=TIMEOUT
    )
    for number, case in enumerate(cases):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = case(rank, size)
            except Exception:
                result = traceback.format_exc()
                print(f"rank {rank} of {size}, case {number}: {result}", flush=True)
        texts = [str(w.message) for w in caught]
        torch.save((result, texts), f"{folder}/{number}-{rank}")
    dist.barrier()
    dist.destroy_process_group()


def launch(size, cases):
    """Runs each case, a function of rank and size at the top of a module, on so many processes.

    Returns:
        For each case, what each rank returned or the traceback of what it raised; and likewise the
        texts of its warnings.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (size, cases, folder), nprocs=size)
        rows = [
            [torch.load(Path(folder, f"{i}-{r}"), weights_only=False) for r in range(size)]
            for i in range(len(cases))
        ]
    return [tuple(zip(*ranks)) for ranks in rows]


def launch_once(factory, name, size, some):
    """`launch` of named cases, once for all processes that run tests; returns them by name."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = base / f"{name}.results"
        if not kept.exists():
            torch.save(dict(zip(some, launch(size, list(some.values())))), kept)
        return torch.load(kept, weights_only=False)


def results(launched, name):
    """What each rank returned, which none may have failed to."""
    ranks, _ = launched[name]
    failed = [text for text in ranks if isinstance(text, str) and "Traceback" in text]
    assert not failed, failed[0]
    return ranks
