"""What a call of a recurrent module shows: `P` is that of rows formed by hand, step by step."""

import pytest
import torch
from support.compare import assert_close
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from rlscuda import RLSOptimizer, reference
from rlscuda.optim.kinds.recurrent import hides, input_of, weights_of

LENGTHS = [3, 5, 2]  # of three sequences of up to five steps
VALID = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
EXACT = {"form": "natural", "summary": "mean", "rank": 1, "gain": 0.5, "forgetting": 0.9,
         "ridge": 0, "fallback": "sgd"}  # fmt: skip
HIDDEN = "its input stays inside of the module"


def made(kind, **options):
    torch.manual_seed(0)
    return kind(3, 4, **{"batch_first": True, **options}).double()


def one_step(module, weight_ih, x, h, c):
    """The next state (h, c) of one sequence, by the equations in the documentation of `module`."""
    end = weight_ih.removeprefix("weight_ih")
    W = {k: getattr(module, k + end, None) for k in ("weight_ih", "weight_hh", "weight_hr")}
    b = [getattr(module, k + end, 0.0) if module.bias else 0.0 for k in ("bias_ih", "bias_hh")]
    given, kept = W["weight_ih"] @ x + b[0], W["weight_hh"] @ h + b[1]
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        i, f, g, o = (given + kept).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if W["weight_hr"] is None else W["weight_hr"] @ h), c
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        (r, z, n), (kept_r, kept_z, kept_n) = given.chunk(3), kept.chunk(3)
        r, z = (r + kept_r).sigmoid(), (z + kept_z).sigmoid()
        return (1 - z) * (n + r * kept_n).tanh() + z * h, c
    return getattr(torch, module.nonlinearity)(given + kept), c


@torch.no_grad()
def rows_by_hand(module, sequences, start):
    """Weight -> its input at every step of every sequence [T, n], a list of [T, n] tensors.

    `start` is (h, c) of all layers and directions [D * L, N, h].
    """
    seen = {}
    for number, x in enumerate(sequences):
        for layer in range(module.num_layers):
            outputs = []
            for way in range(1 + module.bidirectional):
                end = f"_l{layer}" + "_reverse" * way
                h, c = (s[layer * (1 + module.bidirectional) + way, number] for s in start)
                before, after = [], []
                for row in x.flip(0) if way else x:
                    before.append(h)
                    h, c = one_step(module, "weight_ih" + end, row, h, c)
                    after.append(h)
                before, after = (torch.stack(s[::-1] if way else s) for s in (before, after))
                seen.setdefault("weight_ih" + end, []).append(x)
                seen.setdefault("weight_hh" + end, []).append(before)
                outputs.append(after)
            x = torch.cat(outputs, 1)
    return seen


def assert_rows(optimizer, seen, *calls, steps=1):
    """That every covered weight's `P` has taken in the mean of its rows, once a step."""
    for row in optimizer.coverage():
        if row.status != "exact":
            continue
        S = torch.cat([part for rows in (seen, *calls) for part in rows[row.name]])
        if row.fan_in > S.shape[1]:
            S = torch.cat((S, torch.ones(len(S), 1).double()), 1)
        P = torch.eye(row.fan_in).double()
        for _ in range(steps):
            P, _, _ = reference.rls_update(P, S.mean(0, keepdim=True), 0.9, 0.5)
        assert_close(optimizer.inverse_autocorrelation(row.name), P)


