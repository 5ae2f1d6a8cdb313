"""Hooks that are part of what a model computes: copies have them, and share nothing by them."""

from __future__ import annotations

import threading
import weakref
from functools import partial

import pytest
import torch
from support.libraries.importing import importable
from torch import nn

from rlscuda import RLSOptimizer
from rlscuda.pruning import RLSPruner, SketchTracker, export_program
from rlscuda.pruning.running.calls import isolated_copy
from rlscuda.pruning.structure.trace import trace

with importable():
    from transformers import (
        BertConfig,
        BertModel,
        SegformerConfig,
        SegformerForSemanticSegmentation,
    )

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BESIDE: list = []  # which the code of a class names


class Net(nn.Module):
    """Two convolutions and a head, which sees the features of both; `get` finds the first's."""

    def __init__(self, get=None):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(14, 4, 1)
        self.skips: list = []
        self.get = get

    def features(self, x):
        """Of the skip, and of the way through."""
        self.skips.clear()
        x = self.up(self.down(x).relu())
        return self.skips[0], x

    def forward(self, x):
        return self.head(torch.cat(self.features(x), 1)).mean((2, 3))

    def keep(self, module, args, output):
        """A bound method as a hook."""
        self.skips.append(output)


class Plain(Net):
    """Without a hook."""

    def features(self, x):
        y = self.down(x)
        return y, self.up(y.relu())


class Beside(Net):
    """The store is named by the code of the class."""

    def features(self, x):
        BESIDE.clear()
        x = self.up(self.down(x).relu())
        return BESIDE[0], x


class Store:
    """Keeps what a module puts out."""

    def __init__(self):
        self.stored = self.handle = None

    def __call__(self, module, args, output):
        self.stored = output


class Stored(Net):
    """The store is an object that the model holds, and the hook."""

    def __init__(self):
        super().__init__()
        self.store = Store()
        self.store.handle = self.down.register_forward_hook(self.store)

    def features(self, x):
        x = self.up(self.down(x).relu())
        return self.store.stored, x


def closure():
    net = Net()
    net.down.register_forward_hook(lambda module, args, output: net.skips.append(output))
    return net


def nested():
    net = Net()

    def add(output):
        net.skips.append(output)

    @torch.enable_grad()
    def hook(module, args, output):
        add(output)

    net.down.register_forward_hook(hook)
    return net


def default():
    net = Net()
    net.down.register_forward_hook(lambda _, args, output, to=net.skips: to.append(output))
    return net


def bound():
    net = Net()
    net.down.register_forward_hook(net.keep)
    return net


def bound_partial():
    net = Net()
    net.down.register_forward_hook(partial(lambda to, m, a, output: to.append(output), net.skips))
    return net


def weak():
    net = Net()
    reference = weakref.ref(net)
    net.down.register_forward_hook(lambda m, a, output: reference().skips.append(output))
    return net


def beside():
    net = Beside()
    net.down.register_forward_hook(lambda module, args, output, to=BESIDE: to.append(output))
    return net


def beside_in_closure():
    kept: list = []

    class Inner(Net):
        def features(self, x):
            kept.clear()
            x = self.up(self.down(x).relu())
            return kept[0], x

    net = Inner()
    net.down.register_forward_hook(lambda module, args, output: kept.append(output))
    return net


def two_hooks():
    """One keeps, the other joins; the forward knows of neither."""

    class Inner(Net):
        def forward(self, x):
            return self.head(self.up(self.down(x).relu())).mean((2, 3))

    net, kept = Inner(), Store()
    net.down.register_forward_hook(kept)

    def join(module, args, kwargs):
        return (torch.cat((kept.stored, args[0]), 1),), kwargs

    net.head.register_forward_pre_hook(join, with_kwargs=True)
    return net


def attribute():
    """A function that the model holds, whose closure is of the model."""

    class Inner(Net):
        def features(self, x):
            return self.get(x)

    net = Inner()

    def get(x):
        y = net.down(x)
        return y, net.up(y.relu())

    net.get = get
    return net


MAKERS = (
    closure, nested, default, bound, bound_partial, weak, beside, beside_in_closure, two_hooks,
    attribute, Stored,
)  # fmt: skip


