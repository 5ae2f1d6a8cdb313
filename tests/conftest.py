"""Seeds, threads and the device of every test."""

import os
import signal

import pytest
import torch

if device := os.environ.get("RLSCUDA_TEST_DEVICE"):  # benchmarks/gpu_check.sh runs tests on CUDA
    torch.set_default_device(device)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # small shapes; what threads change is tested where it is said so


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
