"""What is easily forgotten of training under DDP: each here once went wrong."""

import pytest
from distributed.cases import corners as cases
from distributed.launch import case, launch_once, results
from distributed.training import distance, mlp, one_process, spread

KINDS = ["mean", "sketch", "sample"]
TWO = {
    **{f"mates {kind}": case(cases.mates, kind) for kind in KINDS},
    "checkpointed": cases.checkpointed,
    "columns": cases.columns,
    "one row": cases.one_row,
    "two types": cases.two_types,
    "let go": cases.let_go,
    "shards join": cases.shards_join,
    "of another": cases.of_another,
    "shards refused": cases.shards_refused,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch_once(tmp_path_factory, "corners two", 2, TWO)


@pytest.mark.combination(
    "layers of one input on one rank, not on another",
    "ranks alike: each layer has its own P",
)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input_on_one_rank_and_not_on_another(two, kind):
    assert not spread(results(two, f"mates {kind}"))


def test_a_checkpointed_network_is_called_by_ddp_too(two):
    ranks = results(two, "checkpointed")
    one = one_process(mlp, 2, 4)
    assert not spread(ranks)
    assert distance(ranks[0], one, "P ") <= 4e-15 and distance(ranks[0], one, "W ") <= 4e-15
    assert not any("process_group" in text for texts in two["checkpointed"][1] for text in texts)


def test_tensor_parallel_processes_are_not_apart(two):
    assert all(results(two, "columns"))
    assert not any("process_group" in text for texts in two["columns"][1] for text in texts)


def test_a_gradient_of_a_row_elsewhere_voids_the_step(two):
    assert all(moved == [] for moved in results(two, "one row"))


def test_layers_of_two_types_are_agreed_on_once(two):
    ranks = results(two, "two types")
    assert not spread([state for _, state in ranks])
    for counts, _ in ranks:  # of each type draws and sums; first also what they are of, and when
        assert counts == [7, 4, 4, 4]


def test_a_ddp_module_is_not_kept(two):
    assert all(results(two, "let go"))


@pytest.mark.combination(
    "shard_matrices in Join",
    "refused",
)
def test_sharded_matrices_cannot_join(two):
    assert all(results(two, "shards join"))


@pytest.mark.combination(
    "reading the P of a layer on another rank",
    "refused",
)
def test_a_matrix_on_another_rank_is_not_made_up(two):
    (first, one), (second, other) = results(two, "of another")
    assert sorted(first + second) == ["0", "2"] and one and other


def test_a_first_step_that_is_refused_leaves_no_counts(two):
    assert all(left == ([], []) for left in results(two, "shards refused"))
