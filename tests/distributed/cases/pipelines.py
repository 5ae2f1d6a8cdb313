"""What each rank of a launch does as stages of a pipeline; see `launch`."""

import torch
import torch.distributed.pipelining as pipelining
from distributed.training import number_of, state_of
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.optim import staging

ONE_STAGE = ["ScheduleGPipe", "Schedule1F1B"]
TWO_STAGES = [
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "ScheduleZBVZeroBubble",
]
MICRO = 8


def stages():
    """Four parts of a model."""
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).double()
        for _ in range(4)
    ]


def error(y, target):
    return (y - target).square().mean()


def minibatch(step):
    generator = torch.Generator().manual_seed(number_of(step, 0, 0))
    return torch.randn(2, 2 * MICRO, 3, 8, generator=generator, dtype=torch.float64)


def pipeline(rank, size, schedule, options):
    """The states of a rank's stages after three steps, those of one process; draws by layer."""
    parts = stages()
    if schedule in ONE_STAGE:
        parts = [nn.Sequential(*parts[:2]), nn.Sequential(*parts[2:])]
        places = [rank]
    else:
        places = [rank, (3 - rank) if "ZBV" in schedule else (2 + rank)]
    example = torch.zeros(2, 3, 8, dtype=torch.float64).requires_grad_()
    made, optimizers = [], {}
    for place in places:
        given = example if place else example.detach()
        shapes = {"input_args": (given,), "output_args": (example,)}
        device = torch.device("cpu")
        made.append(pipelining.PipelineStage(parts[place], place, len(parts), device, **shapes))
        optimizers[place] = RLSOptimizer(parts[place], process_group=None, seed=place, **options)
    kind = getattr(pipelining, schedule, None) or getattr(pipelining.schedules, schedule)
    run = kind(made[0] if schedule in ONE_STAGE else made, MICRO, loss_fn=error)
    draws = []
    original = staging.summarise

    def summarise(layer, images, kind, rank, seed, offset):
        draws.append((seed, offset))
        return original(layer, images, kind, rank, seed, offset)

    staging.summarise = summarise
    try:
        for step in range(3):
            x, target = minibatch(step)
            run.step(*([x] if 0 in places else []), target=target)
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
    finally:
        staging.summarise = original
    state = {
        f"{k} of {place}": v
        for place, optimizer in optimizers.items()
        for k, v in state_of(parts[place], optimizer).items()
    }
    health = [h for optimizer in optimizers.values() for h in optimizer.health().values()]
    return state, [(h.updates, h.missing) for h in health], draws


def in_turn(count, options):
    """The states of so many stages, of one process that goes through the parts of a minibatch."""
    parts = stages()
    if count == 2:
        parts = [nn.Sequential(*parts[:2]), nn.Sequential(*parts[2:])]
    optimizers = [RLSOptimizer(part, seed=i, **options) for i, part in enumerate(parts)]
    for step in range(3):
        for x, target in zip(*(part.chunk(MICRO) for part in minibatch(step))):
            for part in parts:
                x = part(x)
            (error(x, target) / MICRO).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {
        f"{k} of {i}": v
        for i, both in enumerate(zip(parts, optimizers))
        for k, v in state_of(*both).items()
    }
