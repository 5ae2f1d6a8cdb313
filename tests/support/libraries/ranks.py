"""Every example on each of several processes; what each ends with goes to the folder given.

torchrun --nproc-per-node 2 tests/support/libraries/ranks.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.compare import snapshot
from support.libraries.importing import example

os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` has it
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")  # one for all: gloo hangs where it is made again
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
ends = {
    "torchrun": example("torchrun_ddp").main(2),
    "lightning": example("lightning_module").main(2, strategy="ddp", devices=2, accelerator="cpu"),
    "accelerate": example("accelerate_loop").main(2),
}
ends["bert"], ends["llama"] = example("transformers_trainer").main(2)
torch.save({name: snapshot(*end) for name, end in ends.items()}, folder / f"{rank}.pt")
