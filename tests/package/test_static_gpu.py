"""What is read off machine code, and what is predicted from it: on excerpts and by hand."""

from pathlib import Path

import pytest

from benchmarks.static_gpu import expectation, work
from benchmarks.static_gpu.devices import A100, H200
from benchmarks.static_gpu.launches import Call, Launch
from benchmarks.static_gpu.machine_code import streams, tools
from benchmarks.static_gpu.machine_code.loops import in_flight, loops, main_loop
from benchmarks.static_gpu.machine_code.sass import parse
from benchmarks.static_gpu.model import LAUNCH, OF_A_WARP, SHARE, Demand, predict
from benchmarks.static_gpu.report import report
from benchmarks.static_gpu.rows import findings

EXCERPTS = Path(__file__).with_name("sass")

NESTED = """
\t.section\t.text.nested,"ax",@progbits
        /*0000*/                   LDG.E R1, [R2.64] ;
.L_outer:
        /*0010*/                   LDG.E R3, [R2.64] ;
.L_inner:
        /*0020*/                   LDG.E.64 R4, [R6.64] ;
        /*0030*/                   FFMA R8, R4, R5, R8 ;
        /*0040*/               @P0 BRA `(.L_inner) ;
        /*0050*/                   STG.E.128 [R6.64], R8 ;
        /*0060*/               @P1 BRA `(.L_outer) ;
        /*0070*/                   BRA.DIV ~URZ, `(.L_behind) ;
.L_back:
        /*0080*/                   EXIT ;
.L_behind:
        /*0090*/                   WARPSYNC.COLLECTIVE R9, `(.L_lanes) ;
.L_lanes:
        /*00a0*/                   SHFL.BFLY P0, R3, R3, 0x10, 0x1f ;
        /*00b0*/                   BRA `(.L_back) ;
.L_end:
        /*00c0*/                   BRA `(.L_end);
"""


def excerpt(name):
    (function,) = parse((EXCERPTS / f"{name}.txt").read_text())
    return function


def test_instructions_and_their_source_lines():
    function = excerpt("nonfinite.sm_80")
    assert function.name == "nonfinite_kernel"
    first = next(i for i in function.instructions if i.loads)
    assert (first.opcode, first.width, first.kind) == ("LDG.E.128.CONSTANT", 16, "LDG")
    names = [name for name, _ in first.source]
    assert names == ["sm_32_intrinsics.hpp", "vector.h", "nonfinite.cu", "nonfinite.cu"]
    assert first.written() == {4, 5, 6, 7}
    guarded = next(i for i in function.instructions if i.kind == "BRA")
    assert (guarded.predicate, guarded.target) == ("P1", ".L_x_7")
    assert sorted(function.labels) == sorted(f".L_x_{i}" for i in (3, 4, 5, 6, 7, 8))


@pytest.mark.parametrize(
    "text, width, loads, stores",
    [
        ("LDG.E.128.CONSTANT R4, [R2.64]", 16, True, False),
        ("LDG.E.64 R4, desc[UR4][R2.64+0x8]", 8, True, False),
        ("LDG.E.U16 R4, [R2.64]", 2, True, False),
        ("LDG.E.U8.CONSTANT R4, [R2.64]", 1, True, False),
        ("LDS.128 R4, [R2]", 16, False, False),
        ("STG.E desc[UR4][R2.64], R8", 4, False, True),
    ],
)
def test_accesses(text, width, loads, stores):
    listing = f"\t.section\t.text.f,\n        /*0010*/              @!P0 {text} ;\n"
    (only,) = parse(listing)[0].instructions
    assert (only.width, only.loads, only.stores) == (width, loads, stores)
    assert (only.predicate, only.address) == ("!P0", 16)


def test_registers_that_a_store_reads():
    (only,) = parse("\t.section\t.text.f,\n /*00*/ STG.E.64 [R2.64], R8 ;\n")[0].instructions
    assert only.read() == {2, 3, 8, 9}


