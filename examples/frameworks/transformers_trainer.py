"""Transformers: the `Trainer` makes an `RLSOptimizer` for a BERT and a Llama.

Both are tiny and new, and learn from tokens made up here; several processes by `torchrun`:

    python examples/frameworks/transformers_trainer.py
"""

import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from rlscuda import RLSOptimizer

TOKENS, LENGTH = 32, 16
SIZE = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip


def bert():
    """A classifier, and random sequences in two classes by their first token."""
    sequences = torch.randint(TOKENS, (512, LENGTH))
    data = [{"input_ids": s, "labels": 2 * s[0] // TOKENS} for s in sequences]
    return BertForSequenceClassification(BertConfig(**SIZE)), data


def llama():
    """A language model, and sequences that count on in fives."""
    sequences = (torch.randint(TOKENS, (512, 1)) + 5 * torch.arange(LENGTH)) % TOKENS
    return LlamaForCausalLM(LlamaConfig(**SIZE)), [{"input_ids": s, "labels": s} for s in sequences]


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