KINDS = [
    (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu", "bias": False}), (nn.GRU, {}), (nn.LSTM, {}),
    (nn.GRU, {"bidirectional": True}), (nn.LSTM, {"bidirectional": True, "bias": False}),
    (nn.RNN, {"num_layers": 2}), (nn.LSTM, {"num_layers": 3, "bidirectional": True}),
    (nn.LSTM, {"proj_size": 2}), (nn.LSTM, {"proj_size": 2, "bidirectional": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
]  # fmt: skip
WAYS = ["batch first", "time first", "unbatched", "packed", "sorted", "masked"]


def start_of(module, given, batch=3):
    """(h, c) of all layers and directions, zeros where none are given."""
    lead = module.num_layers * (1 + module.bidirectional), batch
    widths = (getattr(module, "proj_size", 0) or 4, 4)
    return [(torch.randn if given else torch.zeros)(*lead, w, dtype=torch.double) for w in widths]


def called(module, x, start, given, way):
    """The outputs of a call as a list of tensors, h_n first; and the sequences it has seen."""
    lengths = torch.tensor(sorted(LENGTHS, reverse=True) if way == "sorted" else LENGTHS)
    sequences = list(x)
    if way == "unbatched":
        x, start, sequences = x[0], [s[:, 0] for s in start], [x[0]]
    elif way == "time first":
        x = x.transpose(0, 1)
    elif way in ("packed", "sorted"):
        sequences = [row[:length] for row, length in zip(x, lengths)]
        x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=way == "sorted")
    hx = start if isinstance(module, nn.LSTM) else start[0]
    output, last = module(x, tuple(hx) if isinstance(hx, list) else hx) if given else module(x)
    last = list(last) if isinstance(last, tuple) else [last]
    return [*last, output if isinstance(output, torch.Tensor) else output.data], sequences


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("number", range(len(KINDS)))
def test_matrices_are_those_of_rows_by_hand(number, given, way):
    kind, options = KINDS[number]
    module = made(kind, **options, batch_first=way != "time first")
    optimizer = RLSOptimizer(module, **EXACT)
    x, start = torch.randn(3, 5, 3).double(), start_of(module, given)
    if way == "masked":
        with optimizer.mask(VALID):
            outputs, sequences = called(module, x, start, given, way)
    else:
        outputs, sequences = called(module, x, start, given, way)
    seen = rows_by_hand(module, sequences, start)
    if way == "masked":
        seen = {w: [r[:n] for r, n in zip(rows, LENGTHS)] for w, rows in seen.items()}
    sum(t.square().sum() for t in outputs).backward()  # which come one after another
    assert all(stage.calls == 1 for stage in optimizer._registry.stages.values())
    optimizer.step()
    last = module.num_layers - 1
    exact = {r.name for r in optimizer.coverage() if r.status == "exact"}
    ends = ("", "_reverse")[: 1 + module.bidirectional]
    assert exact == {w + e for w in ("weight_ih_l0", f"weight_hh_l{last}") for e in ends}
    assert {r.why for r in optimizer.coverage() if r.status != "exact"} <= {HIDDEN}
    assert_rows(optimizer, seen)
    assert {h.missing for h in optimizer.health().values()} == {0}


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("which", [0, -1])
def test_a_gradient_of_one_output_is_enough(kind, which):
    module = made(kind, bidirectional=True)
    optimizer = RLSOptimizer(module, **EXACT)
    x, start = torch.randn(3, 5, 3).double(), start_of(module, False)
    outputs, sequences = called(module, x, start, False, "batch first")
    seen = rows_by_hand(module, sequences, start)
    outputs[which].sum().backward()
    optimizer.step()
    assert_rows(optimizer, seen)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_calls_of_one_step_are_together_and_those_without_gradient_not(kind):
    module = made(kind)
    optimizer = RLSOptimizer(module, **EXACT)
    start = start_of(module, False)
    x, y, z = torch.randn(3, 3, 5, 3).double()
    module.eval()  # which trains like training mode
    losses = [called(module, one, start, False, "batch first")[0][-1].sum() for one in (x, y, z)]
    with torch.no_grad():
        called(module, 9 * x, start, False, "batch first")
    assert all(stage.calls == 0 for stage in optimizer._registry.stages.values())
    (losses[0] + losses[2]).backward()
    calls = [rows_by_hand(module, one, start) for one in (x, z)]
    optimizer.step()
    assert_rows(optimizer, *calls)


CELLS = [(nn.RNN, nn.RNNCell), (nn.GRU, nn.GRUCell), (nn.LSTM, nn.LSTMCell)]


@pytest.mark.parametrize("whole, kind", CELLS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_an_unrolled_cell_has_the_matrices_of_the_whole(whole, kind, given, batched):
    module = made(whole)
    cell = kind(3, 4).double()
    for p, q in zip(cell.parameters(), module.parameters()):
        p.data = q.detach().clone()
    optimizer, other = RLSOptimizer(module, **EXACT), RLSOptimizer(cell, **EXACT)
    x, start = torch.randn(3, 5, 3).double(), [s[0] for s in start_of(module, given)]
    if not batched:
        x, start = x[0], [s[0] for s in start]
    state = tuple(start) if whole is nn.LSTM else start[0]
    hx = tuple(s[None] for s in start) if whole is nn.LSTM else start[0][None]
    output = module(x, hx)[0] if given else module(x)[0]
    output.square().sum().backward()
    loss, state = 0, state if given else None
    for row in x.unbind(-2):
        state = cell(row, hx=state)
        loss = loss + (state[0] if whole is nn.LSTM else state).square().sum()
    loss.backward()
    optimizer.step(), other.step()
    for name in ("weight_ih", "weight_hh"):
        P = optimizer.inverse_autocorrelation(f"{name}_l0")
        assert_close(other.inverse_autocorrelation(name), P)
        assert_close(getattr(cell, name), getattr(module, f"{name}_l0"))


@pytest.mark.parametrize("bias", [True, False])
def test_tied_weights_see_the_rows_of_all(bias):
    first, second = made(nn.RNN), made(nn.RNN)
    names = [n for n, _ in first.named_parameters() if bias or "bias" not in n]
    for name in names:
        setattr(second, name, getattr(first, name))
    optimizer = RLSOptimizer(nn.ModuleList([first, second]), **EXACT)
    start, x, y = start_of(first, False), *torch.randn(2, 3, 5, 3).double()
    calls = [rows_by_hand(m, one, start) for m, one in ((first, x), (second, y))]
    (first(x)[0].sum() + second(y)[0].sum()).backward()
    optimizer.step()
    S = torch.cat([part for rows in calls for part in rows["weight_hh_l0"]])
    S = torch.cat((S, torch.ones(len(S), 1).double()), 1) if bias else S
    P, _, _ = reference.rls_update(torch.eye(S.shape[1]).double(), S.mean(0)[None], 0.9, 0.5)
    for name in ("0.weight_hh_l0", "1.weight_hh_l0"):
        assert_close(optimizer.inverse_autocorrelation(name), P)


@pytest.mark.parametrize("number", [2, 4, 7, 9, 10])
@pytest.mark.parametrize("way", ["batch first", "time first", "unbatched"])
def test_every_row_has_its_place(number, way):
    kind, options = KINDS[number]
    module = made(kind, **options, batch_first=way != "time first")
    x, start = torch.randn(3, 5, 3).double(), start_of(module, True)
    hx = start if way != "unbatched" else [s[:, 0] for s in start]
    hx = tuple(hx) if kind is nn.LSTM else hx[0]
    given = {"batch first": x, "time first": x.transpose(0, 1), "unbatched": x[0]}[way]
    output = module(given, hx)
    seen = rows_by_hand(module, x, start)
    for weight in (w for w in weights_of(module) if not hides(module, w)):
        rows = input_of(module, weight, (given,), {"hx": hx}, output)
        assert rows.shape[:-1] == given.shape[:-1] and not rows.requires_grad
        by_hand = torch.stack(seen[weight])
        by_hand = {"time first": by_hand.transpose(0, 1), "unbatched": by_hand[0]}.get(way, by_hand)
        torch.testing.assert_close(rows, by_hand, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("number", [4, 7])
def test_every_packed_row_is_there_once(number):
    kind, options = KINDS[number]
    module, x = made(kind, **options), torch.randn(3, 5, 3).double()
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    start = start_of(module, True)
    hx = tuple(start) if kind is nn.LSTM else start[0]
    output = module(packed, hx)
    seen = rows_by_hand(module, [row[:n] for row, n in zip(x, LENGTHS)], start)
    for weight in (w for w in weights_of(module) if not hides(module, w)):
        rows = input_of(module, weight, (packed, hx), {}, output)
        by_hand = torch.cat(seen[weight])
        assert rows.shape == by_hand.shape
        assert_close(*(r[r[:, 0].argsort()].detach() for r in (rows, by_hand)))