def test_what_is_no_disassembly_is_refused():
    with pytest.raises(ValueError, match="expected a disassembly with a section"):
        parse("nvdisasm fatal")


def test_loops_are_nested_and_collectives_behind_the_end_are_none():
    (function,) = parse(NESTED)
    inner, outer = (loop for loop in loops(function) if len(loop.body) > 1)
    assert [function.instructions[p].address for p in inner.own] == [0x20, 0x30, 0x40]
    assert [function.instructions[p].address for p in outer.own] == [0x10, 0x50, 0x60]
    assert inner.body < outer.body
    assert len(loops(function)) == 2


def test_the_main_loop_reads_most():
    (function,) = parse(NESTED)
    main = main_loop(function, lambda i: True)
    assert main.looped
    assert (main.bytes, main.load_width, main.store_width) == (8, 8, None)
    narrow = main_loop(function, lambda i: i.address == 0x10)
    assert (narrow.bytes, narrow.load_width, narrow.store_width) == (4, 4, 16)
    straight = main_loop(function, lambda i: i.address == 0)
    assert not straight.looped
    products = main_loop(function, lambda i: True, products=True)
    assert [i.kind for i in products.loads] == ["FFMA"]
    with pytest.raises(LookupError, match="no load from global memory"):
        main_loop(function, lambda i: False)


def test_main_loops_of_real_kernels():
    wide = main_loop(excerpt("nonfinite.sm_80"), lambda i: True)
    assert (len(wide.loads), wide.load_width, wide.bytes, wide.in_flight) == (4, 16, 64, 64)
    assert len(wide.instructions) == 49
    narrow = main_loop(excerpt("patch_sketch_rows.sm_90"), lambda i: True)
    assert (len(narrow.loads), narrow.load_width, narrow.in_flight) == (1, 4, 4)
    assert len(narrow.instructions) == 12


def test_a_load_for_the_next_turn_is_in_flight_with_this_one():
    text = """
\t.section\t.text.f,
.L_1:
        /*0000*/                   LDG.E.128 R8, [R2.64] ;
        /*0010*/                   FADD R20, R4, R5 ;
        /*0020*/                   LDG.E.128 R4, [R2.64+0x10] ;
        /*0030*/                   FADD R21, R8, R9 ;
        /*0040*/               @P0 BRA `(.L_1) ;
"""
    (function,) = parse(text)
    loads = [i for i in function.instructions if i.loads]
    assert in_flight(function.instructions, loads, looped=True) == 32
    assert in_flight(function.instructions, loads[:1], looped=True) == 16


@pytest.mark.parametrize(
    "device, threads, registers, shared, blocks",
    [
        (H200, 1024, 32, 0, 2),  # threads: 2048
        (H200, 128, 168, 16896, 3),  # registers: 65536 / (128 * 168)
        (H200, 32, 16, 0, 32),  # blocks
        (H200, 256, 32, 56 << 10, 4),  # shared memory: 228 KiB, each block 1 KiB more
        (A100, 256, 32, 56 << 10, 2),  # of 164 KiB
        (A100, 256, 32, 163 << 10, 1),
        (H200, 96, 255, 0, 2),  # eight warps, two on each scheduler
    ],
)
def test_occupancy(device, threads, registers, shared, blocks):
    assert device.blocks_per_sm(threads, registers, shared) == blocks


def test_what_fits_on_no_sm_is_refused():
    with pytest.raises(ValueError, match="does not fit on sm_80: shared memory"):
        A100.blocks_per_sm(128, 32, 164 << 10)


def test_littles_law():
    assert H200.bytes_in_flight == pytest.approx(25_454, rel=1e-3)


def test_waves_and_tail():
    at_once = 4 * H200.sms
    demand = Demand(2 * at_once + 66, 128, 4, 1e9, 1e9, 64, 0)
    predicted = predict(demand, H200)
    assert predicted.waves == pytest.approx(2 + 66 / at_once)
    assert predicted.tail == pytest.approx(66 / at_once)
    assert predict(Demand(at_once, 128, 4, 1e9, 1e9, 64, 0), H200).tail == 1


