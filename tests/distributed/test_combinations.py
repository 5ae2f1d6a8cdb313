"""Several processes with what people combine: as one process, or refused clearly."""

import pytest
from distributed.cases import combinations as cases
from distributed.cases import faults, pipelines
from distributed.launch import case, launch_once, results
from distributed.training import same, spread

BOTH = ["ddp", "fsdp"]
VARIANTS = [
    ("plain", "ddp", {"gradient_as_bucket_view": True}, {}),
    ("plain", "ddp", {"static_graph": True}, {}),
    ("plain", "ddp", {"find_unused_parameters": True}, {}),
    ("plain", "ddp of compiled", {}, {}),
    ("plain", "compiled ddp", {}, {}),
    ("plain", "root", {}, {}),
    ("plain", "fsdp", {"reshard_after_forward": False}, {}),
    ("heads", "fsdp", {}, {"form": "paper", "summary": "sketch", "rank": 4}),
    ("sometimes", "ddp", {"find_unused_parameters": True}, {}),
    ("tied", "ddp", {}, {}),
    *((name, wrap, {}, {}) for name in cases.MODELS for wrap in BOTH if name != "tied")
]  # fmt: skip
VARIANTS.remove(("sometimes", "ddp", {}, {}))  # torch asks for find_unused_parameters
GROUPS = [("heads", wrap, {}, {}, True) for wrap in BOTH]
SHARDED = ["heads", "attention", "gru", "tied"]
MASKS = [
    (wrap, {"summary": kind, "rank": r})
    for wrap in BOTH
    for kind, r in (("mean", 1), ("sketch", 4), ("sample", 4))
]
SCHEDULES = [
    *((schedule, "sketch") for schedule in (*pipelines.ONE_STAGE, *pipelines.TWO_STAGES)),
    ("ScheduleInterleavedZeroBubble", "sample"),
]
PIPELINES = [
    (schedule, {"summary": kind, "rank": 4, "form": "adaptive"}) for schedule, kind in SCHEDULES
]

