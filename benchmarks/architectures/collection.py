"""Networks that people have, with random weights: of libraries, and kinds written by hand.

Those of libraries are named `library: name`. Each is made with an example of its inputs; large ones
in their smallest variant, or with fewer blocks, and images no larger than they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.architectures import handwritten
from rlscuda.pruning.running.calls import ExampleInputs

Made = tuple[nn.Module, ExampleInputs]

TORCHVISION = {  # name -> pixels
    "vgg16_bn": 64, "alexnet": 96, "resnet18": 96, "resnet50": 96, "resnext50_32x4d": 96,
    "mobilenet_v2": 96, "mobilenet_v3_small": 96, "efficientnet_b0": 96,
    "convnext_tiny": 64, "regnet_x_400mf": 96, "regnet_y_400mf": 96,
    "densenet121": 96, "squeezenet1_1": 96, "shufflenet_v2_x0_5": 96, "googlenet": 96,
    "inception_v3": 299, "swin_t": 224, "swin_v2_t": 256, "fcn_resnet50": 64,
    "lraspp_mobilenet_v3_large": 96,
}  # fmt: skip
DETECTORS = {
    "retinanet_resnet50_fpn": 96, "ssdlite320_mobilenet_v3_large": 160,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 128, }  # fmt: skip
TIMM = {  # name -> pixels, or options where a smaller variant is made
    "vit_tiny_patch16_224": 224, "deit_tiny_distilled_patch16_224": 224,
    "beit_base_patch16_224": {"embed_dim": 192, "depth": 6, "num_heads": 3},
    "eva02_tiny_patch14_224": {"depth": 6, "num_classes": 1000}, "cait_xxs24_224": {"depth": 8},
    "crossvit_tiny_240": 240, "swin_tiny_patch4_window7_224": 224, "pvt_v2_b0": 224,
    "poolformer_s12": 224, "mobilevit_xxs": 128, "edgenext_xx_small": 128, "levit_128s": 224,
    "efficientformer_l1": 224, "mixer_s32_224": 224, "resmlp_12_224": 224, "gmlp_s16_224": 224,
    "xcit_nano_12_p16_224": 224, "coat_lite_tiny": 224, "twins_pcpvt_small": 224,
    "tiny_vit_5m_224": 224, "convit_tiny": 224, "pit_ti_224": 224, "hiera_tiny_224": 224,
    "coatnet_pico_rw_224": 224, "efficientvit_b0": 128, "swiftformer_xs": 224, "repvit_m0_9": 96,
    "convnext_atto": 96, "convnextv2_atto": 96, "inception_next_atto": 96, "mambaout_femto": 96,
    "starnet_s1": 96, "fasternet_t0": 96, "nfnet_l0": 96, "seresnet50": 96, "skresnet18": 96,
    "resnest14d": 96, "ecaresnet26t": 96, "res2net50_26w_4s": 96, "cspresnet50": 96, "dla34": 96,
    "hrnet_w18_small": 96, "ese_vovnet19b_dw": 96, "repvgg_a0": 96, "ghostnet_100": 96,
    "mobilenetv4_conv_small": 96, "mobilenetv3_small_100": 96, "efficientnet_b0": 96,
    "tf_efficientnet_lite0": 96, "fastvit_t8": 128, "rexnet_100": 96, "mixnet_s": 96,
}  # fmt: skip
MTCNN = {"PNet": 24, "RNet": 24, "ONet": 48}  # name -> pixels
TRANSFORMERS = {  # name -> class; widths are small
    "BERT": "BertForSequenceClassification", "DistilBERT": "DistilBertForSequenceClassification",
    "GPT-2": "GPT2LMHeadModel", "Llama, grouped queries": "LlamaForCausalLM",
    "Qwen2": "Qwen2ForCausalLM", "OPT": "OPTForCausalLM", "T5": "T5ForConditionalGeneration",
    "ViT": "ViTForImageClassification", "Segformer": "SegformerForSemanticSegmentation",
    "Whisper": "WhisperForConditionalGeneration",
}  # fmt: skip


def networks() -> dict[str, Callable[[], Made]]:
    """Name -> what makes the network and its example, in the order of the table."""
    found: dict[str, Callable[[], Made]] = {}
    found |= {f"torchvision: {name}": partial(_torchvision, name) for name in TORCHVISION}
    found["torchvision: vit_b_16, small"] = _vision_transformer
    found["torchvision: r3d_18"] = _video
    found |= {f"torchvision: {name}, maps": partial(_detector, name) for name in DETECTORS}
    found |= {f"timm: {name}": partial(_timm, name) for name in TIMM}
    found |= {f"transformers: {name}": partial(_transformers, name) for name in TRANSFORMERS}
    found |= {
        f"facenet-pytorch: {name}": partial(_mtcnn, name) for name in ("PNet", "RNet", "ONet")
    }
    found["efficientnet-lite-pytorch: lite0"] = _lite
    return found | handwritten.networks()


@contextmanager
def importable() -> Iterator[None]:
    """In the block, torchvision imports without its operators, which need its very own torch."""
    with mock.patch("torch.library.register_fake", lambda *_, **__: lambda function: function):
        yield


def images(size: int, count: int = 1) -> torch.Tensor:
    """Random ones, [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def _torchvision(name: str) -> Made:
    options = {"aux_logits": True, "init_weights": False} if name in (
        "googlenet", "inception_v3") else {}  # fmt: skip
    if name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        options["weights_backbone"] = None
    model = import_module("torchvision").models.get_model(name, weights=None, **options)
    return model, images(TORCHVISION[name])


def _vision_transformer() -> Made:
    kind = import_module("torchvision").models.VisionTransformer
    return kind(64, 16, 4, 4, 96, 192, num_classes=100), images(64)


def _video() -> Made:
    model = import_module("torchvision").models.video.r3d_18(weights=None)
    return model, torch.randn(1, 3, 4, 48, 48)


class Maps(nn.Module):
    """A detector up to the maps that its head puts out; boxes are picked from those."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x):
        """What the head makes of all scales."""
        return self.head(list(self.backbone(x).values()))


def _detector(name: str) -> Made:
    kinds = import_module("torchvision.models.detection")
    return Maps(getattr(kinds, name)(weights=None, weights_backbone=None)), images(DETECTORS[name])


def _timm(name: str) -> Made:
    options = TIMM[name]
    size = options if isinstance(options, int) else 224
    model = import_module("timm").create_model(name, **options if isinstance(options, dict) else {})
    return model, images(size)


def _transformers(name: str) -> Made:
    kinds, kind = import_module("transformers"), TRANSFORMERS[name]
    config = getattr(kinds, kind).config_class(**_widths(name))
    model = getattr(kinds, kind)._from_config(config, attn_implementation="eager")
    tokens = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    if name in ("ViT", "Segformer"):
        return model, {"pixel_values": images(64)}
    if name == "T5":
        return Scores(model), {"input_ids": tokens, "decoder_input_ids": tokens[:, :6]}
    if name == "Whisper":
        sound = torch.randn(1, 80, 64)
        return Scores(model), {"input_features": sound, "decoder_input_ids": tokens[:, :6]}
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Scores(nn.Module):
    """What a model with an encoder puts out of its decoder alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        """The scores of all words."""
        return self.model(**inputs).logits


def _widths(name: str) -> dict[str, Any]:
    """Options of a small configuration."""
    plain = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 128}  # fmt: skip
    gated = {**plain, "num_key_value_heads": 2, "vocab_size": 100}
    return {
        "BERT": {**plain, "vocab_size": 100},
        "DistilBERT": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128,
                       "vocab_size": 100},
        "GPT-2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 64},
        "Llama, grouped queries": gated,
        "Qwen2": gated,
        "OPT": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 128,
                "vocab_size": 100, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
        "T5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
               "vocab_size": 100},
        "ViT": {**plain, "image_size": 64, "patch_size": 16, "num_labels": 10},
        "Segformer": {"hidden_sizes": [16, 32, 64, 96], "decoder_hidden_size": 64,
                      "num_attention_heads": [1, 2, 4, 6], "num_labels": 10},
        "Whisper": {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100,
                    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 32,
                    "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
                    "eos_token_id": 2, "decoder_start_token_id": 1},
    }[name]  # fmt: skip


def _mtcnn(name: str) -> Made:
    kinds = import_module("facenet_pytorch.models.mtcnn")
    return getattr(kinds, name)(pretrained=False), images(MTCNN[name])


def _lite() -> Made:
    kind = import_module("efficientnet_lite_pytorch").EfficientNet
    return kind.from_name("efficientnet-lite0"), images(96)
