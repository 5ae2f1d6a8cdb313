"""Gives the program damaged inputs, one at a time, and looks at how it ends.

    python tests/attack/damaged_inputs.py [--count N] [--every K] [--first I] [--seed S] [--only X]

Each command must end: with 0 where the damage does no harm, else with one line on stderr, `error:`
and what was expected, without a traceback, having changed no file and taken little memory; each
function of the library with one of its documented errors. Prints totals; the exit status is 1 if
one did not.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import fcntl
import io
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random

import matplotlib.pyplot  # noqa: F401 - imported once, for all the children
import torch
import torch._dynamo
import torch_pruning  # noqa: F401
from damage_cases import Case, cases
from workspace import DATA, command, make_workspace

import rlscuda.cli.prune.command
import rlscuda.cli.train.command

SECONDS = 60  # a case takes about one
MEMORY = 2**31  # bytes that a case may take
_OUTPUT = 2**20  # bytes that a command may print: a pipe is no file, which can be full
_CAPABILITIES = 0x20080522  # version 3 of the system call


@dataclass
class Ended:
    """How a child ended."""

    status: int
    out: str
    error: str
    memory: int
    late: bool


def child(work: Path, case: Case, drawn: bool) -> Ended:
    """Run a case in a process of its own."""
    pipes = [os.pipe() for _ in range(2)]
    for _, end in pipes:
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _OUTPUT)
    process = os.fork()
    if process == 0:
        status = 70
        try:
            for number, (_, end) in enumerate(pipes, 1):
                os.dup2(end, number)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", write_through=True)
            os.chdir(work)
            status = in_child(case, drawn)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    late = False

    def kill(*_: object) -> None:
        nonlocal late
        late = True
        os.kill(process, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.alarm(SECONDS)
    _, status, used = os.wait4(process, 0)
    signal.alarm(0)
    texts = []
    for end, other in pipes:
        os.close(other)
        with open(end, encoding="utf-8", errors="backslashreplace") as stream:
            texts.append(stream.read())
    return Ended(os.waitstatus_to_exitcode(status), *texts, used.ru_maxrss * 1024, late)


def in_child(case: Case, drawn: bool) -> int:
    """What a child does; its exit status."""
    bow_to_permissions()
    limit = _address_space() + 8 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if case.size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.size, resource.RLIM_INFINITY))
    sys.path.insert(0, os.getcwd())
    if not drawn:  # figures take most of the time of a command that succeeds
        rlscuda.cli.train.command.plot_run = lambda path, *_: path.write_bytes(b"")
        for module in (rlscuda.cli.prune.command, rlscuda.cli.train.command):
            module.write_report = _write_numbers
    if case.call is not None:
        case.call()
        return 0
    assert case.argv is not None
    return command(*case.argv)


def bow_to_permissions() -> None:
    """Give up what lets root read and write whatever it likes."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def _write_numbers(folder: Path, record, options) -> None:
    from rlscuda.cli.report.folder import write_document

    write_document(folder / "report.json", {"options": options, **record.to_dict()})


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def state_of(folder: Path) -> dict[str, object]:
    """What every name in a folder is, and holds."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat()
        content: object = stat.S_IFMT(kind.st_mode)
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(kind.st_mode):
            content = (kind.st_size, path.read_bytes() if kind.st_size < 2**26 else None)
        found[str(path.relative_to(folder))] = content
    return found


def fault_of(case: Case, ended: Ended, before: dict[str, object], work: Path) -> str | None:
    """What was wrong with the end of a case."""
    if ended.late:
        return f"hung for {SECONDS} seconds"
    if ended.status < 0:
        return f"killed by {signal.Signals(-ended.status).name}"
    if "Traceback" in ended.error or ended.status == 70:
        return "a traceback"
    if ended.memory > MEMORY:
        return f"took {ended.memory / 2**30:.1f} GiB"
    if ended.status == 0:
        return None
    lines = ended.error.strip().split("\n")
    if ended.status not in (1, 2) or (ended.status == 1 and len(lines) != 1):
        return f"ended with {ended.status} and {len(lines)} lines"
    if ended.status == 1 and not lines[0].startswith("error: "):
        return "no error: line"
    if "not enough memory" in lines[0] and "factory" not in case.name:
        return "memory was asked for before sizes were checked"
    after = state_of(work)
    names = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    if case.late:  # the run is there then, and goes on below
        names = {name for name in names if not name.startswith("new")}
    if case.size is None and names:
        return f"changed {', '.join(sorted(names))}"
    return None


def goes_on(case: Case, work: Path, whole: Path) -> str | None:
    """Without the damage: what is wrong with the run that was being written."""
    assert case.argv is not None
    (work / DATA).unlink(missing_ok=True)
    shutil.copy(whole / DATA, work / DATA)
    shutil.rmtree(work / "images")
    shutil.copytree(whole / "images", work / "images")
    out = case.argv[case.argv.index("--out") + 1]
    if case.argv[0] == "prune":
        if out == "pruned" and not (work / out / "report.json").is_file():
            return "the old pruning is gone"
        return None
    if not (work / out).exists():
        return None
    ended = child(work, Case(case.name, case.apply, ("train", "--resume", "--out", out)), False)
    return None if ended.status == 0 else f"cannot be resumed: {ended.error}"


def attempt(case: Case, whole: Path, random: Random, drawn: bool) -> tuple[str, str | None, str]:
    """The kind of a case's end, what was wrong with it, and its line."""
    with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
        work = Path(folder, "work")
        shutil.copytree(whole, work)
        for path in (Path(folder), work, *work.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        here = os.getcwd()
        os.chdir(work)
        try:
            case.apply(random)
        finally:
            os.chdir(here)
        before = state_of(work)
        ended = child(work, case, drawn)
        fault = fault_of(case, ended, before, work)
        if (case.size is not None or case.late) and fault is None and ended.status == 1:
            fault = goes_on(case, work, whole)
        for path in work.rglob("*"):
            if path.is_dir():
                path.chmod(0o777)
    kinds = {0: "harmless", 1: "one line", 2: "usage"}
    return kinds.get(ended.status, "other"), fault, ended.error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2010, help="about how many cases there are")
    parser.add_argument("--every", type=int, default=1, help="run each K-th of them only")
    parser.add_argument("--first", type=int, default=0, help="starting with this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="run those whose name has this text")
    parser.add_argument("--show", action="store_true", help="print each case and its line")
    given = parser.parse_args()
    torch.set_num_threads(1)
    command("info")  # with the imports above, what all commands need, once for all the children
    torch.optim.AdamW([torch.zeros(1)])
    totals: collections.Counter[str] = collections.Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        whole = Path(folder, "whole")
        whole.mkdir()
        made = os.fork()  # no thread of autograd may be older than the children
        if made == 0:
            with open(os.devnull, "w", encoding="utf-8") as sys.stdout:
                make_workspace(whole)
            os._exit(0)
        if os.waitpid(made, 0)[1]:
            raise SystemExit("the workspace could not be made")
        for number, case in enumerate(cases(given.count)):
            if number % given.every != given.first or given.only not in case.name:
                continue
            random = Random(f"{given.seed} {number}")
            kind, fault, error = attempt(
                case, whole, random, drawn=Random(number).random() < 1 / 40
            )
            totals[kind] += 1
            if given.show:
                print(f"{number} {case.name}: {kind} {error.strip()[-300:]}", flush=True)
            if fault is not None:
                faults += 1
                print(f"FAULT {number} {case.name}: {fault}\n{error[-1500:]}", flush=True)
    count = sum(totals.values())
    print(f"{count} damaged inputs: " + ", ".join(f"{n} {kind}" for kind, n in totals.items())
          + f"; {faults} left over")  # fmt: skip
    return 1 if faults or not count else 0


if __name__ == "__main__":
    raise SystemExit(main())
