"""What the example of Transformers trains: a BERT and a Llama, tiny and new, on made-up tokens."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

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
