"""On two processes every example ends with the same weights and matrices on both, to the bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cli import subprocess_environment
from support.compare import differing
from support.libraries import EXAMPLES

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")
STEPS = {"torchrun": 46, "lightning": 24, "accelerate": 24, "bert": 16, "llama": 16}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What each rank ended with: by example, the parameters and the optimizer's state."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, Path(__file__).with_name("ranks.py"), folder],
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
