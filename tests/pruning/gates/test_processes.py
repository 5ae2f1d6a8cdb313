"""Gates in two processes: the same draws, the same probabilities, the same removals."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rlscuda.pruning import LayerGates


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.outer(self.inner(x).relu())


def _train(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), *[Residual() for _ in range(4)], nn.Linear(6, 3))
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    gates = LayerGates(
        model, torch.zeros(2, 4), optimizer, total_steps=20, price=0.5, warmup=0.1, patience=3,
        probes=2,
    )  # fmt: skip
    try:
        LayerGates(model, torch.zeros(2, 4), total_steps=20, maps=[torch.zeros(2, 4)])
    except ValueError as error:
        assert "several processes" in str(error)
    else:
        raise AssertionError("maps would differ between processes")
    generator = torch.Generator().manual_seed(rank)  # every process has data of its own
    for _ in range(24):
        x = torch.randn(8, 4, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(parallel(x), y)
        loss.backward()
        gates.step(lambda x=x, y=y: F.cross_entropy(model(x), y), loss)
        optimizer.step()
    assert "gone" in [gate.state for gate in gates.report().gates]
    gates.finish()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save([gates.state_dict(), state], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_agree(tmp_path):
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    (mine, model), (other, copy) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert torch.equal(mine.pop("generator"), other.pop("generator")) and mine == other
    assert model.keys() == copy.keys()
    assert all(torch.equal(model[name], copy[name]) for name in model)
