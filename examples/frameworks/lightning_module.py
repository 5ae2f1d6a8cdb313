"""Lightning: a module whose `configure_optimizers` returns an `RLSOptimizer`.

On one process or on several, as `Trainer(devices=...)` says:

    python examples/frameworks/lightning_module.py
"""

import digits
import lightning
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from rlscuda import RLSOptimizer


class Digits(lightning.LightningModule):
    """Reads digits."""

    def __init__(self):
        super().__init__()
        self.net = digits.network()

    def training_step(self, batch, _):  # noqa: D102
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, _):  # noqa: D102
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), sync_dist=True)

    def on_train_epoch_end(self):
        """Logs how every matrix fares, to whatever logger there is."""
        health = self.trainer.optimizers[0].health().as_dict()
        self.log_dict({name: float(value) for name, value in health.items()})

    def configure_optimizers(self):  # noqa: D102
        optimizer = RLSOptimizer(self.parameters(), lr=0.2)
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(epochs: int = 5, **options):
    """Trains; the module and its optimizer."""
    torch.manual_seed(0)
    (train, val), module = digits.splits(), Digits()
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(val, 360))
    if trainer.is_global_zero:
        print(trainer.optimizers[0].coverage())
        print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
    return module, trainer.optimizers[0]


if __name__ == "__main__":
    main()
