"""Transformers: the `Trainer` makes an `RLSOptimizer` for a BERT and a Llama.

Both are tiny and learn from made-up tokens; several processes by `torchrun`:

    python examples/frameworks/transformers_trainer.py
"""

import tempfile

from tiny_models import bert, llama
from transformers import Trainer, TrainingArguments, set_seed

from rlscuda import RLSOptimizer


def trainer_of(build, folder: str, **options) -> Trainer:
    """A trainer of the model and the data that `build` gives."""
    set_seed(0)
    model, data = build()
    options = {
        "per_device_train_batch_size": 32, "lr_scheduler_type": "cosine",
        "weight_decay": 0.2, "save_strategy": "no", "logging_steps": 8, "disable_tqdm": True,
        **options,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(folder, **options),
        train_dataset=data,
        optimizer_cls_and_kwargs=(RLSOptimizer, {"lr": 0.05}),
    )


def main(epochs: int = 4):
    """Trains both, one after the other; their models and optimizers."""
    trained = []
    for build in (bert, llama):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(build, folder, num_train_epochs=epochs)
            trainer.train()
        rls = trainer.optimizer.optimizer  # ours, in accelerate's
        if trainer.is_world_process_zero():
            print(rls.coverage())
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            print(f"{build.__name__}: loss {losses[0]:.3f}, at the end {losses[-1]:.3f}")
        trained.append((trainer.model, rls))
    return trained


if __name__ == "__main__":
    main()
