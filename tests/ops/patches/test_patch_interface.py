"""The patch ops as PyTorch citizens: schema checks, compilation, autograd, error messages."""

import pytest
import torch
from support.operators import row_mean, row_sample, row_sketch

from rlscuda.functional import patches as RF

X = torch.randn(3, 6, 8, 9, generator=torch.Generator().manual_seed(0))
ARGS = ([3, 3], [2, 1], [1, 1, 0, 2], [1, 1], 2, 0, True)


@pytest.mark.parametrize("x", [X, X.double(), X.bfloat16(), X[1:]], ids=range(4))
@pytest.mark.parametrize("name", ["patch_mean", "patch_sketch", "patch_sample"])
def test_opcheck(name, x):
    draw = () if name == "patch_mean" else (4, 17, 5)
    torch.library.opcheck(getattr(torch.ops.rlscuda, name).default, (x, *ARGS, *draw))


def test_compiles_without_a_graph_break():
    def summaries(x, rows):
        x = x * 2
        mean = RF.patch_mean(x, 3, padding="same", padding_mode="reflect")
        sketch = RF.patch_sketch(x, (3, 2), rank=2, seed=1)
        sample, keys = RF.patch_sample(x, 3, 2, 1, groups=2, rank=2, seed=1)
        linear = (
            row_mean(rows),
            row_sketch(rows, 2, 1),
            row_sample(rows, 2, 1)[0],
        )
        return mean + 1, sketch, sample, keys, *linear

    compiled = torch.compile(summaries, fullgraph=True, backend="aot_eager")
    rows = torch.randn(4, 5, 7)
    for x in (X, X[:2]):  # the second is a new batch size
        for a, b in zip(compiled(x, rows), summaries(x, rows), strict=True):
            torch.testing.assert_close(a, b)


def test_a_new_seed_does_not_compile_again():
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph

    def summaries(x, seed, offset):
        sketch = RF.patch_sketch(x, 3, rank=2, seed=seed, offset=offset)
        return sketch, *row_sample(x, 2, seed, offset=offset)

    compiled = torch.compile(summaries, fullgraph=True, backend=backend)
    for step in range(5):
        for a, b in zip(compiled(X, step + 7, 9 * step), summaries(X, step + 7, 9 * step),
                        strict=True):  # fmt: skip
            assert torch.equal(a, b)
    assert len(compilations) <= 2  # with the numbers as constants, then as symbols


def test_gradients_do_not_flow_into_the_summary():
    x = X.clone().requires_grad_()
    results = [
        RF.patch_mean(x, 3),
        RF.patch_sketch(x, 3, rank=1, seed=0),
        RF.patch_sample(x, 3, rank=1, seed=0)[0],
        row_mean(x),
    ]
    assert not any(r.requires_grad for r in results)


def test_input_is_left_alone():
    x = X.clone()
    RF.patch_mean(x, 3), RF.patch_sketch(x, 3, rank=1, seed=0)
    assert torch.equal(x, X)


def test_int_pair_and_keyword_forms_agree():
    expected = RF.patch_mean(X, (3, 3), (1, 1), (1, 1), (1, 1))
    assert torch.equal(RF.patch_mean(X, 3, padding=1), expected)
    assert torch.equal(RF.patch_mean(X, 3, padding="same"), expected)
    assert torch.equal(RF.patch_mean(X, [3, 3], padding=[1, 1, 1, 1]), expected)
    assert torch.equal(RF.patch_mean(X, 3, padding="valid"), RF.patch_mean(X, 3))


