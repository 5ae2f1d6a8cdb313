"""Weights whose rows lie on several processes train as in one, or are refused clearly."""

import pytest
from distributed.cases import combinations
from distributed.cases import shards as cases
from distributed.launch import case, launch_once, results
from distributed.training import distance, mlp, one_process, same, spread

FORMS = ["spectral", "adaptive", "paper", "natural"]
FSDP = [(make, {"form": form}) for make in (mlp, cases.wide, cases.conv) for form in FORMS] + [
    (cases.wide, {"form": "paper", "momentum": 0.5}),
    (cases.wide, {"form": "paper", "forgetting": 0.9}),
    *((cases.wide, {"form": form, "gain": 0.25, "interval": 3}) for form in FORMS[:2]),
]
HSDP = [(cases.wide, {"form": "spectral"}), (mlp, {"form": "natural"})]
FLAT = "its weight is a part of a flat one, of FullyShardedDataParallel: use fully_shard"

TWO = {
    **{f"fsdp {i}": case(cases.fsdp, make, (2,), o) for i, (make, o) in enumerate(FSDP)},
    **{f"columns {form}": case(cases.tensor_parallel, {"form": form}) for form in FORMS},
    "rows": cases.row_wise,
    "flat": case(cases.flat, False),
    "flat, original": case(cases.flat, True),
    "accumulates": cases.fsdp_accumulates,
    "nan": cases.fsdp_refuses,
    "made first": cases.made_first,
}
FOUR = {
    **{f"fsdp {i}": case(cases.fsdp, make, (4,), o) for i, (make, o) in enumerate(FSDP)},
    **{f"hsdp {i}": case(cases.fsdp, make, (2, 2), o) for i, (make, o) in enumerate(HSDP)},
    "both, columns": case(combinations.two_dimensions, False),
    "both, rows": case(combinations.two_dimensions, True),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    some = dict(TWO)
    for kind in ("ddp", "fsdp"):
        folder = str(tmp_path_factory.mktemp(kind))
        some[f"saved {kind}"] = case(cases.saved, folder, kind)
        some[f"loaded {kind} 2"] = case(cases.loaded, folder, kind, [0, 1], 1)
        if kind == "ddp":
            some["loaded ddp 1"] = case(cases.loaded, folder, "ddp", [0], 2)
    return launch_once(tmp_path_factory, "shards two", 2, some)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch_once(tmp_path_factory, "shards four", 4, FOUR)


@pytest.mark.combination(
    "FSDP2, 2 and 4 processes, even, uneven and empty shards, every form", "exact"
)
@pytest.mark.parametrize("size", ["two", "four"])
@pytest.mark.parametrize("number", range(len(FSDP)))
def test_rows_on_several_processes_are_one_process(number, size, request):
    ranks = results(request.getfixturevalue(size), f"fsdp {number}")
    check(ranks, *FSDP[number])


@pytest.mark.combination("HSDP, 2 x 2 processes", "exact")
@pytest.mark.parametrize("number", range(len(HSDP)))
def test_copies_of_shards_are_one_process(number, four):
    check(results(four, f"hsdp {number}"), *HSDP[number])


def check(ranks, make, options):
    one = one_process(make, len(ranks), 10, **options)
    states = [state for state, *_ in ranks]
    assert not spread(states)
    assert distance(states[0], one, "P ") <= 4e-15 and distance(states[0], one, "W ") <= 4e-15
    updates = 6 if "interval" in options else 10
    for _, statuses, health in ranks:
        assert set(statuses) == {"exact"}, statuses
        assert all((h.updates, h.missing) == (updates, 0) for h in health.values())


@pytest.mark.combination("column-wise tensor parallel", "exact")
@pytest.mark.parametrize("form", FORMS)
def test_column_wise_tensor_parallel_is_one_process(two, form):
    one = one_process(cases.wide, 1, 10, form=form)
    ranks = results(two, f"columns {form}")
    assert not spread([state for state, _ in ranks])
    state, statuses = ranks[0]
    assert statuses == ["exact"] * 3
    assert distance(state, one, "P ") <= 2e-15 and distance(state, one, "W ") <= 1e-15


@pytest.mark.combination("row-wise tensor parallel", "refused: the fallback rule trains the layer")
def test_row_wise_tensor_parallel_is_refused(two):
    for first, second in results(two, "rows"):
        assert first == ("exact", "")
        assert second[0] == "fallback" and "only whole rows, Shard(0), can be moved" in second[1]


@pytest.mark.combination(
    "FSDP2 with tensor parallel", "refused where sharded twice, the other layers exact"
)
@pytest.mark.parametrize("name, refused", [("columns", ["0", "3"]), ("rows", ["0", "2", "3"])])
def test_shards_of_tensor_parallel_weights_are_refused(four, name, refused):
    ranks = results(four, f"both, {name}")
    same([(state, one) for state, one, _ in ranks])
    for *_, rows in ranks:
        assert [layer for layer, (status, _) in rows.items() if status != "exact"] == refused
        assert rows["0"][1] == "its weight is sharded over two dimensions of its mesh"


@pytest.mark.combination(
    "FullyShardedDataParallel (FSDP1)", "refused: the fallback rule trains all"
)
@pytest.mark.parametrize("name", ["flat", "flat, original"])
def test_flat_parameters_are_refused(two, name):
    for rows in results(two, name):
        assert rows and all(row == ("fallback", FLAT) for row in rows)


@pytest.mark.combination("FSDP2, accumulation without synchronisation", "exact")
def test_minibatches_that_are_not_synchronised_count(two):
    ranks = results(two, "accumulates")
    one = one_process(mlp, 2, 4, micro=3)
    assert not spread(ranks)
    assert distance(ranks[0], one, "P ") <= 4e-15 and distance(ranks[0], one, "W ") <= 4e-15


@pytest.mark.combination("FSDP2, an input of one rank not finite", "the step is void on all ranks")
def test_all_ranks_refuse_what_is_not_finite_on_one(two):
    for moved, refused in results(two, "nan"):
        assert moved == 0 and refused == [1, 1]


@pytest.mark.combination(
    "optimizer made before fully_shard, parameters switched (accelerate)",
    "exact from the second step on",
)
def test_an_optimizer_made_before_the_model_is_sharded(two):
    for moved, statuses, health in results(two, "made first"):
        assert min(moved) > 0 and statuses == ["exact", "exact"]
        assert all(h.updates >= 9 for h in health.values())


@pytest.mark.combination(
    "torch.distributed.checkpoint under DDP and FSDP2",
    "exact, to the bit; DDP also at another number of processes",
)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_distributed_checkpoint_goes_on_to_the_bit(two, kind):
    ranks = results(two, f"saved {kind}")
    assert not spread([*ranks, *results(two, f"loaded {kind} 2")])
    if kind == "ddp":
        alone, _ = results(two, "loaded ddp 1")
        assert distance(alone, ranks[0], "P ") <= 1e-15
        assert distance(alone, ranks[0], "W ") <= 1e-15
