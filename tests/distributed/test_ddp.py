"""Training by several processes under DDP is that of one process that sees all their inputs."""

import math
import re

import pytest
import torch
from distributed.cases import combinations
from distributed.cases import ddp as cases
from distributed.conftest import rows_of
from distributed.launch import case, launch_once, results
from distributed.training import cnn, distance, mlp, one_process, same, spread

from rlscuda.optim.ranks.sharing import Sharing

KINDS = [("mean", 1), ("mean", 4), ("sketch", 1), ("sketch", 4), ("sketch", 16), ("sample", 16)]
FORMS = ["spectral", "adaptive", "paper", "natural"]
LONG = ["spectral", "paper"]
MLPS = [
    (mlp, 20, {"form": form, "summary": kind, "rank": rank})
    for form in FORMS
    for kind, rank in KINDS
]
CNNS = [
    (cnn, 10, {"form": form, "summary": kind, "rank": rank, "micro": 3})
    for form in ("spectral", "paper")
    for kind, rank in (("mean", 1), ("sketch", 4), ("sample", 16))
]
RESTING = {"gain": 0.25, "interval": 3}  # P has an update in steps 1 to 4, 6, 9 and so on
AT_INTERVALS = [
    (make, steps, {"form": form, "summary": kind, "rank": 4, **RESTING, **more})
    for make, steps, more in ((mlp, 20, {}), (cnn, 10, {"micro": 3}))
    for form in ("spectral", "adaptive")
    for kind in ("mean", "sketch", "sample")
]
FORGETTING = [
    (mlp, 20, {"form": "paper", "forgetting": 0.99}),
    (cnn, 17, {"form": "natural", "forgetting": 0.99}),
]
SHARED = [(make, {"form": form}) for make in (mlp, cnn) for form in FORMS]
SHARED += [(mlp, {"form": "natural", "forgetting": 0.9}), (cnn, RESTING)]
EXACT = {2: MLPS + CNNS + FORGETTING + AT_INTERVALS, 4: MLPS[::5] + CNNS[::2] + AT_INTERVALS[::5]}
FIRST_STEP = [(mlp, 1, {"form": form, "summary": "sample", "rank": 16}) for form in FORMS]