WRONG = [
    (TypeError, "float32, float64, bfloat16 or float16, got torch.int64", {"x": X.long()}),
    (ValueError, r"\[N, C, H, W\] or \[C, H, W\], got \[8, 9\]", {"x": X[0, 0]}),
    (ValueError, r"must not be empty, got \[0, 6, 8, 9\]", {"x": X[:0]}),
    (TypeError, "kernel_size must be an integer or a pair, got float", {"kernel_size": 3.0}),
    (ValueError, "kernel_size must be at least 1, got 0", {"kernel_size": 0}),
    (ValueError, r"must be one or two integers, got \(3, 3, 3\)", {"kernel_size": (3, 3, 3)}),
    (ValueError, "stride must be at least 1, got 0", {"stride": 0}),
    (ValueError, "dilation must be at least 1, got 0", {"dilation": 0}),
    (ValueError, "padding must be at least 0, got -1", {"padding": -1}),
    (ValueError, "padding must be at least 0, got -1", {"padding": (1, 1, -1, 0)}),
    (ValueError, "'same', 'valid' or integers, got 'full'", {"padding": "full"}),
    (ValueError, "padding='same' needs stride 1", {"padding": "same", "stride": 2}),
    (ValueError, "one of zeros, reflect, replicate, circular, got 'w'", {"padding_mode": "w"}),
    (ValueError, "groups must divide the 6 channels of x, got 4", {"groups": 4}),
    (ValueError, "groups must divide the 6 channels of x, got 0", {"groups": 0}),
    (ValueError, "reflect padding must be less than 8, got 8",
     {"padding": (8, 1), "padding_mode": "reflect"}),
    (ValueError, "circular padding must be at most 9, got 10",
     {"padding": (1, 10), "padding_mode": "circular"}),
    (ValueError, "dilated kernel of 3 x 3 does not fit the padded input",
     {"dilation": 5, "padding": 1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "changed"), WRONG, ids=lambda v: str(v)[:40] if isinstance(v, str) else ""
)
def test_wrong_argument(error, message, changed):
    arguments = {"x": X, "kernel_size": 3, **changed}
    with pytest.raises(error, match=message):
        RF.patch_mean(**arguments)
    with pytest.raises(error, match=message):
        RF.patch_sketch(**arguments, rank=1, seed=0)
    with pytest.raises(error, match=message):
        RF.patch_sample(**arguments, rank=1, seed=0)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"offset": -1}, "offset must be at least 0"),
    ],
)
def test_wrong_draw(draw, message):
    for f in (RF.patch_sketch, RF.patch_sample):
        with pytest.raises(ValueError, match=message):
            f(X, 3, **{"rank": 2, "seed": 0, **draw})


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, X[0], r"x must be \[N, C, H, W\], got \[6, 8, 9\]"),
        (0, X[:0], r"x must not be empty, got \[0, 6, 8, 9\]"),
        (0, X.long(), "x must be float32, float64, bfloat16 or float16"),
        (1, [3], "kernel_size must have 2 integers, got 1"),
        (1, [3, 0], "kernel_size must be at least 1, got 0"),
        (2, [0, 1], "stride must be at least 1, got 0"),
        (3, [1, 1], "padding must have 4 integers, got 2"),
        (4, [1, 0], "dilation must be at least 1, got 0"),
        (1, [12, 3], "a dilated kernel of 12 x 3 does not fit the padded input of x"),
        (5, 4, "groups must divide the 6 channels of x, got 4"),
        (6, 4, "padding_mode must be 0 .zeros., 1 .reflect., 2 .replicate. or 3 .circular., got 4"),
    ],
)
def test_the_ops_themselves_refuse(position, value, message):
    arguments = [X, *ARGS]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlscuda.patch_mean(*arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rlscuda.patch_sample(*arguments, 1, 0, 0)


def test_the_random_ops_refuse_a_wrong_draw():
    with pytest.raises(RuntimeError, match="rank must be at least 1, got 0"):
        torch.ops.rlscuda.patch_sketch(X, *ARGS, 0, 0, 0)
    with pytest.raises(RuntimeError, match="offset must be at least 0, got -1"):
        torch.ops.rlscuda.patch_sample(X, *ARGS, 1, 0, -1)
