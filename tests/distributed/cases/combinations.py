"""What each rank of a launch does with models and wrappers of all kinds; see `launch`."""

import torch
import torch.distributed as dist
import torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook as hook
from distributed.cases.shards import whole
from distributed.training import number_of, spread, state_of
from support.libraries.importing import importable
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from rlscuda import RLSOptimizer


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x):
        return self.last(checkpoint(self.block, self.first(x).tanh(), use_reentrant=self.reentrant))


class Heads(nn.Module):
    """Three layers that are shown one input, of which the last is another kind."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 5)
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent, self.last = kind(8, 6, num_layers=2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.recurrent(x)[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.inner(self.first(x).tanh()))


class Sometimes(nn.Module):
    """A layer that is left out of every other step, on all ranks."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.first(x).tanh()
        return self.last(self.inner(x) if self.calls % 2 else x)


def plain():
    layers = (nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    return nn.Sequential(*layers)


def frozen():
    model = plain()
    model[2].weight.requires_grad_(False)
    return model


MODELS = {
    "plain": plain,
    "frozen": frozen,
    "reentrant": lambda: Checkpointed(True),
    "not reentrant": lambda: Checkpointed(False),
    "heads": Heads,
    "attention": Attention,
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "tied": Tied,
    "sometimes": Sometimes,
}


def made(name, dtype=torch.float64):
    torch.manual_seed(6)
    return MODELS[name]().to(dtype)


def inputs(step, ranks, dtype=torch.float64, rows=3):
    """A minibatch of sequences [rows, 5, 8] of each of some ranks."""
    parts = []
    for rank in ranks:
        generator = torch.Generator().manual_seed(number_of(step, 0, rank))
        parts.append(torch.randn(rows, 5, 8, generator=generator, dtype=torch.float64) + 0.3)
    return torch.cat(parts).to(dtype)


def steps_of(call, model, optimizer, ranks, steps, start=0):
    dtype = next(model.parameters()).dtype
    for step in range(start, start + steps):
        call(inputs(step, ranks, dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def groups_of(model):
    """Two groups of different forms."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    first = list(layers[0].parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in first)]
    return [{"params": first, "form": "natural"}, {"params": rest, "form": "adaptive", "lr": 0.02}]


def wrapped(model, wrap, **options):
    """What is called instead of a model."""
    if wrap == "ddp":
        return DDP(model, **options)
    if wrap == "ddp of compiled":
        return DDP(torch.compile(model, backend="eager"))
    if wrap == "compiled ddp":
        return torch.compile(DDP(model), backend="eager")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    if wrap == "fsdp":
        for module in model.children():
            if list(module.parameters()):
                fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def as_one(rank, size, name, wrap, given, options, groups=False):
    """The state after six steps, and that of one process with the joined minibatches."""
    model = made(name)
    call = wrapped(model, wrap, **given)
    optimizer = RLSOptimizer(groups_of(model) if groups else model, **options)
    steps_of(call, model, optimizer, [rank], 6)
    return whole(state_of(model, optimizer)), alone(name, range(size), 6, groups, **options)


def alone(name, ranks, steps, groups=False, **options):
    """What one process ends with."""
    model = made(name)
    options = {**options, "process_group": None, "shard_matrices": False}
    optimizer = RLSOptimizer(groups_of(model) if groups else model, **options)
    steps_of(model, model, optimizer, ranks, steps)
    return state_of(model, optimizer)


def masked(rank, size, wrap, options):
    """Padding of another length on each rank."""
    model, one = made("plain"), made("plain")
    call, optimizer = wrapped(model, wrap), RLSOptimizer(model, **options)
    other = RLSOptimizer(one, process_group=None, **options)
    lengths = torch.tensor([[5, 2, 1], [4, 4, 3]])
    for step in range(6):
        for net, own, ranks in ((call, optimizer, [rank]), (one, other, [0, 1])):
            mask = torch.arange(5) < lengths[ranks].flatten()[:, None]
            with own.mask(mask):
                y = net(inputs(step, ranks))
            (y.square() * mask[..., None]).sum().div(9 * len(ranks)).backward()
            own.step()
            own.zero_grad()
    return whole(state_of(model, optimizer)), state_of(one, other)


def low_precision(rank, size, wrap, by_policy):
    """bfloat16 by autocast or by the policy of FSDP2; one process by autocast, in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, one = (made("heads", torch.float32) for _ in range(2))
    call = wrapped(model, wrap, **({"mp_policy": policy} if by_policy else {}))
    optimizer, other = RLSOptimizer(model), RLSOptimizer(one, process_group=None)
    for step in range(5):
        for net, own, ranks in ((call, optimizer, [rank]), (one, other, range(size))):
            with torch.autocast("cpu", torch.bfloat16, enabled=net is one or not by_policy):
                y = net(inputs(step, ranks, torch.float32))
            y.float().square().mean().backward()
            own.step()
            own.zero_grad()
    counts = [(h.updates, h.missing) for h in optimizer.health().values()]
    return whole(state_of(model, optimizer)), state_of(one, other), counts


def scaled(rank, size, wrap):
    """A GradScaler, and an input of one rank that is not finite at the third of six steps."""
    model = made("plain")
    call, optimizer = wrapped(model, wrap), RLSOptimizer(model)
    scaler, counts = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for step in range(6):
        x = inputs(step, [rank])
        if step == 2 and rank == 1:
            x[0, 0, 0] = float("inf")
        scaler.scale(call(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append(max(e["step"] for e in optimizer.state.values() if "P" in e))
    return whole(state_of(model, optimizer)), counts


def replicated(rank, size, over_fsdp):
    """Composable replicas, of DistributedDataParallel or of FSDP2."""
    from torch.distributed._composable import replicate
    from torch.distributed._composable.replicate_with_fsdp import replicate as over_dtensors

    model = made("plain")
    if over_fsdp:
        mesh = init_device_mesh("cpu", (size,))
        for module in [*(m for m in model if list(m.parameters())), model]:
            over_dtensors(module, mesh=mesh)
    optimizer = RLSOptimizer(model if over_fsdp else replicate(model))
    steps_of(model, model, optimizer, [rank], 6)
    return whole(state_of(model, optimizer)), alone("plain", range(size), 6)


def shards_refused(rank, size):
    """FSDP2 and `shard_matrices`: the message, and whether anything has changed."""
    model = made("plain")
    call, optimizer = wrapped(model, "fsdp"), RLSOptimizer(model, shard_matrices=True)
    before = whole(state_of(model, optimizer))
    call(inputs(0, [rank])).square().mean().backward()
    try:
        optimizer.step()
    except ValueError as error:
        after = whole(state_of(model, optimizer))
        return str(error), before.keys() == after.keys() and not spread([before, after])
    return "no error", False


def averaged(rank, size, members):
    """Gradients that are averaged by hand, in a group."""
    group = dist.new_group(members) if members else dist.group.WORLD
    model = made("plain")
    if members and rank not in members:
        return None
    optimizer = RLSOptimizer(model, process_group=group)
    for step in range(6):
        model(inputs(step, [rank])).square().mean().backward()
        for p in model.parameters():
            dist.all_reduce(p.grad, group=group)
            p.grad /= dist.get_world_size(group)
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model, optimizer), alone("plain", members or range(size), 6)


def two_models(rank, size, by_one):
    """Two DDP models of one process, by one optimizer or one for each."""

    def train(ranks, call=lambda model: model, **options):
        pair = nn.ModuleDict({"a": made("plain"), "b": made("heads")})
        calls = [call(model) for model in pair.values()]
        many = [pair] if by_one else pair.values()
        optimizers = [RLSOptimizer(model, **options) for model in many]
        for step in range(6):
            sum(net(inputs(step, ranks)).square().mean() for net in calls).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if by_one:
            return state_of(pair, *optimizers)
        states = [state_of(*both) for both in zip(pair.values(), optimizers)]
        return {f"{k} of {i}": v for i, state in enumerate(states) for k, v in state.items()}

    return train([rank], DDP), train(range(size), process_group=None)


def local_sgd(rank, size):
    """Gradients of this process alone from the third step on, weights averaged now and then."""
    model = made("plain")
    call, own = DDP(model), dist.new_subgroups(1)[0]
    state = hook.PostLocalSGDState(process_group=None, subgroup=own, start_localSGD_iter=3)
    call.register_comm_hook(state, hook.post_localSGD_hook)
    averager = PeriodicModelAverager(period=2, warmup_steps=3)
    optimizer = PostLocalSGDOptimizer(RLSOptimizer(model), averager)
    steps_of(call, model, optimizer, [rank], 8)
    return state_of(model, optimizer.optim)


def two_dimensions(rank, size, row_wise):
    """FSDP2 of a model that tensor parallel has sharded; what is covered, and one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = made("plain")
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    if row_wise:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    for module in [*(m for m in model if list(m.parameters())), model]:
        fully_shard(module, mesh=mesh["data"])
    optimizer = RLSOptimizer(model)
    rows = {row.name: (row.status, row.why) for row in optimizer.coverage()}
    steps_of(model, model, optimizer, [mesh["data"].get_local_rank()], 6)
    others = [name for name, (status, _) in rows.items() if status != "exact"]
    one = alone("plain", range(2), 6, exclude=others)
    return whole(state_of(model, optimizer)), one, rows


def accelerated(rank, size):
    """The function by which accelerate switches an optimizer to sharded parameters."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    model = made("plain")
    optimizer = RLSOptimizer(model)
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:  # as `fsdp2_prepare_model` leaves them
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1)
            group["params"][i].data_ptr = names[p]
    call = wrapped(model, "fsdp")
    fsdp2_switch_optimizer_parameters(optimizer, dict(model.named_parameters()))
    before = {name: p.full_tensor() for name, p in model.named_parameters()}
    steps_of(call, model, optimizer, [rank], 6)
    moved = [not torch.equal(p.full_tensor(), before[n]) for n, p in model.named_parameters()]
    counts = [(h.updates, h.missing) for h in optimizer.health().values()]
    return whole(state_of(model, optimizer)), all(moved), counts


def transformer(rank, size, kind):
    """A small model of transformers from its config, each block sharded by FSDP2."""
    with importable():
        import transformers

        common = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
        common |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
        if kind == "llama":
            config = transformers.LlamaConfig(**common, num_key_value_heads=1)
            make = transformers.LlamaForCausalLM
        else:
            rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = transformers.BertConfig(**common, **rates)
            make = transformers.BertForSequenceClassification

    def train(ranks, shard, **options):
        torch.manual_seed(2)
        model = make(config).double().train()
        if shard:
            blocks = model.model.layers if kind == "llama" else model.bert.encoder.layer
            mesh = init_device_mesh("cpu", (size,))
            for module in [*blocks, model]:
                fully_shard(module, mesh=mesh)
        optimizer = RLSOptimizer(model.parameters(), **options)
        for step in range(4):
            parts = [torch.Generator().manual_seed(number_of(step, 0, r)) for r in ranks]
            ids = torch.cat([torch.randint(0, 32, (3, 7), generator=part) for part in parts])
            labels = ids if kind == "llama" else ids[:, 0] % 2
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return whole(state_of(model, optimizer)), sum(
            row.status == "exact" for row in optimizer.coverage()
        )

    return *train([rank], True), *train(range(size), False, process_group=None)
