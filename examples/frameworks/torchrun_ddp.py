"""Plain PyTorch on several processes, by `DistributedDataParallel` and `DistributedSampler`.

Nothing in it is said for RLS:

    torchrun --nproc-per-node 2 examples/frameworks/torchrun_ddp.py
"""

import os

import digits
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rlscuda import RLSOptimizer


def main(epochs: int = 5):
    """Trains; the network and its optimizer."""
    device = torch.device(
        f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    )
    torch.manual_seed(0)
    train, val = digits.splits()
    network = digits.network().to(device)
    model = DistributedDataParallel(network)
    optimizer = RLSOptimizer(model.parameters(), lr=0.2)
    sampler = DistributedSampler(train)
    loader = DataLoader(train, 64 // dist.get_world_size(), sampler=sampler)
    schedule = CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
            schedule.step()
    if dist.get_rank() == 0:
        x, y = (tensor.to(device) for tensor in val.tensors)
        print(optimizer.coverage())
        print(f"accuracy {(network(x).argmax(1) == y).float().mean():.3f}")
    return network, optimizer


if __name__ == "__main__":
    dist.init_process_group()
    main()
    dist.destroy_process_group()
