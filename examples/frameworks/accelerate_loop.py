"""Accelerate: `prepare` takes an `RLSOptimizer` as any other optimizer.

On one process, or on two with the option `--num_processes 2`:

    accelerate launch examples/frameworks/accelerate_loop.py
"""

import digits
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from rlscuda import RLSOptimizer


def main(epochs: int = 5):
    """Trains; the network and its optimizer."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    train, val = digits.splits()
    model = digits.network()
    optimizer = RLSOptimizer(model.parameters(), lr=0.2)
    loader = DataLoader(train, 32, shuffle=True)
    schedule = CosineAnnealingLR(optimizer, epochs * len(loader) // 2)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    x, y = (tensor.to(accelerator.device) for tensor in val.tensors)
    right = (model(x).argmax(1) == y).float().mean()
    rls = optimizer.optimizer  # ours, in accelerate's
    accelerator.print(rls.coverage())
    accelerator.print(f"accuracy {right:.3f}")
    return accelerator.unwrap_model(model), rls


if __name__ == "__main__":
    main()
