"""Models as torchvision and timm define them, in small: they are pruned and every weight moves."""

from __future__ import annotations

import copy

import pytest
import torch
from support.libraries.importing import importable
from support.pruning_surgery import every_other, operate

from rlscuda import RLSOptimizer
from rlscuda.cli.report.record import size_of
from rlscuda.pruning import RLSPruner, export_program, find_blocks, remove_blocks
from rlscuda.pruning.running.measure import count_flops
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan

with importable():
    import timm
    import torchvision
    from transformers import LlamaConfig, LlamaForCausalLM

MODELS = {
    "torchvision mobilenet_v2": lambda: torchvision.models.MobileNetV2(
        num_classes=5, width_mult=0.25, inverted_residual_setting=[[1, 8, 1, 1], [3, 16, 2, 2]]
    ),
    "torchvision densenet": lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5),
    "torchvision convnext": lambda: torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(8, 12, 2),
         torchvision.models.convnext.CNBlockConfig(12, None, 1)], num_classes=5
    ),
    "timm convnext": lambda: timm.create_model(
        "convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 12, 12)
    ),
    "timm resnet": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 12, 12)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_remaining_weight_moves(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), torch.randn(4, 3, 32, 32).double()
    optimizer = RLSOptimizer(model, lr=0.02)

    def step(seed: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()).square(
        ).mean().backward()  # fmt: skip
        optimizer.step()

    step(0)
    structure = trace(model, x)
    assert structure.refused == {} and len(structure.couplings) > 2
    before = sum(p.numel() for p in model.parameters())
    operate(model, [optimizer], plan(structure, every_other(structure)), {}, x)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    twin, twins = copy.deepcopy((model, optimizer))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(1)
    step(2)
    still = [n for n, p in model.named_parameters() if torch.equal(p, weights[n])]
    assert still == []
    assert all(health.missing == 0 for health in optimizer.health().values())
    assert twins.param_groups[0]["params"] == list(twin.parameters())


BLOCKS = {  # of each model: how many residual branches, and what a map of one is
    "torchvision mobilenet_v2": (2, "1x1"),
    "torchvision convnext": (3, "3x3"),
    "timm convnext": (4, "1x1"),
    "timm resnet": (4, "3x3"),
}


@pytest.mark.parametrize("way", ["delete", "map"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_residual_branch_goes(name, way, tmp_path):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(4, 3, 32, 32)
    optimizer = RLSOptimizer(model)
    model(x).square().mean().backward()
    optimizer.step()
    count, how = BLOCKS[name]
    blocks = find_blocks(model, x)
    assert len(blocks.found) == count and blocks.refused == {}
    ways = ("delete",) if way == "delete" else (how,)
    report = remove_blocks(model, x, [x], optimizers=optimizer, count=1, ways=ways, price="params")
    assert [change.how for change in report.changes] == list(ways)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    export_program(model, x, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.allclose(program(x), model.eval()(x), atol=1e-5)


def test_both_branches_of_a_vision_transformer_go():
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(16, 8, embed_dim=8, depth=2, num_heads=2, num_classes=5)
    x = torch.randn(2, 3, 16, 16)
    report = remove_blocks(model, x, [x], count=4)
    assert {change.name for change in report.changes} == {
        f"blocks.{k}.{part}" for k in (0, 1) for part in ("attn", "mlp")
    }
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("heads", [False, True])
def test_attention_shrinks_with_its_attributes(heads):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2
    )
    x = torch.randn(2, 3, 32, 32)
    structure = trace(model, x, heads=heads)
    attention = model.blocks[0].attn
    assert structure.refused == {}
    operate(model, [], plan(structure, {"blocks.0.attn.qkv": [0]}), {}, x)
    assert (attention.num_heads, attention.head_dim) == ((1, 6) if heads else (2, 5))
    assert attention.qkv.out_features == 3 * attention.attn_dim == 3 * attention.proj.in_features


def test_counts_of_a_vision_transformer():
    width, layers, tokens, patch = 24, 2, 17, 4 * 4 * 3
    model = timm.models.VisionTransformer(
        16, 4, num_classes=5, embed_dim=width, depth=layers, num_heads=3
    )
    rows = 2 * tokens * (3 * width * width + width * width + 2 * width * 4 * width)
    products = layers * (rows + 2 * 2 * tokens * tokens * width)
    expected = 2 * (tokens - 1) * patch * width + products + 2 * width * 5
    for hooked in (False, True):
        if hooked:
            RLSOptimizer(model)
        assert count_flops(model, torch.randn(1, 3, 16, 16)) == expected
        assert size_of(model, torch.randn(1, 3, 16, 16))["flops"] == expected


def test_a_language_model_puts_out_its_cache_and_generates():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, eos_token_id=None,
    )  # fmt: skip
    model, words = LlamaForCausalLM(config).eval(), torch.randint(3, 20, (4, 6))
    assert model(words).past_key_values.get_seq_length() == 6
    loader = [{"input_ids": words, "labels": words}]
    report = RLSPruner(model, None, {"input_ids": words[:2]}, ratio=0.5, loader=loader).step()
    assert report.gains.after.parameters < report.gains.before.parameters
    whole = model.generate(words, max_new_tokens=4, do_sample=False)
    alone = model.generate(words, max_new_tokens=4, do_sample=False, use_cache=False)
    assert whole.shape == (4, 10) and torch.equal(whole, alone)