def made(make, train=True):
    """A model of fixed weights, trained a little on the very batch it is traced by."""
    torch.manual_seed(0)
    net = make()
    torch.manual_seed(0)
    for part in (net.down, net.up, net.head):
        part.reset_parameters()
    optimizer = RLSOptimizer(net, lr=0.01)
    for _ in range(2 if train else 0):
        optimizer.zero_grad()
        net(IMAGES).square().mean().backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("train", [True, False], ids=["run", "new"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_model_with_hooks_is_pruned_as_one_without(make, train):
    (net, optimizer), (plain, plains) = made(make, train), made(Plain, train)
    for model, own in ((net, optimizer), (plain, plains)):
        options = {"loader": [IMAGES], "source": "calibration"}
        RLSPruner(model, own, IMAGES, ratio=0.5, **options).step()
    assert net.head.in_channels == 7 and net.down.out_channels == 4
    for images in (IMAGES, 2 * IMAGES[:1] + 1):
        for mode in (True, False):
            torch.testing.assert_close(net.train(mode)(images), plain.train(mode)(images))
    net(IMAGES).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", MAKERS)
def test_a_copy_has_nothing_in_common_with_the_model(make):
    net, _ = made(make)
    expected = net.eval()(IMAGES).detach()
    copies = isolated_copy(net), isolated_copy(isolated_copy(net))
    before = [getattr(net, "store", net.skips), list(net.skips), vars(getattr(net, "store", net))]
    kept = [*before[1]]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    for one in copies:
        assert torch.equal(one(IMAGES), expected)
    assert all(a is b for a, b in zip(net.skips, kept)) and len(net.skips) == len(kept)
    assert not net(IMAGES).any()


def test_hooks_that_only_look_on_are_the_copys_own():
    net, seen = Plain(), []
    handle = net.up.register_forward_hook(lambda module, args, output: seen.append(output))
    net.up.register_forward_pre_hook(lambda module, args: seen.append(args))
    one = isolated_copy(net)
    one(IMAGES)
    assert not seen
    handle.remove()
    assert len(one.up._forward_hooks) == 1 and not net.up._forward_hooks


def test_hooks_of_this_package_do_not_follow():
    net, optimizer = made(Plain)
    tracker = SketchTracker(net)
    net.down.register_forward_hook(lambda module, args, output: 2 * output)
    one = isolated_copy(net)
    assert [len(part._forward_hooks) for part in one.modules()] == [0, 1, 0, 0]
    assert len(net.down._forward_hooks) == 3 and len(one.down._forward_hooks_with_kwargs) == 0
    assert torch.equal(one(IMAGES), net.eval()(IMAGES))
    del optimizer, tracker


def test_what_an_onlooker_holds_may_not_be_copyable():
    net, lock = Plain(), threading.Lock()

    def count(module, args, output):
        with lock:
            pass

    net.down.register_forward_hook(count)
    assert isolated_copy(net)(IMAGES).shape == (4, 4)


def test_a_hook_that_cannot_be_copied_is_named():
    class Owner:
        def __init__(self, net):
            self.net, self.lock = net, threading.Lock()

        def keep(self, module, args, output):
            self.net.skips.append(output)

    net = Net()
    net.down.register_forward_hook(Owner(net).keep)
    with pytest.raises(ValueError, match=r"the hook .*Owner.keep of 'down' cannot be copied"):
        trace(net, IMAGES)
    assert net(IMAGES).shape == (4, 4) and not [s for s in net.skips if s.shape[1] != 8]


class Tagger(nn.Module):
    """A head on the states between the layers, which transformers captures by hooks."""

    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=8,
        )  # fmt: skip
        self.bert = BertModel(config)
        self.head = nn.Linear(16, 3)

    def forward(self, words):
        states = self.bert(words, output_hidden_states=True).hidden_states
        return self.head(torch.cat((states[0], states[1]), -1))


@pytest.mark.parametrize("run", [True, False], ids=["run", "new"])
def test_states_that_transformers_captures(run):
    torch.manual_seed(0)
    net, words = Tagger().eval(), torch.randint(0, 20, (4, 5))
    if run:
        net(words)
    expected = isolated_copy(net)(words)
    report = RLSPruner(net, None, words[:2], ratio=0.5, loader=[words]).step()
    assert report.gains.after.parameters < report.gains.before.parameters
    for mode in (True, False):
        assert net.train(mode)(words).shape == expected.shape
    intermediate = net.bert.encoder.layer[0].intermediate.dense
    assert intermediate.out_features == 8


def test_the_head_of_segformer_sees_the_states_of_all_stages():
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[4, 4, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4,
        sr_ratios=[2, 2, 1, 1], decoder_hidden_size=8, mlp_ratios=[2] * 4, num_labels=3,
    )  # fmt: skip
    net, images = SegformerForSemanticSegmentation(config), torch.randn(4, 3, 64, 64)
    report = RLSPruner(net, None, images[:2], ratio=0.5, loader=[images]).step()
    assert report.gains.after.parameters < report.gains.before.parameters
    for mode in (True, False):
        assert net.train(mode)(images).logits.shape == (4, 3, 16, 16)


def test_an_export_has_them(tmp_path):
    net, _ = made(bound)
    expected = net.eval()(IMAGES)
    export_program(net, IMAGES, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(IMAGES)
    torch.testing.assert_close(found, expected)
