"""
Several processes
=================

Under `DistributedDataParallel` nothing in the loop is said for RLS: before anything moves,
:meth:`~rlscuda.RLSOptimizer.step` sums what all processes have seen of each layer's input. So all
hold the same matrices and weights, and these are those of one process that is given the joined
minibatch. With ``shard_matrices=True`` each `P`, and its layer's moments, is kept on one process
alone, which moves the layer for all. This page shows both, on two processes of one machine, by
gloo; several GPUs take nccl.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import rlscuda

# %%
# A script for torchrun
# ---------------------
# A program of several processes is a file of its own. Each rank takes its part of every minibatch
# of 64. Where there is no process group, ``train`` is the plain loop.

SCRIPT = """
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rlscuda import RLSOptimizer


def train(shard_matrices=False, steps=60):
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    model = DistributedDataParallel(network) if size > 1 else network
    optimizer = RLSOptimizer(model, lr=0.2, shard_matrices=shard_matrices)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(x))[:64].chunk(size)[rank]  # the same order on every rank
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    held = sum(state["P"].nbytes for state in optimizer.state.values() if "P" in state)
    return {"weights": network.state_dict(), "losses": losses, "bytes": held}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {name: train(shard) for name, shard in (("replicated", False), ("sharded", True))}
    torch.save(found, f"{sys.argv[1]}/{dist.get_rank()}.pt")
    dist.destroy_process_group()
"""

# %%
# Launched as ``torchrun --nproc-per-node 2 train.py``; written out, so that it is this Python
# which runs it.

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "train.py"
    file.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    package = str(Path(rlscuda.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", file, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=True,
    )
    ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    one = runpy.run_path(str(file))["train"]()

# %%
# The same weights
# ----------------
# The two processes agree to the bit, sharded or not. One process agrees with them but for the
# rounding of sums that are made in another order, which many steps amplify.


def difference(first, second):
    """The largest difference of two networks' weights, over their largest weight."""
    pairs = [(first[name], second[name]) for name in first]
    largest = max(weight.abs().max() for weight, _ in pairs)
    return float(max((a - b).abs().max() for a, b in pairs) / largest)


two = ranks[0]["replicated"]
print("rank 1 and rank 0:  ", difference(ranks[1]["replicated"]["weights"], two["weights"]))
print("sharded, replicated:", difference(ranks[0]["sharded"]["weights"], two["weights"]))
print(f"one process, two:    {difference(one['weights'], two['weights']):.0e}")

# %%
# On the left the losses, of two processes the mean of theirs. On the right what each process
# holds: sharded, all ranks together hold what each held before, as evenly as whole matrices can
# be shared. ``state_dict()`` then gathers them, so it is for all ranks to call.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
mean = torch.tensor([rank["replicated"]["losses"] for rank in ranks]).mean(0)
left.semilogy(one["losses"], color="C0", lw=4, alpha=0.4, label="one process")
left.semilogy(mean, color="C3", lw=1.2, label="two processes")
left.set(xlabel="step", ylabel="training loss")
left.legend(fontsize=8)
left.grid(alpha=0.3)
sizes = {"one\nprocess": one["bytes"]}
sizes |= {f"rank {rank}": ranks[rank]["replicated"]["bytes"] for rank in range(2)}
sizes |= {f"rank {rank},\nsharded": ranks[rank]["sharded"]["bytes"] for rank in range(2)}
colors = ["C0", "C3", "C3", "C1", "C1"]
right.bar(list(sizes), [size / 1024 for size in sizes.values()], color=colors)
right.set_ylabel("KiB of P")
plt.show()
