"""The named models and factories: shapes, sizes, and one clear error for each mistake."""

import sys

import pytest
import torch
from support.libraries.importing import importable
from torch import nn

from rlscuda import zoo
from rlscuda.cli.common.errors import UserError
from rlscuda.cli.train.models import build_model
from rlscuda.zoo import NETWORKS, ImageShape

MNIST, CIFAR = ImageShape(1, 28, 28), ImageShape(3, 32, 32)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [MNIST, ImageShape(2, 33, 20)])
def test_every_model_adapts_to_channels_size_and_classes(name, shape):
    model = build_model(name, shape, 7)
    assert model.training
    assert model.eval()(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("lenet5", MNIST, 61_706),
        ("lenet5", CIFAR, 62_006),
        ("mlp", MNIST, 266_610),
        ("resnet20", CIFAR, 272_474),
        ("vgg16", CIFAR, 15_249_354),
    ],
)
def test_parameter_counts(name, shape, count):
    assert parameters(build_model(name, shape, 10)) == count


def test_resnet20_has_20_weight_layers_beside_its_projections():
    layers = [
        module
        for name, module in build_model("resnet20", CIFAR, 10).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(layers) == 20


def test_layers_keep_the_names_that_checkpoints_know():
    names = {name: [n for n, _ in NETWORKS[name](CIFAR, 10).named_children()] for name in NETWORKS}
    assert names["mlp"] == ["flatten", "fc1", "relu1", "fc2", "relu2", "fc3"]
    assert names["resnet20"][:4] == ["conv", "bn", "relu", "block11"]
    assert names["resnet20"][-4:] == ["block33", "pool", "flatten", "fc"]
    assert names["vgg16"][:4] == ["conv11", "bn11", "relu11", "conv12"]
    assert names["vgg16"][-4:] == ["relu1", "fc2", "relu2", "fc3"]
    assert names["lenet5"][-5:] == ["fc1", "relu3", "fc2", "relu4", "fc3"]


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (zoo.mlp(MNIST, 10, hidden=()), 7_850),
        (zoo.resnet(CIFAR, 10, widths=(16, 32, 64), blocks=1), 78_042),
        (zoo.resnet(CIFAR, 10, widths=(64, 128, 256, 512), blocks=2), 11_173_962),
        (zoo.vgg(CIFAR, 10, (32, 64, 128), (2, 2, 2), hidden=(128,), pixels=2), 354_410),
    ],
    ids=["linear", "resnet8", "resnet18", "small vgg"],
)
def test_families_have_their_widths_and_depths(network, count):
    assert parameters(network) == count
    shape = CIFAR if parameters(network) > 10_000 else MNIST
    assert network.eval()(torch.randn(2, *shape)).shape == (2, 10)


def test_the_output_check_moves_no_random_stream():
    torch.manual_seed(3)
    NETWORKS["vgg16"](CIFAR, 10)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    build_model("vgg16", CIFAR, 10)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "cli_factories.py").write_text(
        "from torch import nn\n"
        "def tiny(in_channels, num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(4, num_classes))\n"
        "def everything(**sizes):\n"
        "    assert sorted(sizes) == ['image_size', 'in_channels', 'num_classes']\n"
        "    height, width = sizes['image_size']\n"
        "    return nn.Sequential(nn.Flatten(),\n"
        "        nn.Linear(sizes['in_channels'] * height * width, sizes['num_classes']))\n"
        "def fixed():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
        "def greedy(width):\n"
        "    return nn.Flatten()\n"
        "def no_module():\n"
        "    return 3\n"
        "def pair():\n"
        "    class Pair(nn.Module):\n"
        "        def forward(self, x): return x, x\n"
        "    return Pair()\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["tiny", "everything", "fixed"])
def test_factories_are_given_the_sizes_they_ask_for(factories, name):
    model = build_model(f"cli_factories:{name}", MNIST, 10)
    assert model(torch.randn(2, *MNIST)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "alexnet",
            "lenet5, mlp, resnet20, vgg16 or module:factory, torchvision:NAME, timm:NAME, got",
        ),
        ("no_such_module_:f", "No module named 'no_such_module_'"),
        ("cli_factories:missing", "has no attribute 'missing'"),
        (":tiny", "expected an importable module:factory"),
        ("cli_factories:number", "expected a callable that returns a module, got int"),
        ("cli_factories:greedy", "nothing else: missing a required argument: 'width'"),
        ("cli_factories:no_module", "expected a torch.nn.Module, got int"),
        ("cli_factories:pair", r"to logits \[2, 10\], got tuple"),
    ],
)
def test_wrong_models(factories, name, message):
    with pytest.raises(UserError, match=message):
        build_model(name, MNIST, 10)


def test_a_model_of_another_size_is_refused(factories):
    with pytest.raises(UserError, match=r"does not accept images \[N, 3, 32, 32\]"):
        build_model("cli_factories:fixed", CIFAR, 10)
    with pytest.raises(
        UserError, match=r"must map \[2, 1, 28, 28\] to logits \[2, 7\], got \[2, 10"
    ):
        build_model("cli_factories:fixed", MNIST, 7)


def test_lenet5_says_how_small_is_too_small():
    assert build_model("lenet5", ImageShape(1, 12, 12), 10)
    with pytest.raises(UserError, match="at least 12 x 12 pixels, got 11 x 12"):
        build_model("lenet5", ImageShape(1, 11, 12), 10)


@pytest.fixture
def libraries(monkeypatch):
    """torchvision and timm, whose operators need a build for the very torch at hand to import."""
    with importable():
        import timm  # noqa: F401
        import torchvision  # noqa: F401


@pytest.mark.parametrize(
    ("name", "shape"), [("torchvision:squeezenet1_1", CIFAR), ("timm:test_byobnet", MNIST)]
)
def test_models_of_libraries_have_the_classes_of_the_data(libraries, name, shape):
    assert build_model(name, shape, 7).eval()(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["torchvision:nothing", "timm:nothing"])
def test_a_library_without_that_model_is_one_line(libraries, name):
    with pytest.raises(UserError, match=rf"^--model {name}: Unknown model .*nothing\)?$"):
        build_model(name, CIFAR, 10)


def test_a_model_of_a_library_for_other_images_is_one_line(libraries):
    with pytest.raises(UserError, match=r"torchvision:squeezenet1_1 does not accept images \[N, 1"):
        build_model("torchvision:squeezenet1_1", MNIST, 10)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_is_one_line(monkeypatch, library):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    expected = rf"--model {library}:x: this needs the package {library}.*rlscuda\[vision\]'$"
    with pytest.raises(UserError, match=expected):
        build_model(f"{library}:x", CIFAR, 10)
