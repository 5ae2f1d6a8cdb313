"""Numbers beside a model's layers that tell their widths, and do not follow a cut."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rlscuda.pruning.running.calls import all_tensors
from rlscuda.pruning.surgery.plan import Surgery

_WIDTHS = (  # ends of names in timm, torchvision and transformers
    "features", "dim", "width", "planes", "channels", "chs", "embd", "inner", "hidden_size",
    "intermediate_size", "d_model", "d_ff",
)  # fmt: skip


def outdated(model: nn.Module, surgery: Surgery) -> dict[str, str]:
    """The numbers of a model and its configs that give a width which no layer has any more.

    The pruned model runs as they are; but timm's `reset_classifier` reads `num_features`, and
    `from_pretrained` of transformers `config.intermediate_size`. One that happens to be the width
    of something else is not found.

    Args:
        model: The model after the cut.
        surgery: What was cut.

    Returns:
        Name of an attribute -> its value and the width that the layers have now.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in all_tensors(model).items()}
    found: dict[str, str] = {}
    configs: set[int] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        inside = [own for own in shapes if own.startswith(prefix)]
        cut = [(surgery.tensors[own].of, shapes[own]) for own in inside if own in surgery.tensors]
        pairs = [pair for of, shape in cut for pair in zip(of, shape)]
        left = {size for own in inside for size in shapes[own]}
        for key, value in _numbers(module, configs):
            new = sorted({after for before, after in pairs if before == value})
            if new and value not in left:
                found[prefix + key] = f"{value}, now {' or '.join(map(str, new))}"
    return found


def _numbers(module: nn.Module, configs: set[int]) -> Iterator[tuple[str, int]]:
    """The widths among the attributes of a module, and of its config where it is the first's."""
    # torchvision's blocks of layers in a row all say what their last layer says
    held = {} if isinstance(module, nn.Sequential) else dict(vars(module))
    config = held.get("config")
    if hasattr(config, "__dict__") and id(config) not in configs:
        configs.add(id(config))
        held |= {f"config.{key}": value for key, value in vars(config).items()}
    for key, value in held.items():
        if type(value) is int and key.endswith(_WIDTHS):
            yield key, value