TWO = {
    **{f"exact {i}": case(cases.exact, *one) for i, one in enumerate(EXACT[2])},
    **{f"first {i}": case(cases.exact, *one) for i, one in enumerate(FIRST_STEP)},
    "unused": cases.unused,
    **{
        f"uneven {kind} {rank}": case(cases.uneven, {"summary": kind, "rank": rank})
        for kind, rank in KINDS
    },
    "unbiased sketch": case(cases.unbiased, "sketch", 1000),
    "unbiased sample": case(cases.unbiased, "sample", 1000),
    "joined": case(cases.joined, False),
    "joined at intervals": case(cases.joined, False, RESTING),
    "at rest": case(cases.at_rest, RESTING),
    "nan": case(cases.refused_together, math.nan),
    "huge": case(cases.refused_together, 1e200),
    **{f"counted {kind}": case(cases.counted, kind) for kind in ("mean", "sketch", "sample")},
    "alone": case(cases.apart, {}),
    "alone, said": case(cases.apart, {"process_group": None}),
    "another seed": cases.another_seed,
    "another step": cases.another_step,
    "another first step": case(cases.another_step, 103),
    "zero": cases.zero,
    **{f"long {form}": case(cases.long, {"form": form}) for form in LONG},
    **{
        f"{name} {i}": case(function, *one)
        for name, function in (("shared", cases.shared), ("replicated", cases.replicated))
        for i, one in enumerate(SHARED)
    },
    "pruned": case(cases.pruned, {}),
    "pruned, shared": case(cases.pruned, {"shard_matrices": True}),
    "shared refuses": cases.shared_refuses,
    "ddp's own join": case(cases.joined, True),  # the last one: DDP is left amid its context
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch_once(tmp_path_factory, "ddp two", 2, TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    some = {f"exact {i}": case(cases.exact, *one) for i, one in enumerate(EXACT[4])}
    some["subgroup"] = case(combinations.averaged, [1, 2])
    for form in FORMS:
        folder = str(tmp_path_factory.mktemp("elastic"))
        some[f"elastic {form}"] = case(cases.elastic, folder, {"form": form})
    return launch_once(tmp_path_factory, "ddp four", 4, some)


@pytest.mark.combination("DDP, 2 and 4 processes, every form and summary", "exact")
@pytest.mark.combination("DDP, accumulation under no_sync", "exact")
@pytest.mark.parametrize("number, size", [(i, n) for n in EXACT for i in range(len(EXACT[n]))])
def test_ranks_are_one_process(number, size, request):
    ranks = results(request.getfixturevalue({2: "two", 4: "four"}[size]), f"exact {number}")
    make, steps, options = EXACT[size][number]
    one = one_process(make, size, steps, **options)
    assert not spread(ranks)
    assert distance(ranks[0], one, "P ") <= 4e-15 and distance(ranks[0], one, "W ") <= 4e-15


@pytest.mark.parametrize("number", range(len(FIRST_STEP)))
def test_a_sampled_first_step_is_one_process_to_the_bit(two, number):
    ranks = results(two, f"first {number}")
    make, steps, options = FIRST_STEP[number]
    one = one_process(make, 2, steps, **options)
    assert torch.equal(ranks[0]["P 0.weight"], one["P 0.weight"])  # whose input is the very same
    assert not torch.equal(one["P 0.weight"], torch.eye(9, dtype=torch.float64))


@pytest.mark.combination("DDP, a layer that not all ranks use", "exact")
def test_a_layer_that_one_rank_uses(two):
    ranks = results(two, "unused")
    assert not spread([state for state, _ in ranks])
    assert all(counts == dict.fromkeys(counts, (10, 0)) for _, counts in ranks)
    assert len(ranks[0][1]) == 3


@pytest.mark.combination(
    "DDP, minibatches of other sizes on other ranks",
    "exact for mean; else unbiased draws, ranks alike",
)
@pytest.mark.parametrize("kind, rank", KINDS)
def test_uneven_minibatches_leave_no_spread(two, kind, rank):
    assert not spread(results(two, f"uneven {kind} {rank}"))


@pytest.mark.parametrize("kind, within", [("sketch", 0.1), ("sample", 0.03)])
def test_uneven_draws_are_unbiased(two, kind, within):
    for mean, expected in results(two, f"unbiased {kind}"):
        assert (mean - expected).abs().max() < within * expected.abs().max()


@pytest.mark.combination(
    "Join([model, optimizer]), 12 and 7 minibatches", "ranks alike, with the state of the last"
)
def test_join_ends_with_the_state_of_the_last(two):
    ranks = results(two, "joined")
    assert not spread(ranks) and ranks[0]["step 0.weight"] == 12


def test_join_has_an_update_in_every_step(two):
    ranks = results(two, "joined at intervals")
    assert not spread(ranks) and ranks[0]["health 0.weight"][0] == 12


@pytest.mark.combination("the join() of DDP alone", "refused")
def test_ddps_own_join_is_refused(two):
    for text in two["ddp's own join"][0]:
        assert "Join([model, optimizer])" in text


@pytest.mark.combination("DDP, an input of one rank not finite", "the step is void on all ranks")
@pytest.mark.parametrize("name", ["nan", "huge"])
def test_all_ranks_refuse_what_is_not_finite_on_one(two, name):
    ranks = results(two, name)
    for moved, refused, _ in ranks if name == "nan" else ():
        assert moved == 0 and refused == [1, 1]
    assert not spread([state for *_, state in ranks])


@pytest.mark.parametrize("kind", ["mean", "sketch", "sample"])
def test_a_step_is_one_exchange_of_the_size_of_the_summaries(two, kind):
    r, inputs, layers = 4, 9 + 17, 2
    sums = (torch.float64, 8 * (r * inputs + r * layers))
    draws = (torch.int64, 8 * (2 * r * layers + 2 * layers + 2))
    for calls in results(two, f"counted {kind}"):
        assert calls == ([sums] if kind == "mean" else [draws, sums])


def test_nothing_is_exchanged_where_matrices_rest(two):
    for counts in results(two, "at rest"):
        assert counts == [4, 2, 2, 2, 0, 3, 0, 0, 2, 0]  # first also how many steps, and twice what


@pytest.mark.combination("several processes without DDP or process_group=", "warned of once")
def test_processes_apart_are_warned_of_once(two):
    texts = [[t for t in own if "process_group" in t] for own in two["alone"][1]]
    assert [len(own) for own in texts] == [1, 1] and "one of 2 processes" in texts[0][0]
    results(two, "alone, said")
    assert not any(two["alone, said"][1])


@pytest.mark.combination("ranks of other seeds or steps; ZeroRedundancyOptimizer", "refused")
@pytest.mark.parametrize(
    "name, message",
    [
        ("another seed", "do not train the same layers alike; rank . of 2 has: 0 sample"),
        ("another step", "load a checkpoint on every rank"),
        ("another first step", "load a checkpoint on every rank"),
        ("zero", "a ZeroRedundancyOptimizer cannot hold this one"),
    ],
)
def test_ranks_that_differ_are_refused_before_anything_moves(two, name, message):
    for text, unchanged in results(two, name):
        assert unchanged and re.search(message, text)


@pytest.mark.combination("process_group= of some processes, without DDP", "exact")
def test_a_group_of_some_processes_without_ddp(four):
    first, *some, last = results(four, "subgroup")
    assert first is None and last is None
    same(some)


@pytest.mark.combination("DDP, 2, then 4 processes, then 1, by torch.save", "exact")
@pytest.mark.parametrize("form", FORMS)
def test_elastic(four, form):
    state, *_ = results(four, f"elastic {form}")
    one = one_process(mlp, 4, 20, rows=8, form=form)
    assert distance(state, one, "P ") <= 1e-15 and distance(state, one, "W ") <= 1e-15


@pytest.mark.parametrize("form", LONG)
def test_a_long_run_is_that_of_one_process(two, form):
    ranks = results(two, f"long {form}")
    assert len(set(ranks)) == 1
    assert ranks[0] == pytest.approx(cases.long(0, 1, {"form": form}), rel=1e-5)


@pytest.mark.combination("DDP, shard_matrices=True, saved and loaded", "exact, to the bit")
@pytest.mark.parametrize("number", range(len(SHARED)))
def test_sharded_matrices_are_the_replicated_ones_to_the_bit(two, number):
    ranks = results(two, f"shared {number}")
    (state, whole, everything), _ = results(two, f"replicated {number}")
    for weights, gathered, held, (on, again) in ranks:
        assert all(torch.equal(w, state[k]) for k, w in weights.items()) and len(weights) > 3
        assert not spread([on, again])
        assert gathered["state"].keys() == whole["state"].keys() and 0 < held < everything
        for number, entries in whole["state"].items():
            got = gathered["state"][number]
            assert got.keys() == entries.keys()
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(got[k])) for k, v in entries.items()
            )
    assert sum(held for _, _, held, _ in ranks) == everything


def test_the_largest_matrices_are_given_out_first():
    weights, sharing = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)], Sharing()
    sharing.enter(None, 0, 2)
    sharing.assign(dict(zip(weights, (1, 1, 2))))
    assert [sharing.owner(w) for w in weights] == [1, 1, 0]


def test_a_gradient_of_another_owner_voids_the_step(two):
    assert all(results(two, "shared refuses"))


@pytest.mark.combination("DDP, pruned by RLSPruner, wrapped again", "ranks alike")
def test_pruned_ranks_go_on_alike(two):
    assert not spread(results(two, "pruned"))


@pytest.mark.combination("pruning with shard_matrices", "refused")
def test_pruning_with_sharded_matrices_is_refused(two):
    for text, unchanged in results(two, "pruned, shared"):
        assert unchanged and "every layer whole on every process, which shard_matrices" in text


def test_the_table_is_that_of_the_tests(documented, request):
    folder = request.path.parent
    rows = rows_of(item for item in request.session.items if item.path.parent == folder)
    for name, outcome, test in rows:
        assert (name, outcome, f"`{test}`") in documented
    files = {path.name for path in folder.glob("test_*.py")}
    if {item.path.name for item in request.session.items} >= files:  # all were collected
        assert len(documented) == len(rows)
