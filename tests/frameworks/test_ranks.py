"""On two processes every example ends with the same weights and matrices on both, to the bit."""

import subprocess
import sys

import pytest
import torch
from support.cli import subprocess_environment
from support.compare import differing, snapshot
from support.libraries.importing import EXAMPLES, example
from torch.nn import functional as F
from torch.utils.data.distributed import DistributedSampler

from rlscuda import RLSOptimizer

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree"),
    # what a framework warns of has classes that need it, by which a parallel run would be stopped
    pytest.mark.filterwarnings("ignore", "error::UserWarning:rlscuda"),
]
STEPS = {"torchrun": 46, "lightning": 24, "accelerate": 24, "bert": 16, "llama": 16}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each rank ended with: by example, the parameters and the optimizer's state."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, EXAMPLES.parents[1] / "tests/support/libraries/ranks.py", folder],
        env=subprocess_environment(OMP_NUM_THREADS="1"), capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", STEPS)
def test_ranks_end_alike(ends, name):
    one, other = (end[name] for end in ends)
    assert sum(key.endswith(".P") for key in one) >= 2
    assert {int(one[key]) for key in one if key.endswith(".step")} == {STEPS[name]}
    assert not differing(one, other)


def test_two_processes_are_one_with_the_joined_minibatch(ends):
    digits = example("digits")
    torch.manual_seed(0)
    data, _ = digits.splits()
    net = digits.network()
    optimizer = RLSOptimizer(net, lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS["torchrun"])
    samplers = [DistributedSampler(data, 2, rank) for rank in range(2)]
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for shares in zip(*(torch.tensor(list(sampler)).split(32) for sampler in samplers)):
            x, y = data[torch.cat(shares)]
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    one = snapshot(net, optimizer)
    for name, value in ends[0]["torchrun"].items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-5)