def test_the_time_of_a_launch_that_memory_bounds():
    demand = Demand(8 * H200.sms, 256, 8, 4.8e9, 4.8e9, 64, 1e6)
    predicted = predict(demand, H200)
    assert predicted.bound == "memory"
    assert predicted.seconds == pytest.approx(1e-3 / SHARE)


def test_the_time_of_a_launch_with_little_in_flight():
    demand = Demand(8 * H200.sms, 256, 8, 4.8e9, 4.8e9, 4, 1e6)
    predicted = predict(demand, H200)
    flying = 8 * H200.sms * 256 * 4
    assert predicted.bound == "latency"
    assert predicted.seconds == pytest.approx(4.8e9 / flying * H200.latency)
    cached = Demand(*(getattr(demand, f) for f in list(demand.__dataclass_fields__)[:-1]), True)
    assert predict(cached, H200).seconds == pytest.approx(4.8e9 / flying * H200.cache_latency)


def test_the_time_of_a_launch_that_issue_bounds():
    demand = Demand(8 * H200.sms, 256, 8, 0, 0, 0, 1e9)
    predicted = predict(demand, H200)
    assert predicted.bound == "issue"
    assert predicted.seconds == pytest.approx(1e9 / (4 * H200.sms * H200.clock))
    few = predict(Demand(1, 32, 8, 0, 0, 0, 1e6), H200)
    assert few.seconds == pytest.approx(1e6 / (OF_A_WARP * H200.clock))


def test_the_time_of_a_launch_that_does_nothing():
    predicted = predict(Demand(1, 32, 8, 0, 0, 0, 1), H200)
    assert (predicted.seconds, predicted.bound) == (LAUNCH, "launch")


def test_round_trips_are_added():
    short = Demand(8 * H200.sms, 256, 8, 4.8e9, 4.8e9, 64, 1e6)
    long = Demand(8 * H200.sms, 256, 8, 4.8e9, 4.8e9, 64, 1e6, chain=10)
    more = predict(long, H200).seconds - predict(short, H200).seconds
    assert more == pytest.approx(10 * H200.cache_latency)


@pytest.mark.parametrize("name", streams.STREAMS)
def test_source_lines_of_streams_are_there_once(name):
    stream = streams.STREAMS[name]
    for file, text in stream.places:
        assert streams.line_of(file, text)[1] > 0
    if stream.through:
        assert streams.line_of(*stream.through)[1] > 0


def test_a_source_line_that_is_gone_is_named():
    with pytest.raises(ValueError, match="nonfinite.cu must have one line with 'no such line'"):
        streams.line_of("nonfinite.cu", "no such line")


def matrix(*shape):
    return {"shape": list(shape), "stride": [], "item": 4}


def test_bytes_of_an_update():
    launches = tuple(
        Launch(f"rls::rls_{name}_kernel<float, 44>", blocks, 128, 0, ())
        for name, blocks in (("project", 128), ("solve", 8), ("update", 137))
    )
    call = Call("rls_update_", {"P": matrix(1024, 1024), "s": matrix(1024)}, launches)
    project, solve, update = (work.work_of(call, launch) for launch in launches)
    n2, parts = 1024**2, 4 * 128 * 128
    assert project.loaded == {"project, 1 row": 4 * n2}
    assert project.moved == 4 * n2 + 4 * 1024 + parts
    assert solve.moved == parts
    assert update.moved == 6 * n2
    assert update.loaded["update"] == 4 * 136 * 64 * 64
    with pytest.raises(ValueError, match="new_kernel has no entry"):
        work.work_of(call, Launch("new_kernel<float>", 1, 1, 0, ()))


def row(**other):
    return {
        "case": "update n = 512", "kernel": "k<float>", "stream": "loop", "device": "H200",
        "bytes": 1e6, "blocks": 8, "threads": 128, "registers": 40, "shared": 0,
        "blocks_per_sm": 8, "waves": 0.1, "tail": 0.1, "microseconds": 4.0, "bound": "memory",
        "load": 16, "store": None, "per_byte": 1.5, "in_flight": 65536, "findings": [],
    } | other  # fmt: skip


