"""What a model puts out, whatever it is nested in; caches of keys and values are no outputs."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from support.libraries.importing import importable

from rlscuda.pruning.running.calls import checked_outputs

with importable():
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

Y = torch.zeros(2, 3, requires_grad=True)
Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    first: object
    second: object = None


class Bag:
    """Of a type that nobody may look into, where what is in it is to stay."""

    def __init__(self, *held):
        self.held = held
        self.itself = self


@pytest.mark.parametrize(
    "output", [Y, (Y,), {"y": [Y]}, OrderedDict(y=Y), Pair(Y, 3), Output(Y), [Output({"y": (Y,)})]]
)
def test_tensors_are_found(output):
    assert [tensor is Y for tensor in checked_outputs(output)] == [True]


@pytest.mark.parametrize(
    ("output", "message"),
    [((Y, Bag(Y)), "tuples, lists, mappings or dataclasses, got Bag"), (None, "got 0 without"),
     (Y.detach(), "a gradient reaches, .* got 1 without"), (Output(Bag(Y)), "got Bag")],
)  # fmt: skip
def test_what_is_refused(output, message):
    with pytest.raises(ValueError, match=message):
        checked_outputs(output)


@pytest.mark.parametrize("decoder", [True, False])
def test_the_cache_of_a_language_model_is_no_output(decoder):
    size = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 8}  # fmt: skip
    if decoder:
        model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=1))
    else:
        model = BertModel(BertConfig(**size, is_decoder=True, use_cache=True))
    output = model(torch.randint(0, 9, (2, 5)))
    assert output.past_key_values.get_seq_length() == 5
    assert checked_outputs(output)[0] is output[0]
    assert all(tensor.shape[-1] in (8, 9) for tensor in checked_outputs(output))
