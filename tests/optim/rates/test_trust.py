"""The trust ratio: no step of the paper's and the natural form is longer than a part of W."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.training import cnn, mlp
from torch import nn

from rlscuda import RLSOptimizer

FORMS = pytest.mark.parametrize("form", ["paper", "natural"])


def gradients(model, scale, size=16, seed=1):
    """Those of a regression whose targets are of size `scale`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 5, 5) if isinstance(model[0], nn.Conv2d) else (4,)
    x = torch.randn(size, *shape, generator=generator).double()
    model.zero_grad()
    y = model(x)
    F.mse_loss(y, scale * torch.randn(y.shape, generator=generator).double()).backward()


def matrices(model):
    """The weight and bias of each covered layer as one matrix, a grouped one's groups apart."""
    for m in model:
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            rows = m.weight.detach().flatten(1)
            if m.bias is not None:
                rows = torch.cat([rows, m.bias.detach()[:, None]], 1)
            yield from (part.clone() for part in rows.chunk(getattr(m, "groups", 1)))


@FORMS
@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("lr", [1e-3, 0.3])
def test_a_step_is_shortened_to_a_part_of_the_weight(form, build, momentum, lr):
    moved = []
    for ratio in (0.1, math.inf):
        model = build(torch.float64)
        optimizer = RLSOptimizer(model, lr, form=form, trust_ratio=ratio, momentum=momentum)
        before = list(matrices(model))
        gradients(model, scale=1e3 if lr == 0.3 else 1)
        optimizer.step()
        moved.append([new - old for new, old in zip(matrices(model), before)])
    shortened = 0
    for limited, free, old in zip(*moved, before):
        most = 0.1 * (1 - momentum) * old.norm()
        factor = min(1.0, (most / free.norm()).item())
        shortened += factor < 1
        torch.testing.assert_close(limited, factor * free, rtol=1e-9, atol=1e-12)
    assert shortened == (len(before) if lr == 0.3 else 0)


@FORMS
def test_momentum_adds_up_to_no_more(form):
    model = mlp(torch.float64)
    optimizer = RLSOptimizer(model, form=form, momentum=0.9, lr=1.0)
    for _ in range(40):
        before = list(matrices(model))
        gradients(model, 1e6)
        optimizer.step()
        for new, old in zip(matrices(model), before):
            assert (new - old).norm() <= 0.1 * max(new.norm(), old.norm()) * (1 + 1e-9)


@FORMS
def test_a_weight_of_zero_moves_as_far_as_the_rule_says(form):
    steps = []
    for ratio in (0.1, math.inf):
        model = mlp(torch.float64)
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        optimizer = RLSOptimizer(model, form=form, trust_ratio=ratio)
        gradients(model, 1e3)
        optimizer.step()
        steps.append(model[2].weight.detach().clone())
    assert steps[1].norm() > 1
    assert torch.equal(*steps)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_biases_low_precision_and_a_rate_of_zero(form, dtype):
    model = mlp(dtype)
    optimizer = RLSOptimizer(model, form=form)
    model[0].bias.requires_grad_(False)
    for rate in (0.3, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        before = [p.detach().clone() for p in model[0].parameters()]
        optimizer.zero_grad()
        (1e3 * model(torch.randn(8, 4).to(dtype)).float().square().mean()).backward()
        optimizer.step()
        assert torch.equal(before[1], model[0].bias)
        part = (model[0].weight - before[0]).norm() / torch.hypot(*(p.norm() for p in before))
        assert part.item() == pytest.approx(0.1 if rate else 0.0, rel=0.02)


@FORMS
@pytest.mark.parametrize("shift, scale", [(0.0, 1e2), (1e3, 1e3)])
def test_large_targets_are_learnt(form, shift, scale):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)
    )
    x = torch.randn(256, 4, generator=generator)
    y = shift + scale * (x[:, :1] * x[:, 1:2] + x[:, 2:3])
    optimizer = RLSOptimizer(model, form=form)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for _ in range(120):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss.item() < 0.3 * y.var().item()


@FORMS
def test_pixels_are_learnt(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (256, 36), generator=generator).float()
    y = (x[:, :18].mean(1) > x[:, 18:].mean(1)).long()
    model = nn.Sequential(nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = RLSOptimizer(model, form=form)
    for _ in range(120):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