def test_findings():
    assert findings(row(), H200) == []
    assert findings(row(load=4), H200) == ["narrow"]
    assert findings(row(in_flight=16384), H200) == ["shallow"]
    assert findings(row(in_flight=16384), A100) == []
    assert findings(row(bound="issue"), H200) == ["issue"]


def expected_of(rows, findings=None):
    return {"compiler": "nvcc 13", **expectation.figures(rows), "findings": findings or {}}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"load": 4}, "H200: loop: k<float>: load: expected 16, found 4"),
        ({"registers": 41}, "H200: loop: k<float>: registers: expected 40, found 41"),
        ({"in_flight": 4096}, "H200: loop: k<float>: in_flight: expected 65536, found 4096"),
        ({"per_byte": 1.6}, "H200: loop: k<float>: per_byte: expected 1.5, found 1.6"),
        ({"microseconds": 4.3},
         "update n = 512: k<float>: microseconds: expected 4.0, found 4.3"),
        ({"findings": ["narrow"]},
         "loop: finding narrow: expected none, or a reason in expected.json"),
    ],
)  # fmt: skip
def test_what_is_worse_is_named(change, complaint):
    assert expectation.complaints(expected_of([row()]), [row(**change)]) == [complaint]


def test_what_is_better_or_as_expected_is_no_complaint():
    expected = expected_of([row(findings=["narrow"])], {"loop": {"narrow": "a reason"}})
    assert expectation.complaints(expected, [row(findings=["narrow"], per_byte=1.52)]) == []
    better = row(findings=["narrow"], registers=32, microseconds=3.0)
    assert expectation.complaints(expected, [better]) == []


def test_what_is_new_or_gone_is_named():
    expected = expected_of([row()])
    (new, *_), gone = (
        expectation.complaints(expected, rows) for rows in ([row(), row(kernel="new")], [])
    )
    assert new == "H200: loop: new: found, expected none: run with --update"
    assert "H200: loop: k<float>: expected, found none" in gone
    outdated = expected | {"findings": {"loop": {"shallow": "a reason"}}}
    (complaint,) = expectation.complaints(outdated, [row()])
    assert complaint == "loop: finding shallow: expected, found none: run with --update"


def test_an_update_keeps_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(expectation, "EXPECTED", tmp_path / "expected.json")
    rows = [row(findings=["narrow"])]
    expectation.write(rows, "nvcc 13")
    assert expectation.read()["findings"] == {"loop": {"narrow": expectation.NO_REASON}}
    assert len(expectation.complaints(expectation.read(), rows)) == 1
    document = expectation.read() | {"findings": {"loop": {"narrow": "a reason"}}}
    expectation.EXPECTED.write_text(expectation.as_text(document), encoding="utf-8")
    expectation.write(rows, "nvcc 13")
    assert expectation.read() == document
    assert expectation.complaints(document, rows) == []


def test_every_finding_has_a_reason():
    findings = expectation.read()["findings"]
    assert all(reason for kinds in findings.values() for reason in kinds.values())
    assert findings.keys() <= streams.STREAMS.keys()


def test_a_tool_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(tools, "_PLACES", ())
    with pytest.raises(FileNotFoundError, match="no-such-tool is not on the PATH"):
        tools.find("no-such-tool")


def test_the_tables_call_them_predictions():
    rows = [row(), row(device="A100"), row(case="step MLP: spectral", bound="issue")]
    text = report({"rows": rows, "compiler": "nvcc 13", "source_hash": "abc"})
    assert "Predictions, nothing measured. nvcc 13; kernels abc." in text
    assert (
        "| update n = 512 | k<float> | 1 | 8 x 128 | 0.10 | 10 % | 4, memory | 4, memory |" in text
    )
    assert "| MLP: spectral | 1 | 4 | 0 | k<float>: **4, issue** |" in text