TWO = {
    **{f"one {i}": case(cases.as_one, *one) for i, one in enumerate(VARIANTS + GROUPS)},
    **{
        f"sharded {name}": case(cases.as_one, name, "ddp", {}, {"shard_matrices": True})
        for name in SHARDED
    },
    **{f"masked {i}": case(cases.masked, *one) for i, one in enumerate(MASKS)},
    **{f"bfloat16 {wrap}": case(cases.low_precision, wrap, False) for wrap in BOTH},
    "bfloat16 policy": case(cases.low_precision, "fsdp", True),
    **{f"scaled {wrap}": case(cases.scaled, wrap) for wrap in BOTH},
    "replicas": case(cases.replicated, False),
    "replicas over fsdp": case(cases.replicated, True),
    "shards refused": cases.shards_refused,
    "averaged": case(cases.averaged, None),
    "two optimizers": case(cases.two_models, False),
    "one optimizer": case(cases.two_models, True),
    "local sgd": cases.local_sgd,
    "accelerated": cases.accelerated,
    "lasting": faults.lasting,
    **{f"transformer {kind}": case(cases.transformer, kind) for kind in ("llama", "bert")},
    **{f"pipeline {i}": case(pipelines.pipeline, *one) for i, one in enumerate(PIPELINES)},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    some = dict(TWO)
    for wrap in BOTH:
        for later in (False, True):
            folder = str(tmp_path_factory.mktemp("checkpoint"))
            some[f"saved {wrap} {later}"] = case(faults.saved, wrap, folder, later)
            for ranks in ([0, 1], [0]):
                some[f"loaded {wrap} {later} {len(ranks)}"] = case(
                    faults.loaded, wrap, folder, ranks
                )
        folder = str(tmp_path_factory.mktemp("another"))
        some[f"another {wrap}"] = case(faults.of_another, wrap, folder)
    return launch_once(tmp_path_factory, "combinations two", 2, some)


@pytest.mark.combination(
    "DDP: bucket views, static graph, unused parameters, a compiled model, compiled",
    "exact",
)
@pytest.mark.combination(
    "DDP and FSDP2: checkpointing, attention, LSTM, frozen or resting layers, forms",
    "exact",
)
@pytest.mark.combination(
    "GRU under DDP and FSDP2; tied weights under DDP",
    "exact",
)
@pytest.mark.combination(
    "FSDP2: root alone, reshard_after_forward=False",
    "exact",
)
@pytest.mark.parametrize("number", range(len(VARIANTS + GROUPS)))
def test_wrappers_and_models_are_one_process(two, number):
    name, *_ = (VARIANTS + GROUPS)[number]
    same(results(two, f"one {number}"), 4e-15 if name == "gru" else 1e-15)


@pytest.mark.combination(
    "shard_matrices: attention, GRU, tied weights",
    "exact",
)
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_matrices_of_layers_that_share_inputs(two, name):
    ranks = results(two, f"sharded {name}")
    for state, one in ranks:
        assert distance_of_common(state, one) <= 4e-15
    assert not spread([{k: v for k, v in s.items() if k[:2] == "W "} for s, _ in ranks])


def distance_of_common(state, one):
    assert state.keys() <= one.keys()
    return max(float((v - one[k]).abs().max()) for k, v in state.items() if k[:2] in ("P ", "W "))


@pytest.mark.combination(
    "optimizer.mask with other padding on each rank",
    "exact for mean of one row; else ranks alike",
)
@pytest.mark.parametrize("number", range(len(MASKS)))
def test_padding_of_other_lengths_on_each_rank(two, number):
    ranks = results(two, f"masked {number}")
    if MASKS[number][1]["summary"] == "mean":
        same(ranks)
    assert not spread([state for state, _ in ranks])


@pytest.mark.combination(
    "bfloat16: autocast, MixedPrecisionPolicy",
    "ranks alike, one process to its precision",
)
@pytest.mark.parametrize("name", [*(f"bfloat16 {wrap}" for wrap in BOTH), "bfloat16 policy"])
def test_low_precision_leaves_no_spread(two, name):
    ranks = results(two, name)
    same([(state, one) for state, one, _ in ranks], 1e-3)
    assert all(counts == [(5, 0)] * 4 for *_, counts in ranks)


@pytest.mark.combination(
    "GradScaler, an overflow on one rank",
    "all ranks skip",
)
@pytest.mark.parametrize("wrap", BOTH)
def test_all_ranks_skip_what_a_scaler_skips(two, wrap):
    ranks = results(two, f"scaled {wrap}")
    assert not spread([state for state, _ in ranks])
    assert all(counts == [1, 2, 2, 3, 4, 5] for _, counts in ranks)


@pytest.mark.combination(
    "composable replicate, also over FSDP2; gradients averaged by hand",
    "exact",
)
@pytest.mark.parametrize("name", ["replicas", "replicas over fsdp", "averaged"])
def test_other_ways_to_replicate(two, name):
    same(results(two, name))


@pytest.mark.combination(
    "two DDP models, of two optimizers or of one",
    "exact",
)
@pytest.mark.parametrize("name", ["two optimizers", "one optimizer"])
def test_two_models_of_one_process(two, name):
    same(results(two, name))


@pytest.mark.combination(
    "PostLocalSGDOptimizer",
    "P alike, moments not",
)
def test_weights_that_are_averaged_now_and_then(two):
    first, second = results(two, "local sgd")
    assert {name.split()[0] for name in spread([first, second])} <= {
        "momentum_buffer", "exp_avg", "exp_avg_sq"
    }  # fmt: skip


@pytest.mark.combination(
    "FSDP2 with shard_matrices",
    "refused",
)
def test_sharded_weights_and_matrices_are_refused(two):
    for message, unchanged in results(two, "shards refused"):
        assert "shard_matrices is for replicated weights" in message and unchanged


@pytest.mark.combination(
    "parameters switched by accelerate to those of FSDP2",
    "exact from the second step on",
)
def test_the_switch_of_parameters_by_accelerate(two):
    ranks = results(two, "accelerated")
    assert not spread([state for state, *_ in ranks])
    for _, moved, counts in ranks:  # the first step goes by gradients alone
        assert moved and counts == [(5, 1)] * 3
    assert not any("process_group" in text for own in two["accelerated"][1] for text in own)


@pytest.mark.combination(
    "FSDP2 by block: Llama and BERT of transformers",
    "exact",
)
@pytest.mark.parametrize("kind, layers", [("llama", 15), ("bert", 14)])
def test_transformers_by_block_are_one_process(two, kind, layers):
    ranks = results(two, f"transformer {kind}")
    same([(state, one) for state, _, one, _ in ranks], 4e-15)
    assert all((mine, theirs) == (layers, layers) for _, mine, _, theirs in ranks)


@pytest.mark.combination(
    "pipelines: GPipe, 1F1B, interleaved, zero-bubble",
    "exact with a seed a stage",
)
@pytest.mark.parametrize("number", range(len(PIPELINES)))
def test_every_schedule_draws_once_for_each_part_of_a_minibatch(two, number):
    schedule, options = PIPELINES[number]
    one = pipelines.in_turn(2 if schedule in pipelines.ONE_STAGE else 4, options)
    for state, counts, draws in results(two, f"pipeline {number}"):
        assert distance_of_common(state, one) <= 1e-15
        assert counts == [(3, 0)] * 4
        assert len(draws) == len(set(draws)) == 3 * 4 * pipelines.MICRO


@pytest.mark.combination(
    "distributed checkpoints of flat names, async_save; from 2 processes to 2 and 1",
    "exact, to the bit on 2",
)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("wrap", BOTH)
def test_flat_checkpoints_go_on(two, wrap, later):
    ranks = results(two, f"saved {wrap} {later}")
    states = [state for state, _ in ranks]
    assert ranks[0][1] == ranks[1][1] and "state.0.weight.P" in ranks[0][1]
    assert not spread([*states, *results(two, f"loaded {wrap} {later} 2")])
    same([(states[0], results(two, f"loaded {wrap} {later} 1")[0])])
    for name in (f"saved {wrap} {later}", f"loaded {wrap} {later} 2"):
        assert not any("process_group" in text for own in two[name][1] for text in own)


@pytest.mark.combination(
    "a distributed checkpoint of another model",
    "refused, nothing changed",
)
@pytest.mark.parametrize("wrap", BOTH)
def test_checkpoints_of_another_model_are_refused(two, wrap):
    for outcomes in results(two, f"another {wrap}"):
        messages = [message for message, _ in outcomes]
        assert "no error" not in messages and "must be [7, 9], got [6, 9]" in messages[3]
        assert not any(changed for _, changed in outcomes)


@pytest.mark.combination(
    "a rank killed before step()",
    "an error on the others, nothing changed",
)
def test_a_step_without_the_others_ends_and_changes_nothing(tmp_path):
    found = faults.killed(str(tmp_path))
    assert found.keys() == {"ddp", "fsdp", "mean", "shards"}
    for message, seconds, changed in found.values():
        assert "gloo" in message and seconds < 20 and not changed


def test_steps_keep_nothing(two):
    for first, second in results(two, "lasting"):
        assert first == second
