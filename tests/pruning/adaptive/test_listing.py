"""Channels and blocks on one list: its currency, what meets a limit, and what of it goes now."""

import pytest
import torch
from support.blocks import resnet
from support.blocks.adaptive import LOADER, started, steps

from rlscuda.pruning.adaptive.listing import BlockCandidate, OneList
from rlscuda.pruning.adaptive.penalties.ledger import BLOCK
from rlscuda.pruning.choice.ranking import Candidate
from rlscuda.pruning.choice.targets import compensate_layers, lost_columns
from rlscuda.pruning.running.batch_norms import settle
from rlscuda.pruning.running.distortion import Distortion
from rlscuda.pruning.surgery.plan import plan
from rlscuda.pruning.surgery.transaction import pruned_copy


class Sizes:
    """100 in all; what each unit of a coupling, or a block, saves."""

    def __init__(self, gains):
        self.gains = gains

    def without(self, removed, blocks):
        channels = sum(self.gains[name] * len(units) for name, units in removed.items())
        return 100 - channels - sum(self.gains[BLOCK + name] for name in blocks)


def listed(blocks, costs=()):
    """A list of blocks, (cost, gain) by name, and of one coupling whose units save 1 each."""
    first = torch.zeros(1, dtype=torch.int64)
    candidates = {
        BLOCK + name: BlockCandidate(first, torch.tensor([cost]), 1)
        for name, (cost, _) in blocks.items()
    }
    gains = {BLOCK + name: gain for name, (_, gain) in blocks.items()}
    if costs:
        order = torch.arange(len(costs))
        candidates["conv"] = Candidate(order, torch.tensor(costs), len(costs) + 1)
        gains["conv"] = 1
    return OneList(candidates, gains, Sizes(gains), 1, dict.fromkeys(blocks, ()))


def test_a_block_that_the_limit_does_not_ask_for_stays():
    """The cheap and small one is no use once the large one must go."""
    one = listed({"small": (0.1, 10), "middle": (1.0, 20), "large": (3.0, 50)})
    assert one.cheapest(90).blocks == ["small"]
    assert one.cheapest(75).blocks == ["small", "middle"]
    assert one.cheapest(50).blocks == ["large"]
    assert one.cheapest(40).blocks == ["small", "large"]
    assert set(one.cheapest(0).blocks) == {"small", "middle", "large"}  # out of reach


def test_channels_go_rather_than_a_block_that_costs_more():
    costs = [0.01 * number for number in range(1, 31)]
    dear, cheap = (listed({"block": (cost, 30)}, costs) for cost in (2.0, 0.1))
    found = dear.cheapest(90)
    assert not found.blocks and found.removed == {"conv": list(range(10))}
    assert cheap.cheapest(90).blocks == ["block"] and cheap.cheapest(90).removed == {}


@pytest.mark.parametrize(
    ("goal", "blocks", "channels"),
    [(100, [], 0), (95, [], 5), (85, ["small"], 5), (60, ["small"], 10), (50, ["large"], 0)],
)
def test_the_part_that_goes_now_overshoots_nothing(goal, blocks, channels):
    one = listed({"small": (0.1, 10), "large": (3.0, 50)}, [0.1] * 10)
    whole = one.everything()
    if blocks == ["large"]:
        whole = type(whole)({"conv": whole.removed["conv"]}, ["large"])
    found = one.part(whole, goal)
    assert found.blocks == blocks
    assert len(found.removed.get("conv", ())) == channels


def test_channels_cost_what_the_network_loses_without_them():
    """The cheapest quarter of a coupling is on the list for the measured change of the output."""
    model, optimizer, pruner = started(lambda: resnet((4, 8), 2), source="calibration")
    steps(model, optimizer, pruner)
    own = pruner._plan
    own.measure()
    structure, matrices = own._structure, own.penalty.matrices
    loss, modules = Distortion(model, LOADER), dict(model.named_modules())
    candidates = own._candidates()
    for coupling in structure.couplings:
        one = candidates[coupling.name]
        count = max(1, coupling.units // 4)
        removed = {coupling.name: one.order[:count].tolist()}
        surgery = plan(structure, removed)
        lost = lost_columns(structure.couplings, modules, removed)
        trial = pruned_copy(model, surgery, compensate_layers(model, matrices, lost)[0])
        settle(model, trial, surgery.tensors, ((batch, batch) for batch in LOADER))
        assert float(one.cost[:count].sum()) == pytest.approx(loss(trial), rel=1e-6)
        rate = own.penalty.rates[coupling.name]
        before = dict(own.penalty.rates)
        omega = own.penalty.measures()[coupling.name]
        own.penalty.rates = {}
        torch.testing.assert_close(omega, own.penalty.measures()[coupling.name] * rate**0.5)
        own.penalty.rates = before


def test_channels_alone_are_in_the_currency_of_their_layers():
    model, optimizer, pruner = started(what="channels")
    steps(model, optimizer, pruner)
    pruner._plan.measure()
    assert pruner._plan.penalty.rates == {}
