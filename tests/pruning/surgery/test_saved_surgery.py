"""What surgery leaves of networks of every structure is saved, resumed and exported."""

from __future__ import annotations

import pytest
import torch
from support.compare import differing, snapshot
from support.pruning_models import ZOO, Case, inputs
from support.pruning_surgery import operate

from rlscuda import RLSOptimizer
from rlscuda.pruning.files.export import export_program
from rlscuda.pruning.files.saving import load_optimizer, load_pruned, save_pruned
from rlscuda.pruning.running.measure import measure
from rlscuda.pruning.structure.trace import trace
from rlscuda.pruning.surgery.plan import plan


def training(model, optimizer, seed: int, steps: int = 2) -> None:
    torch.manual_seed(seed)  # of dropout
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(seed=seed + step)).square().mean().backward()
        optimizer.step()


def pruned_in_training(case: Case):
    """The model of a case with two units less of every coupling, or one, and its optimizer."""
    model = case.model()
    optimizer = RLSOptimizer(model)
    training(model, optimizer, seed=3)
    removed = {name: range(min(2, units - 1)) for name, units in case.couplings.items()}
    operate(model, [optimizer], plan(trace(model, inputs()), removed), {}, inputs())
    training(model, optimizer, seed=13)
    return model, optimizer


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_a_pruned_network_resumes_to_the_bit(case, tmp_path):
    model, optimizer = pruned_in_training(case)
    save_pruned(model, tmp_path / "model", optimizer=optimizer)
    training(model, optimizer, seed=23)
    loaded = load_pruned(case.model, tmp_path / "model")
    resumed = RLSOptimizer(loaded)
    load_optimizer(resumed, tmp_path / "model")
    training(loaded, resumed, seed=23)
    assert not differing(snapshot(model, optimizer), snapshot(loaded, resumed))
    assert not differing(dict(model.named_buffers()), dict(loaded.named_buffers()))
    assert str(model) == str(loaded) != str(case.model())
    whole, left = (measure(m, inputs(), repeats=1) for m in (case.model(), loaded))
    assert left.parameters < whole.parameters and left.flops < whole.flops


def test_a_pruned_network_is_exported_while_it_trains(tmp_path):
    model, optimizer = pruned_in_training(ZOO[2])
    export_program(model, inputs(), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(inputs(size=3))
    torch.testing.assert_close(found, model.eval()(inputs(size=3)), rtol=0, atol=1e-5)
    model.train()
    training(model, optimizer, seed=33)
    assert not any(health.missing for health in optimizer.health().values())
