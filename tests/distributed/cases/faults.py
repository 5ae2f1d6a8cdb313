"""What processes do that lose one of them, and with checkpoints that do not fit; see `launch`."""

import datetime
import gc
import multiprocessing
import os
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed.cases.combinations import inputs, made, steps_of, wrapped
from distributed.cases.shards import whole
from distributed.training import spread, state_of
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from rlscuda import RLSOptimizer

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def trained(rank, wrap, steps, start=0, **options):
    model = made("plain")
    call, optimizer = wrapped(model, wrap), RLSOptimizer(model, **options)
    steps_of(call, model, optimizer, [rank], steps, start)
    return model, call, optimizer


def saved(rank, size, wrap, folder, later):
    """The names and the state after seven steps, of which the last three follow a checkpoint.

    With `later` it is still being written while they are made.
    """
    model, call, optimizer = trained(rank, wrap, 4)
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    content = {"model": get_model_state_dict(model), "optimizer": state}
    if later:
        written = dcp.async_save(content, checkpoint_id=folder, process_group=dist.new_group())
    else:
        dcp.save(content, checkpoint_id=folder)
    steps_of(call, model, optimizer, [rank], 3, start=4)
    if later:
        written.result()
    return whole(state_of(model, optimizer)), sorted(state)


def loaded(rank, size, wrap, folder, ranks):
    """The last three steps, from the checkpoint, on two processes or one."""
    one = len(ranks) == 1
    if rank not in ranks:
        return None
    model = made("plain")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    call = model if one else wrapped(model, wrap)
    optimizer = RLSOptimizer(model, process_group=None if one else "auto")
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    content = {"model": get_model_state_dict(model), "optimizer": state}
    dcp.load(content, checkpoint_id=folder, no_dist=one)
    set_model_state_dict(model, content["model"])
    set_optimizer_state_dict(model, optimizer, content["optimizer"], options=FLAT)
    steps_of(call, model, optimizer, range(size) if one else [rank], 3, start=4)
    return whole(state_of(model, optimizer))


def of_another(rank, size, wrap, folder):
    """Checkpoints of other names and of other shapes: what is raised, and if anything changed."""
    model, _, optimizer = trained(rank, wrap, 2)
    theirs = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": theirs}, checkpoint_id=folder)
    narrow = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6), nn.LayerNorm(6))
    outcomes = []
    for other in (made("heads"), narrow.append(nn.Linear(6, 4)).double()):
        call, own = wrapped(other, wrap), RLSOptimizer(other)
        steps_of(call, other, own, [rank], 2)
        before = whole(state_of(other, own))

        def from_file(own=own, other=other):
            content = {"optimizer": get_optimizer_state_dict(other, own)}
            dcp.load(content, checkpoint_id=folder)

        def from_state(own=own, other=other):
            set_optimizer_state_dict(other, own, theirs)

        for load in (from_file, from_state):
            message = "no error"
            try:
                load()
            except (CheckpointException, RuntimeError, ValueError) as error:
                message = str(error)
            outcomes.append((message, spread([before, whole(state_of(other, own))])))
    return outcomes


def lasting(rank, size):
    """Tensors alive after forty steps and after sixty."""
    model, call, optimizer = trained(rank, "ddp", 20)
    counts = []
    for start in (20, 40):
        steps_of(call, model, optimizer, [rank], 20, start)
        gc.collect()
        counts.append(sum(isinstance(some, torch.Tensor) for some in gc.get_objects()))
    return counts


def _end(rank, folder):
    """Kills the second of two processes amid their third step; what the first then finds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=10),
    )
    kinds = {"ddp": ("ddp", {}), "fsdp": ("fsdp", {})}
    kinds["mean"] = ("ddp", {"summary": "mean"})
    kinds["shards"] = ("ddp", {"shard_matrices": True})
    some = {kind: trained(rank, wrap, 2, **given) for kind, (wrap, given) in kinds.items()}
    for _, call, _ in some.values():
        call(inputs(2, [rank])).square().mean().backward()
    dist.barrier()
    if rank:
        os._exit(9)
    found = {}
    for kind, (model, _, optimizer) in some.items():
        before, since, message = here(model, optimizer), time.monotonic(), "no error"
        try:
            optimizer.step()
        except RuntimeError as error:
            message = str(error)
        differing = spread([before, here(model, optimizer)])
        found[kind] = (message, time.monotonic() - since, differing)
    torch.save(found, f"{folder}/found")
    os._exit(0)  # without the others there is nothing to take down


def here(model, optimizer):
    """What this process has of the state."""
    state = state_of(model, optimizer)
    return {k: (v.to_local() if hasattr(v, "to_local") else v).clone() for k, v in state.items()}


def killed(folder):
    """What the first process finds when the second is killed before a step."""
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_end, args=(rank, folder)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    return torch.load(f"{folder}/found")
